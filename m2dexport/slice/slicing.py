"""Cut a checkpoint to its first layers and leading dims: a standalone sub-model folder."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast

from m2dexport.checkpoint.open import Checkpoint, FinalNorm
from m2dexport.checkpoint.tensors import FLOAT_NAMES
from m2dexport.checkpoint.widths import Importance, narrowed, unknown_widths
from m2dexport.errors import UsageError
from m2dexport.files import atomic_folder
from m2dexport.progress import OnProgress
from m2dexport.slice.aligned import Alignment, align_pairs, require_alignable
from m2dexport.slice.pruning import PruningPlan
from m2dexport.slice.write import Plan, written

FinalNormChoice = Literal["applied", "skipped"]


@dataclass(frozen=True)
class Cut:
    """What a sub-model is to be besides shallower and shorter; by default, as the checkpoint."""

    heads: Sequence[int] | None = None  # leading query heads to keep: one number, or one per layer
    ffn: Sequence[int] | None = None  # leading feed-forward channels to keep; likewise
    reorder: Sequence[str] | None = None  # texts to rank heads and channels on, before they are cut
    dtype: str | None = None  # "fp32", "fp16" or "bf16"; None keeps the stored type of each tensor
    final_norm: FinalNormChoice | None = None  # of pre-LN families: applied to the last layer?
    normalize: bool = False  # a dot-product model's vectors, which otherwise keep their norms
    pruning: PruningPlan | None = None  # the part of the vocabulary to keep, from ``plan_pruning``
    align: Iterable[str] | None = None  # texts to fit a map into the full model's space on


def slice_checkpoint(
    checkpoint: Checkpoint,
    layers: int,
    dim: int,
    out: str | Path,
    cut: Cut = Cut(),
    *,
    force: bool = False,
) -> Checkpoint:
    """Write the sub-model of the first ``layers`` layers and ``dim`` dims, and describe it.

    The folder can be sliced again, and loads with ``AutoModel.from_pretrained`` (hidden states) and
    ``SentenceTransformer(path)`` (the vector), unless a ``LoadingWarning`` says that only m2dexport
    loads it. Vectors are normalised unless the checkpoint's similarity is one that sees norms, such
    as dot. Tensors are copied from file to file in blocks of 16 MiB.

    Args:
        checkpoint: what to cut.
        layers: how many layers to keep, 1 to N, or 0 for a static model of the token table, which
            is always aligned.
        dim: how many leading dims of the vector to keep, before normalising.
        out: the folder to write.
        cut: what else to change.
        force: whether a sub-model at ``out`` is replaced.

    Raises:
        UsageError: when a value is out of range, or ``out`` exists and is not to be replaced.
        CheckpointError: when the checkpoint cannot be cut there.

    Example:
        >>> slice_checkpoint(open_checkpoint(), 6, 128, Path("l6-d128")).dim
        128
    """
    (sub_model,) = slice_grid(checkpoint, [layers], [dim], out, cut, force=force)
    return sub_model


def slice_grid(
    checkpoint: Checkpoint,
    layers: Sequence[int],
    dims: Sequence[int],
    out: str | Path,
    cut: Cut = Cut(),
    on_progress: OnProgress = lambda *_: None,
    *,
    force: bool = False,
) -> list[Checkpoint]:
    """Write the sub-model of every pair of ``layers`` and ``dims``, all of them or none.

    One pair is written to ``out`` itself, several to folders in it: ``out/6x128``.

    Args and raises: as ``slice_checkpoint``; ``on_progress`` is called as texts are aligned on.
    """
    out = Path(out)
    pairs = dict.fromkeys((n, d) for n in layers for d in dims)
    if cut.reorder is not None and checkpoint.widths is None:
        raise unknown_widths(checkpoint.model_type)
    plans = [_checked(checkpoint, n, d, cut) for n, d in pairs]
    names = [f"{plan.layers}x{plan.dim}" if len(plans) > 1 else "" for plan in plans]
    if checkpoint.path.resolve().is_relative_to(out.resolve()):
        raise UsageError(f"{out} holds the checkpoint itself; name another place with --out.")
    with atomic_folder(out, force=force) as folder:
        importance = _importance(checkpoint, cut.reorder)
        alignment = _alignment(checkpoint, plans, importance, cut, on_progress)
        sub_models = [
            written(checkpoint, plan, importance, folder / name, alignment)
            for plan, name in zip(plans, names, strict=True)
        ]
    return [sub.moved(out / name) for sub, name in zip(sub_models, names, strict=True)]


def _importance(checkpoint: Checkpoint, texts: Sequence[str] | None) -> Importance | None:
    if texts is None:
        return None
    from m2dexport.reference.importance import importance_of  # needs torch

    return importance_of(checkpoint, texts)


def _alignment(
    checkpoint: Checkpoint,
    plans: Sequence[Plan],
    importance: Importance | None,
    cut: Cut,
    on_progress: OnProgress,
) -> Alignment | None:
    if cut.align is None:
        return None

    def plain(layers: int, dim: int, folder: Path) -> Checkpoint:
        plan = _checked(checkpoint, layers, dim, replace(cut, align=None))
        return written(checkpoint, plan, importance, folder, None)

    def full(layers: int, dim: int, folder: Path) -> Checkpoint:
        plan = _checked(checkpoint, layers, dim, Cut(normalize=cut.normalize))
        return written(checkpoint, plan, None, folder, None)

    pairs = [(plan.layers, plan.dim) for plan in plans]
    return align_pairs(checkpoint, pairs, cut.align, plain, full, on_progress)


def _checked(checkpoint: Checkpoint, layers: int, dim: int, cut: Cut) -> Plan:
    if not 0 <= layers <= checkpoint.layers:
        raise UsageError(
            f"--layers {layers} is not between 0 and {checkpoint.layers}, the checkpoint's depth."
        )
    _require_alignment(checkpoint, layers, cut)
    if not 1 <= dim <= checkpoint.dim:
        raise UsageError(
            f"--dim {dim} is not between 1 and {checkpoint.dim}, the checkpoint's width."
        )
    if cut.dtype is not None and cut.dtype not in FLOAT_NAMES:
        raise UsageError(f"--dtype {cut.dtype!r} is unknown; choose from {', '.join(FLOAT_NAMES)}.")
    whole = checkpoint.widths.first(layers) if checkpoint.widths and layers else None
    widths = narrowed(whole, checkpoint.model_type, cut.heads, cut.ffn)
    trained = None if checkpoint.trained is None else (layers, dim) in checkpoint.trained
    if layers == 0:
        trained = None  # its table is fitted, at every dim
    if trained and widths != whole:
        trained = None  # a grid of layers and dims says nothing of narrower layers
    return Plan(
        layers,
        dim,
        FLOAT_NAMES[cut.dtype] if cut.dtype else None,
        _final_norm(checkpoint, cut.final_norm),
        widths,
        trained,
        cut.normalize or not checkpoint.keeps_norms,
        cut.pruning,
    )


def _require_alignment(checkpoint: Checkpoint, layers: int, cut: Cut) -> None:
    """Refuse a map where there is none to fit, and a cut that a map was not fitted for."""
    if cut.align is not None:
        require_alignable(
            checkpoint, layers, normalized=cut.normalize or not checkpoint.keeps_norms
        )
    inside = cut.heads or cut.ffn or cut.reorder is not None or cut.final_norm
    if layers == 0 and inside:
        raise UsageError("depth 0 has no heads, channels or norm to cut; leave those out.")
    if layers == 0 < checkpoint.layers and cut.align is None:
        raise UsageError("depth 0 is made by a map; pass texts to align it on.")
    changed = layers != checkpoint.layers or inside or cut.align is not None
    if checkpoint.alignment is not None and changed:
        raise UsageError(
            f"{checkpoint.path} ends in a map that was fitted to its own vectors; align again by "
            "slicing the whole checkpoint."
        )


def _final_norm(checkpoint: Checkpoint, asked: str | None) -> FinalNorm:
    if asked is None:
        return checkpoint.final_norm
    if checkpoint.final_norm == "none":
        raise UsageError(
            f"--final-norm {asked} has no meaning for {checkpoint.model_type}: each of its layers "
            "ends in its own norm."
        )
    if asked not in ("applied", "skipped"):
        raise UsageError(f"--final-norm {asked!r} is unknown; choose applied or skipped.")
    return cast(FinalNorm, asked)
