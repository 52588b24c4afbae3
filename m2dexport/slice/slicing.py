"""Cut a checkpoint to its first layers and leading dims: a standalone sub-model folder."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

from m2dexport.checkpoint.hf_config import CONFIG, RAW_LAST_STATE, cut_config, is_native
from m2dexport.checkpoint.jsonfile import read_json, write_json
from m2dexport.checkpoint.open import (
    PROVENANCE,
    Checkpoint,
    FinalNorm,
    layout_of,
    open_checkpoint,
    weights_sha256,
)
from m2dexport.checkpoint.st_modules import Modules, read_lowercase, write_modules
from m2dexport.checkpoint.tensors import FLOAT_NAMES, WEIGHTS, write_tensors
from m2dexport.checkpoint.tokenizer import replace_tokenizer, write_tokenizer
from m2dexport.checkpoint.widths import (
    Importance,
    Widths,
    cut_tensors,
    narrowed,
    unknown_widths,
    width_config,
)
from m2dexport.errors import UsageError
from m2dexport.files import atomic_folder
from m2dexport.slice.pruning import Pruning, pruned_tensors

_FORMAT = 1
_SENTENCE_CONFIG = "config_sentence_transformers.json"
_RAW_STATE_SINCE = ">=5.18"
_TORCH_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


FinalNormChoice = Literal["applied", "skipped"]


class UntrainedWarning(UserWarning):
    """The (layers, dim) asked for is not one that training visited."""


class LoadingWarning(UserWarning):
    """transformers has no setting for the widths asked for; m2dexport alone loads the sub-model."""


@dataclass(frozen=True)
class _Cut:
    """One sub-model to be made, every value checked."""

    layers: int
    dim: int
    dtype: str | None  # "F32", "F16" or "BF16"; None keeps the stored types
    final_norm: FinalNorm
    widths: Widths | None  # None: of a family whose layers are not in the table
    trained: bool | None  # None: the trained grid is unknown


def slice_checkpoint(
    checkpoint: Checkpoint,
    layers: int,
    dim: int,
    out: Path,
    *,
    heads: Sequence[int] | None = None,
    ffn: Sequence[int] | None = None,
    reorder: Sequence[str] | None = None,
    dtype: str | None = None,
    final_norm: FinalNormChoice | None = None,
    pruning: Pruning | None = None,
) -> Checkpoint:
    """Write the sub-model of the first ``layers`` layers and ``dim`` dims, and return it re-opened.

    The folder loads with ``AutoModel.from_pretrained`` (hidden states) and
    ``SentenceTransformer(path)`` (the normalised vector), unless a ``LoadingWarning`` says that
    only m2dexport loads it, and can be sliced again. Tensors are copied from file to file in blocks
    of 16 MiB.

    Args:
        checkpoint: what to cut.
        layers: how many layers to keep, 1 to N.
        dim: how many leading dims of the vector to keep, before normalising.
        out: the folder to write; it must not exist.
        heads: how many leading query heads to keep: one number, or one per kept layer; None keeps
            all.
        ffn: how many leading feed-forward channels to keep; likewise.
        reorder: texts on which heads and channels are measured; the most important come first,
            before any cut. None keeps the stored order.
        dtype: "fp32", "fp16" or "bf16"; None keeps the stored type of each tensor.
        final_norm: whether the norm after the last layer of pre-LN families is applied to the
            deepest kept layer; None: as in the checkpoint. Post-LN families have none to decide.
        pruning: which part of the vocabulary to keep, from ``plan_pruning``; None keeps all.

    Raises:
        UsageError: when a value is out of range or ``out`` exists.
        CheckpointError: when the checkpoint cannot be cut there.

    Example:
        >>> slice_checkpoint(open_checkpoint(), 6, 128, Path("l6-d128")).dim
        128
    """
    (sub_model,) = slice_grid(
        checkpoint,
        [layers],
        [dim],
        out,
        heads=heads,
        ffn=ffn,
        reorder=reorder,
        dtype=dtype,
        final_norm=final_norm,
        pruning=pruning,
    )
    return sub_model


def slice_grid(
    checkpoint: Checkpoint,
    layers: Sequence[int],
    dims: Sequence[int],
    out: Path,
    *,
    heads: Sequence[int] | None = None,
    ffn: Sequence[int] | None = None,
    reorder: Sequence[str] | None = None,
    dtype: str | None = None,
    final_norm: FinalNormChoice | None = None,
    pruning: Pruning | None = None,
) -> list[Checkpoint]:
    """Write the sub-model of every pair of ``layers`` and ``dims``, all of them or none.

    One pair is written to ``out`` itself, several to folders in it: ``out/6x128``.

    Args and raises: as ``slice_checkpoint``.
    """
    pairs = dict.fromkeys((n, d) for n in layers for d in dims)
    if reorder is not None and checkpoint.widths is None:
        raise unknown_widths(checkpoint.model_type)
    cuts = [_checked(checkpoint, n, d, heads, ffn, dtype, final_norm) for n, d in pairs]
    names = [f"{cut.layers}x{cut.dim}" if len(cuts) > 1 else "" for cut in cuts]
    with atomic_folder(out) as folder:
        parent = weights_sha256(checkpoint)
        importance = _importance(checkpoint, reorder)
        for cut, name in zip(cuts, names, strict=True):
            (folder / name).mkdir(exist_ok=True)
            _write(checkpoint, cut, importance, pruning, folder / name, parent)
            _reopened(checkpoint, folder / name)  # what transformers cannot read is not handed over
    return [_reopened(checkpoint, out / name) for name in names]


def _importance(checkpoint: Checkpoint, texts: Sequence[str] | None) -> Importance | None:
    if texts is None:
        return None
    from m2dexport.reference.importance import importance_of  # needs torch

    return importance_of(checkpoint, texts)


def _checked(
    checkpoint: Checkpoint,
    layers: int,
    dim: int,
    heads: Sequence[int] | None,
    ffn: Sequence[int] | None,
    dtype: str | None,
    norm: str | None,
) -> _Cut:
    if not 1 <= layers <= checkpoint.layers:
        raise UsageError(
            f"--layers {layers} is not between 1 and {checkpoint.layers}, the checkpoint's depth."
        )
    if not 1 <= dim <= checkpoint.dim:
        raise UsageError(
            f"--dim {dim} is not between 1 and {checkpoint.dim}, the checkpoint's width."
        )
    if dtype is not None and dtype not in FLOAT_NAMES:
        raise UsageError(f"--dtype {dtype!r} is unknown; choose from {', '.join(FLOAT_NAMES)}.")
    whole = checkpoint.widths and checkpoint.widths.first(layers)
    widths = narrowed(whole, checkpoint.model_type, heads, ffn)
    trained = None if checkpoint.trained is None else (layers, dim) in checkpoint.trained
    if trained and widths != whole:
        trained = None  # a grid of layers and dims says nothing of narrower layers
    return _Cut(
        layers,
        dim,
        FLOAT_NAMES[dtype] if dtype else None,
        _final_norm(checkpoint, norm),
        widths,
        trained,
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


def _write(
    checkpoint: Checkpoint,
    cut: _Cut,
    importance: Importance | None,
    pruning: Pruning | None,
    folder: Path,
    parent: str,
) -> None:
    """Write one sub-model into an empty folder; ``parent`` is the hash of what it is cut from."""
    if cut.trained is False:
        warnings.warn(
            f"({cut.layers}, {cut.dim}) is not in the trained grid of {checkpoint.path}; measure "
            "it before use.",
            UntrainedWarning,
            stacklevel=3,
        )
    layout = layout_of(checkpoint)
    raw = read_json(checkpoint.path / CONFIG)
    tensors = cut_tensors(
        layout, checkpoint.widths, cut.widths, cut.layers, importance=importance, dtype=cut.dtype
    )
    config, loads = width_config(
        cut_config(raw, layout.family, checkpoint.layers, cut.layers),
        layout.family,
        cut.widths,
        tensors,
    )
    if not loads:
        warnings.warn(
            f"no config.json of {checkpoint.model_type} can state these widths, so transformers "
            "and sentence-transformers will refuse this sub-model; build, profile and bundle take "
            "it.",
            LoadingWarning,
            stacklevel=3,
        )
    config.pop(RAW_LAST_STATE, None)
    if cut.final_norm == "skipped":
        config[RAW_LAST_STATE] = False
    if cut.dtype:
        config.pop("torch_dtype", None)
        config["dtype"] = _TORCH_DTYPES[cut.dtype]
    if pruning:
        config |= pruning.config
    write_json(folder / CONFIG, config)
    for path in () if is_native(checkpoint.model_type) else checkpoint.path.glob("*.py"):
        shutil.copyfile(path, folder / path.name)
    for path in checkpoint.licenses:
        shutil.copyfile(path, folder / path.name)
    provenance = _provenance(checkpoint, cut, importance, parent)
    write_tokenizer(checkpoint.path, folder, lowercase=read_lowercase(checkpoint.path))
    if pruning:
        whole = sum(tensor.size for tensor in tensors)
        tensors = pruned_tensors(pruning, tensors, layout.outside)
        saved = whole - sum(tensor.size for tensor in tensors)
        provenance["vocabulary"] = {**pruning.report, "bytes_saved": saved}
        replace_tokenizer(folder, pruning.tokenizer, pruning.ids)
    write_tensors(folder / WEIGHTS, tensors)
    modules = Modules(
        transformer=folder,
        max_length=checkpoint.max_length,
        raw_output=cut.final_norm == "skipped",
        latent=checkpoint.latent,
        pooling=checkpoint.pooling,
        head=checkpoint.head,
        normalized=True,
    )
    write_modules(modules, checkpoint.hidden, dim=cut.dim, dtype=cut.dtype)
    write_json(folder / _SENTENCE_CONFIG, _sentence_config(checkpoint, cut))
    write_json(folder / PROVENANCE, provenance)


def _reopened(checkpoint: Checkpoint, out: Path) -> Checkpoint:
    # Code of its own was trusted when the checkpoint was opened, or there were no checkpoint.
    return open_checkpoint(out, trust_remote_code=not is_native(checkpoint.model_type))


def _sentence_config(checkpoint: Checkpoint, cut: _Cut) -> dict[str, Any]:
    config: dict[str, Any] = {
        "model_type": "SentenceTransformer",
        "prompts": dict(checkpoint.prompts),
        "default_prompt_name": checkpoint.default_prompt,
        "similarity_fn_name": "cosine",
    }
    if cut.final_norm == "skipped":
        # Older versions would apply the norm and say nothing.
        config["requirements"] = {"transformers": _RAW_STATE_SINCE}
    return config


def _provenance(
    checkpoint: Checkpoint, cut: _Cut, importance: Importance | None, parent: str
) -> dict[str, Any]:
    narrower = checkpoint.widths and cut.widths != checkpoint.widths.first(cut.layers)
    grid = None if narrower else checkpoint.trained
    return {
        "format": _FORMAT,
        "layers": cut.layers,
        "dim": cut.dim,
        "widths": cut.widths and asdict(cut.widths),
        "reordered_by": importance and importance.texts_sha256,
        "final_norm": cut.final_norm,
        "trained": cut.trained,
        "trained_grid": grid and [[n, d] for n, d in grid if n <= cut.layers and d <= cut.dim],
        "sliced_from": parent,
    }
