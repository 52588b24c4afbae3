"""Sub-models that speak the full model's space: their maps, and depth 0, which is made of one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m2dexport.checkpoint.alignment import FullModel
from m2dexport.checkpoint.open import Checkpoint
from m2dexport.checkpoint.tokenizer import sealed_tokenizer_json
from m2dexport.errors import UsageError
from m2dexport.files import scratch_folder
from m2dexport.progress import OnProgress
from m2dexport.strict import parse_json, sha256_of_json

if TYPE_CHECKING:
    from m2dexport.align.fit import Fit
    from m2dexport.align.static import TokenTable

#: Writes the plain sub-model of some layers and dims into a folder that it makes.
WritePlain = Callable[[int, int, Path], Checkpoint]


@dataclass(frozen=True)
class Alignment:
    """What aligned sub-models are made of."""

    fits: Mapping[tuple[int, int], Fit]  # (layers, dim) -> the map, and how it was found
    table: TokenTable | None  # of depth 0, where it is asked for
    full: Mapping[int, FullModel]  # dim -> the model whose space is spoken
    texts_sha256: str

    def provenance(self, layers: int, dim: int) -> dict[str, Any]:
        """Return what a sub-model's m2dexport.json says about its map."""
        fit, full = self.fits[layers, dim], self.full[dim]
        return {
            "texts": fit.texts,
            "texts_sha256": self.texts_sha256,
            "strength": fit.strength,
            "cosine_before": round(fit.cosine_before, 6),
            "cosine_after": round(fit.cosine_after, 6),
            "full_model": vars(full),
        }


def align_pairs(
    checkpoint: Checkpoint,
    pairs: Sequence[tuple[int, int]],
    texts: Iterable[str],
    write: WritePlain,
    write_full: WritePlain,
    on_progress: OnProgress,
) -> Alignment:
    """Fit the maps of all pairs of layers and dim in one pass over texts.

    Args:
        checkpoint: the full model.
        pairs: those to fit.
        texts: unlabelled; iterated up to three times.
        write: writes the sub-models that the maps are for.
        write_full: writes sub-models of the full depth, whatever else the others change.
        on_progress: called as texts are done.

    Raises:
        UsageError: when the texts are too few, cannot be read, or do not align a depth.
    """
    from m2dexport.align.depths import fit_depths  # needs torch
    from m2dexport.align.static import TokenTable
    from m2dexport.align.texts import prompted, prompts_of, sha256_of_texts

    dims = sorted({dim for _, dim in pairs})
    depths = sorted({layers for layers, _ in pairs})
    digest = sha256_of_texts(texts)  # first: what cannot be read is refused before the work
    with scratch_folder() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the sub-models themselves, which come later
        whole = [depth for depth in depths if depth > 0] or [1]
        subs = {depth: write(depth, checkpoint.dim, scratch / str(depth)) for depth in whole}
        table = None
        if 0 in depths:
            table = TokenTable(subs[whole[0]], prompted(texts, prompts_of(checkpoint)))
        asked = {depth: sub for depth, sub in subs.items() if depth in depths}
        fits = fit_depths(checkpoint, asked, table, dims, texts, on_progress)
        full = {
            dim: _full_model(write_full(checkpoint.layers, dim, scratch / f"full-{dim}"))
            for dim in dims
        }
    return Alignment(fits, table, full, digest)


def require_alignable(checkpoint: Checkpoint, layers: int, *, normalized: bool) -> None:
    """Refuse to fit a map where there is none to fit.

    Raises:
        UsageError: naming the reason.
    """
    if checkpoint.speaks or checkpoint.layers == 0:
        raise UsageError(
            f"{checkpoint.path} is aligned already; leave --align out, or align the whole "
            "checkpoint again."
        )
    if layers == checkpoint.layers:
        raise UsageError(
            f"depth {layers} is the full depth, whose map is the identity; align shallower ones."
        )
    if not normalized:
        raise UsageError(
            f"aligned vectors have length 1, and those of {checkpoint.path} keep their norms; "
            "slice --normalize --align makes a sub-model of unit vectors."
        )


def _full_model(sub_model: Checkpoint) -> FullModel:
    sealed = sealed_tokenizer_json(sub_model.path, sub_model.max_length)
    return FullModel(
        layers=sub_model.layers,
        weights_sha256=sub_model.weights_sha256,
        tokenizer_sha256=sha256_of_json(parse_json(sealed, "tokenizer.json")),
        pooling="+".join(sub_model.pooling.modes),
        final_norm=sub_model.final_norm,
    )
