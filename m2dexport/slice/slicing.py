"""Cut a checkpoint to its first layers and leading dims: a standalone sub-model folder."""

from __future__ import annotations

import inspect
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

from m2dexport.checkpoint.families import bare_class
from m2dexport.checkpoint.hf_config import CONFIG, RAW_LAST_STATE, cut_config
from m2dexport.checkpoint.jsonfile import read_json, write_json
from m2dexport.checkpoint.open import Checkpoint, FinalNorm, open_checkpoint
from m2dexport.checkpoint.st_modules import SENTENCE_CONFIG, Modules, read_lowercase
from m2dexport.checkpoint.st_write import write_modules
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
from m2dexport.errors import CheckpointError, UsageError
from m2dexport.files import PROVENANCE, atomic_folder
from m2dexport.slice.pruning import PruningPlan, pruned_tensors

_FORMAT = 1
_RAW_STATE_SINCE = ">=5.18"
_TORCH_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


FinalNormChoice = Literal["applied", "skipped"]


class UntrainedWarning(UserWarning):
    """The (layers, dim) asked for is not one that training visited."""


class LoadingWarning(UserWarning):
    """transformers has no setting for the widths asked for; only m2dexport loads the sub-model."""


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


@dataclass(frozen=True)
class _Plan:
    """One sub-model to be made, every value checked."""

    layers: int
    dim: int
    dtype: str | None  # "F32", "F16" or "BF16"; None keeps the stored types
    final_norm: FinalNorm
    widths: Widths | None  # None: of a family whose layers are not in the table
    trained: bool | None  # None: the trained grid is unknown
    normalize: bool  # end in Normalize
    pruning: PruningPlan | None


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
        layers: how many layers to keep, 1 to N.
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
    *,
    force: bool = False,
) -> list[Checkpoint]:
    """Write the sub-model of every pair of ``layers`` and ``dims``, all of them or none.

    One pair is written to ``out`` itself, several to folders in it: ``out/6x128``.

    Args and raises: as ``slice_checkpoint``.
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
        written = [
            _written(checkpoint, plan, importance, folder / name)
            for plan, name in zip(plans, names, strict=True)
        ]
    return [sub.moved(out / name) for sub, name in zip(written, names, strict=True)]


def _importance(checkpoint: Checkpoint, texts: Sequence[str] | None) -> Importance | None:
    if texts is None:
        return None
    from m2dexport.reference.importance import importance_of  # needs torch

    return importance_of(checkpoint, texts)


def _checked(checkpoint: Checkpoint, layers: int, dim: int, cut: Cut) -> _Plan:
    if not 1 <= layers <= checkpoint.layers:
        raise UsageError(
            f"--layers {layers} is not between 1 and {checkpoint.layers}, the checkpoint's depth."
        )
    if not 1 <= dim <= checkpoint.dim:
        raise UsageError(
            f"--dim {dim} is not between 1 and {checkpoint.dim}, the checkpoint's width."
        )
    if cut.dtype is not None and cut.dtype not in FLOAT_NAMES:
        raise UsageError(f"--dtype {cut.dtype!r} is unknown; choose from {', '.join(FLOAT_NAMES)}.")
    whole = checkpoint.widths and checkpoint.widths.first(layers)
    widths = narrowed(whole, checkpoint.model_type, cut.heads, cut.ffn)
    trained = None if checkpoint.trained is None else (layers, dim) in checkpoint.trained
    if trained and widths != whole:
        trained = None  # a grid of layers and dims says nothing of narrower layers
    return _Plan(
        layers,
        dim,
        FLOAT_NAMES[cut.dtype] if cut.dtype else None,
        _final_norm(checkpoint, cut.final_norm),
        widths,
        trained,
        cut.normalize or not checkpoint.keeps_norms,
        cut.pruning,
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


def _written(
    checkpoint: Checkpoint, plan: _Plan, importance: Importance | None, folder: Path
) -> Checkpoint:
    """Write one sub-model into a folder, and describe it as any reader of that folder would."""
    folder.mkdir(exist_ok=True)
    layout = checkpoint.layout
    tensors = cut_tensors(
        layout, checkpoint.widths, plan.widths, plan.layers, importance=importance, dtype=plan.dtype
    )
    config, loads = width_config(
        cut_config(
            read_json(checkpoint.path / CONFIG),
            layout.family,
            checkpoint.layers,
            plan.layers,
            own_code=checkpoint.own_code,
        ),
        layout.family,
        plan.widths,
        tensors,
    )
    _warn(checkpoint, plan, loads)
    write_json(folder / CONFIG, _config(config, plan))
    _copy_beside(checkpoint, folder)
    write_tokenizer(checkpoint.path, folder, lowercase=read_lowercase(checkpoint.path))
    provenance = _provenance(checkpoint, plan, importance)
    if plan.pruning:
        whole = sum(tensor.size for tensor in tensors)
        tensors = pruned_tensors(plan.pruning, tensors, layout.outside)
        saved = whole - sum(tensor.size for tensor in tensors)
        provenance["vocabulary"] = {**plan.pruning.report, "bytes_saved": saved}
        replace_tokenizer(folder, plan.pruning.tokenizer, plan.pruning.ids)
    write_tensors(folder / WEIGHTS, tensors)
    _write_modules(checkpoint, plan, folder)
    write_json(folder / PROVENANCE, provenance)
    try:
        return open_checkpoint(folder, trust_remote_code=checkpoint.own_code)
    except CheckpointError as error:  # the folder is a temporary one, which nobody will find
        reason = str(error).replace(str(folder), "it")
        raise CheckpointError(
            f"the sub-model of {checkpoint.path} cannot be read back: {reason}"
        ) from error


def _warn(checkpoint: Checkpoint, plan: _Plan, loads: bool) -> None:
    if plan.trained is False:
        warnings.warn(
            f"({plan.layers}, {plan.dim}) is not in the trained grid of {checkpoint.path}; measure "
            "it before use.",
            UntrainedWarning,
            stacklevel=5,
        )
    if not loads:
        warnings.warn(
            f"no config.json of {checkpoint.model_type} can state these widths, so transformers "
            "and sentence-transformers will refuse this sub-model; build, profile and bundle take "
            "it.",
            LoadingWarning,
            stacklevel=5,
        )


def _config(cut: Mapping[str, Any], plan: _Plan) -> dict[str, Any]:
    config = {key: value for key, value in cut.items() if key != RAW_LAST_STATE}
    if plan.final_norm == "skipped":
        config[RAW_LAST_STATE] = False
    if plan.dtype:
        config.pop("torch_dtype", None)
        config["dtype"] = _TORCH_DTYPES[plan.dtype]
    return config | dict(plan.pruning.config if plan.pruning else {})


def _copy_beside(checkpoint: Checkpoint, folder: Path) -> None:
    """Copy what goes along as it is: licences, and the model's code where it has its own."""
    code = checkpoint.path.glob("*.py") if checkpoint.own_code else ()
    for path in (*code, *checkpoint.licenses):
        shutil.copyfile(path, folder / path.name)


