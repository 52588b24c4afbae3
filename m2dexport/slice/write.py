"""Write one sub-model: its weights, config, tokenizer, modules and provenance."""

from __future__ import annotations

import inspect
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from m2dexport.checkpoint.families import bare_class
from m2dexport.checkpoint.hf_config import CONFIG, RAW_LAST_STATE, cut_config
from m2dexport.checkpoint.jsonfile import read_json, read_object, write_json
from m2dexport.checkpoint.open import Checkpoint, FinalNorm, open_checkpoint
from m2dexport.checkpoint.st_modules import SENTENCE_CONFIG, Modules, read_lowercase
from m2dexport.checkpoint.st_write import write_modules
from m2dexport.checkpoint.static import TABLE, read_table, static_tokenizer_json, write_static
from m2dexport.checkpoint.tensors import FLOAT_NAMES, WEIGHTS, write_tensors
from m2dexport.checkpoint.tokenizer import replace_tokenizer, state_length, write_tokenizer
from m2dexport.checkpoint.widths import Importance, Widths, cut_tensors, width_config
from m2dexport.errors import CheckpointError
from m2dexport.files import PROVENANCE
from m2dexport.slice.aligned import Alignment
from m2dexport.slice.pruning import PruningPlan, pruned_tensors

_FORMAT = 1
_RAW_STATE_SINCE = ">=5.18"
_TORCH_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class UntrainedWarning(UserWarning):
    """The (layers, dim) asked for is not one that training visited."""


class UnalignedWarning(UserWarning):
    """A map is cut to fewer dims than it was fitted for."""


class LoadingWarning(UserWarning):
    """transformers has no setting for the widths asked for; only m2dexport loads the sub-model."""


@dataclass(frozen=True)
class Plan:
    """One sub-model to be made, every value checked."""

    layers: int
    dim: int
    dtype: str | None  # "F32", "F16" or "BF16"; None keeps the stored types
    final_norm: FinalNorm
    widths: Widths | None  # None: of a family whose layers are not in the table
    trained: bool | None  # None: the trained grid is unknown
    normalize: bool  # end in Normalize
    pruning: PruningPlan | None


def written(
    checkpoint: Checkpoint,
    plan: Plan,
    importance: Importance | None,
    folder: Path,
    alignment: Alignment | None,
) -> Checkpoint:
    """Write one sub-model into a folder, and describe it as any reader of that folder would."""
    folder.mkdir(exist_ok=True)
    _copy_beside(checkpoint, folder)
    provenance = _provenance(checkpoint, plan, importance)
    if alignment is not None:
        provenance["alignment"] = alignment.provenance(plan.layers, plan.dim)
    elif checkpoint.speaks and plan.dim < checkpoint.dim:
        warnings.warn(
            f"the map was fitted for {checkpoint.dim} dims and is cut to {plan.dim}: the result "
            "does not speak the full model's space; align the whole checkpoint at that dim to "
            "query its index.",
            UnalignedWarning,
            stacklevel=4,
        )
    elif checkpoint.speaks:
        provenance["alignment"] = _kept_alignment(checkpoint)
    if plan.layers == 0:
        saved = _write_static(checkpoint, plan, folder, alignment)
    else:
        saved = _write_layers(checkpoint, plan, importance, folder)
        _write_modules(checkpoint, plan, folder, alignment)
    if plan.pruning:
        provenance["vocabulary"] = {**plan.pruning.report, "bytes_saved": saved}
    write_json(folder / PROVENANCE, provenance)
    try:
        found = open_checkpoint(folder, trust_remote_code=checkpoint.own_code)
        if "alignment" in provenance:
            provenance["alignment"]["weights_sha256"] = found.weights_sha256
            write_json(folder / PROVENANCE, provenance)
        return found
    except CheckpointError as error:  # the folder is a temporary one, which nobody will find
        reason = str(error).replace(str(folder), "it")
        raise CheckpointError(
            f"the sub-model of {checkpoint.path} cannot be read back: {reason}"
        ) from error


