"""Cut a checkpoint to its first layers and leading dims: a standalone sub-model folder."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from m2dexport.checkpoint import (
    PROVENANCE,
    Checkpoint,
    FinalNorm,
    layout_of,
    open_checkpoint,
    weights_sha256,
)
from m2dexport.config import CONFIG, RAW_LAST_STATE, cut_config, is_native
from m2dexport.errors import UsageError
from m2dexport.files import atomic_folder
from m2dexport.jsonfile import read_json, write_json
from m2dexport.modules import Modules, read_lowercase, write_modules
from m2dexport.tensors import FLOAT_NAMES, WEIGHTS, copied, write_tensors
from m2dexport.tokenizer import write_tokenizer

_FORMAT = 1
_SENTENCE_CONFIG = "config_sentence_transformers.json"
_RAW_STATE_SINCE = ">=5.18"
_TORCH_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


FinalNormChoice = Literal["applied", "skipped"]


class UntrainedWarning(UserWarning):
    """The (layers, dim) asked for is not one that training visited."""


@dataclass(frozen=True)
class _Cut:
    """One sub-model to be made, every value checked."""

    layers: int
    dim: int
    dtype: str | None  # "F32", "F16" or "BF16"; None keeps the stored types
    final_norm: FinalNorm
    trained: bool | None  # None: the trained grid is unknown


def slice_checkpoint(
    checkpoint: Checkpoint,
    layers: int,
    dim: int,
    out: Path,
    *,
    dtype: str | None = None,
    final_norm: FinalNormChoice | None = None,
) -> Checkpoint:
    """Write the sub-model of the first ``layers`` layers and ``dim`` dims, and return it re-opened.

    The folder loads with ``AutoModel.from_pretrained`` (hidden states) and
    ``SentenceTransformer(path)`` (the normalised vector), and can be sliced again. Tensors are
    copied from file to file in blocks of 16 MiB.

    Args:
        checkpoint: what to cut.
        layers: how many layers to keep, 1 to N.
        dim: how many leading dims of the vector to keep, before normalising.
        out: the folder to write; it must not exist.
        dtype: "fp32", "fp16" or "bf16"; None keeps the stored type of each tensor.
        final_norm: whether the norm after the last layer of pre-LN families is applied to the
            deepest kept layer; None: as in the checkpoint. Post-LN families have none to decide.

    Raises:
        UsageError: when a value is out of range or ``out`` exists.
        CheckpointError: when the checkpoint cannot be cut there.

    Example:
        >>> slice_checkpoint(open_checkpoint(), 6, 128, Path("l6-d128")).dim
        128
    """
    cut = _checked(checkpoint, layers, dim, dtype, final_norm)
    with atomic_folder(out) as folder:
        _write(checkpoint, cut, folder, weights_sha256(checkpoint))
        _reopened(checkpoint, folder)  # what transformers cannot read is not handed over
    return _reopened(checkpoint, out)


def slice_grid(
    checkpoint: Checkpoint,
    layers: Sequence[int],
    dims: Sequence[int],
    out: Path,
    *,
    dtype: str | None = None,
    final_norm: FinalNormChoice | None = None,
) -> list[Checkpoint]:
    """Write the sub-model of every pair of ``layers`` and ``dims``, all of them or none.

    One pair is written to ``out`` itself, several to folders in it: ``out/6x128``.

    Args and raises: as ``slice_checkpoint``.
    """
    pairs = dict.fromkeys((n, d) for n in layers for d in dims)
    cuts = [_checked(checkpoint, n, d, dtype, final_norm) for n, d in pairs]
    names = [f"{cut.layers}x{cut.dim}" if len(cuts) > 1 else "" for cut in cuts]
    with atomic_folder(out) as folder:
        parent = weights_sha256(checkpoint)
        for cut, name in zip(cuts, names, strict=True):
            (folder / name).mkdir(exist_ok=True)
            _write(checkpoint, cut, folder / name, parent)
            _reopened(checkpoint, folder / name)
    return [_reopened(checkpoint, out / name) for name in names]


def _checked(
    checkpoint: Checkpoint, layers: int, dim: int, dtype: str | None, norm: str | None
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
    return _Cut(
        layers,
        dim,
        FLOAT_NAMES[dtype] if dtype else None,
        _final_norm(checkpoint, norm),
        None if checkpoint.trained is None else (layers, dim) in checkpoint.trained,
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


def _write(checkpoint: Checkpoint, cut: _Cut, folder: Path, parent: str) -> None:
    """Write one sub-model into an empty folder; ``parent`` is the hash of what it is cut from."""
    if cut.trained is False:
        warnings.warn(
            f"({cut.layers}, {cut.dim}) is not in the trained grid of {checkpoint.path}; measure "
            "it before use.",
            UntrainedWarning,
            stacklevel=3,
        )
    layout = layout_of(checkpoint)
    config = cut_config(
        read_json(checkpoint.path / CONFIG), layout.family, checkpoint.layers, cut.layers
    )
    config.pop(RAW_LAST_STATE, None)
    if cut.final_norm == "skipped":
        config[RAW_LAST_STATE] = False
    if cut.dtype:
        config.pop("torch_dtype", None)
        config["dtype"] = _TORCH_DTYPES[cut.dtype]
    write_json(folder / CONFIG, config)
    for path in () if is_native(checkpoint.model_type) else checkpoint.path.glob("*.py"):
        shutil.copyfile(path, folder / path.name)
    kept = layout.tensors(cut.layers)
    write_tensors(folder / WEIGHTS, [copied(t, n, dtype=cut.dtype) for n, t in kept.items()])
    write_tokenizer(checkpoint.path, folder, lowercase=read_lowercase(checkpoint.path))
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
    write_json(folder / PROVENANCE, _provenance(checkpoint, cut, parent))


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


def _provenance(checkpoint: Checkpoint, cut: _Cut, parent: str) -> dict[str, Any]:
    grid = checkpoint.trained
    return {
        "format": _FORMAT,
        "layers": cut.layers,
        "dim": cut.dim,
        "final_norm": cut.final_norm,
        "trained": cut.trained,
        "trained_grid": grid and [[n, d] for n, d in grid if n <= cut.layers and d <= cut.dim],
        "sliced_from": parent,
    }