def _write_modules(checkpoint: Checkpoint, plan: _Plan, folder: Path) -> None:
    modules = Modules(
        transformer=folder,
        max_length=checkpoint.max_length,
        raw_output=plan.final_norm == "skipped",
        latent=checkpoint.latent,
        pooling=checkpoint.pooling,
        head=checkpoint.head,
        normalized=plan.normalize,
        without_pooler=_lacks_pooler(checkpoint),
    )
    write_modules(modules, checkpoint.hidden, dim=plan.dim, dtype=plan.dtype)
    write_json(folder / SENTENCE_CONFIG, _sentence_config(checkpoint, plan))


def _lacks_pooler(checkpoint: Checkpoint) -> bool:
    """Say whether a class that can do without BERT's pooler has no weights for it."""
    stored = any(name.startswith("pooler.") for name in checkpoint.layout.outside)
    if stored or checkpoint.own_code:
        return False
    return "add_pooling_layer" in inspect.signature(bare_class(checkpoint.model_type)).parameters


def _sentence_config(checkpoint: Checkpoint, plan: _Plan) -> dict[str, Any]:
    config: dict[str, Any] = {
        "model_type": "SentenceTransformer",
        "prompts": dict(checkpoint.prompts),
        "default_prompt_name": checkpoint.default_prompt,
        "similarity_fn_name": checkpoint.similarity,
    }
    if plan.final_norm == "skipped":
        # Older versions would apply the norm and say nothing.
        config["requirements"] = {"transformers": _RAW_STATE_SINCE}
    return config


def _provenance(
    checkpoint: Checkpoint, plan: _Plan, importance: Importance | None
) -> dict[str, Any]:
    narrower = checkpoint.widths and plan.widths != checkpoint.widths.first(plan.layers)
    grid = None if narrower else checkpoint.trained
    return {
        "format": _FORMAT,
        "layers": plan.layers,
        "dim": plan.dim,
        "widths": plan.widths and asdict(plan.widths),
        "reordered_by": importance and importance.texts_sha256,
        "final_norm": plan.final_norm,
        "trained": plan.trained,
        "trained_grid": grid and [[n, d] for n, d in grid if n <= plan.layers and d <= plan.dim],
        "sliced_from": checkpoint.weights_sha256,
    }