def _kept_alignment(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what m2dexport.json says of a map, when the weights are still those it was made for.

    Raises:
        CheckpointError: when they are not.
    """
    stored: dict[str, Any] = read_object(checkpoint.path / PROVENANCE)["alignment"]
    if stored.get("weights_sha256") != checkpoint.weights_sha256:
        raise CheckpointError(
            f"the weights of {checkpoint.path} have changed since its map was fitted; align again "
            "by slicing the whole checkpoint."
        )
    return stored


def _write_layers(
    checkpoint: Checkpoint, plan: Plan, importance: Importance | None, folder: Path
) -> int:
    """Write config.json, the tokenizer and the weights; return the bytes that pruning saves."""
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
    write_tokenizer(checkpoint.path, folder, lowercase=read_lowercase(checkpoint.path))
    saved = 0
    if plan.pruning:
        whole = sum(tensor.size for tensor in tensors)
        tensors = pruned_tensors(plan.pruning, tensors, layout)
        saved = whole - sum(tensor.size for tensor in tensors)
        replace_tokenizer(folder, plan.pruning.tokenizer, plan.pruning.ids)
    state_length(folder, checkpoint.max_length)
    write_tensors(folder / WEIGHTS, tensors)
    return saved


def _write_static(
    checkpoint: Checkpoint, plan: Plan, folder: Path, alignment: Alignment | None
) -> int:
    """Write depth 0: the token table with the map folded into it, or a static model's, cut.

    Returns:
        The bytes that pruning saves.
    """
    dtype = plan.dtype
    if alignment is not None and alignment.table is not None:
        table = alignment.table.folded(alignment.fits[0, plan.dim].map)
        tokenizer = alignment.table.tokenizer
    else:
        stored_table = checkpoint.layout.outside[TABLE]
        table = read_table(stored_table)[:, : plan.dim]
        dtype = dtype or stored_table.dtype
        stored = read_json(checkpoint.path / "tokenizer.json")
        tokenizer = static_tokenizer_json(stored, checkpoint.max_length)
    if dtype is None or dtype not in FLOAT_NAMES.values():
        dtype = "F32"
    write_static(folder, table, tokenizer, _sentence_config(checkpoint, plan), dtype)
    rows, dim = table.shape
    return (checkpoint.vocab_size - int(rows)) * int(dim) * (4 if dtype == "F32" else 2)


def _warn(checkpoint: Checkpoint, plan: Plan, loads: bool) -> None:
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


def _config(cut: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
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


def _write_modules(
    checkpoint: Checkpoint, plan: Plan, folder: Path, alignment: Alignment | None
) -> None:
    modules = Modules(
        transformer=folder,
        max_length=checkpoint.max_length,
        raw_output=plan.final_norm == "skipped",
        latent=checkpoint.latent,
        pooling=checkpoint.pooling,
        head=checkpoint.head,
        normalized=plan.normalize,
        alignment=checkpoint.alignment,
        without_pooler=_lacks_pooler(checkpoint),
    )
    new_map = alignment.fits[plan.layers, plan.dim].map if alignment else None
    write_modules(modules, checkpoint.hidden, dim=plan.dim, dtype=plan.dtype, new_map=new_map)
    write_json(folder / SENTENCE_CONFIG, _sentence_config(checkpoint, plan))


def _lacks_pooler(checkpoint: Checkpoint) -> bool:
    """Say whether a class that can do without BERT's pooler has no weights for it."""
    stored = any(name.startswith("pooler.") for name in checkpoint.layout.outside)
    if stored or checkpoint.own_code:
        return False
    return "add_pooling_layer" in inspect.signature(bare_class(checkpoint.model_type)).parameters


def _sentence_config(checkpoint: Checkpoint, plan: Plan) -> dict[str, Any]:
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
    checkpoint: Checkpoint, plan: Plan, importance: Importance | None
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
