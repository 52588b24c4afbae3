"""config.json: what transformers reads from it, what is refused, and how it is cut in depth."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from m2dexport.checkpoint.families import FAMILIES, Family, bare_class
from m2dexport.checkpoint.jsonfile import read_json
from m2dexport.checkpoint.tensors import INDEX, PLAIN_FLOATS, WEIGHTS, stored_tensors
from m2dexport.errors import CheckpointError, one_line

_MAX_LAYERS = 10_000
CONFIG = "config.json"
RAW_LAST_STATE = "tie_last_hidden_states"  # transformers >= 5.18; false: hidden_states[-1] is raw


def read_config(folder: Path, *, trust_remote_code: bool) -> Any:
    """Return transformers' view of config.json, which knows the defaults and aliases of its keys.

    Raises:
        CheckpointError: when it is missing, unknown to transformers, or of a refused kind.
    """
    from transformers import AutoConfig

    raw = read_json(folder / CONFIG)
    if not isinstance(raw, dict) or not isinstance(raw.get("model_type"), str):
        raise CheckpointError(f"{folder / CONFIG} names no model_type.")
    _refuse(folder, raw, trust_remote_code)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # a config class may raise anything about a value it dislikes
        raise CheckpointError(
            f"transformers cannot read {folder / CONFIG} of model type {raw['model_type']!r}: "
            f"{one_line(error)}"
        ) from error
    for key in ("num_hidden_layers", "hidden_size", "vocab_size"):
        value = getattr(config, key, None)
        if not isinstance(value, int):
            raise CheckpointError(
                f"model type {raw['model_type']!r} has no {key}, so it is not a text model that "
                "can be cut in depth."
            )
        if value < 1:
            raise CheckpointError(f"{folder / CONFIG} states a {key} of {value}, which is below 1.")
    return config


def _refuse(folder: Path, raw: Mapping[str, Any], trust_remote_code: bool) -> None:
    import transformers
    from packaging.version import Version

    if "quantization_config" in raw:
        _refuse_quantized(folder)
    for key, value in raw.items():  # transformers makes lists of this length when it reads them
        if "layer" in key and isinstance(value, int) and value > _MAX_LAYERS:
            raise CheckpointError(
                f"{folder / CONFIG} states a {key} of {value}, where {_MAX_LAYERS:,} is the most "
                "that is read; correct it."
            )
    if not trust_remote_code:
        _refuse_code(folder, raw)
    elif not is_native(raw["model_type"]) and _code_reference(raw) is None:
        raise CheckpointError(
            f"transformers does not know the model type {raw['model_type']!r} of {folder}, whose "
            "auto_map names no AutoModel."
        )
    if raw.get("is_causal") is False and Version(transformers.__version__) < Version("5.2"):
        raise CheckpointError(
            f"{folder} attends in both directions (is_causal is false), which transformers "
            f"{transformers.__version__} ignores; install transformers 5.2 or newer."
        )


def _refuse_quantized(folder: Path) -> NoReturn:
    """Refuse what config.json says is quantized, and say where its weights are not."""
    stored = any((folder / name).exists() for name in (WEIGHTS, INDEX))
    types = {tensor.dtype for tensor in stored_tensors(folder).values()} if stored else set()
    if types and types <= set(PLAIN_FLOATS):
        raise CheckpointError(
            f"{folder / CONFIG} has a quantization_config, and no stored weight is quantized (they "
            f"are {', '.join(sorted(types))}); remove it, if the weights are those of the "
            "unquantized model."
        )
    raise CheckpointError(
        f"{folder} has quantized weights; slice the checkpoint that it was quantized from."
    )


def _refuse_code(folder: Path, raw: Mapping[str, Any]) -> None:
    """Refuse a model whose own code says what it computes, where that code may not run."""
    import transformers

    model_type, reference = raw["model_type"], _code_reference(raw)
    if not is_native(model_type):
        raise CheckpointError(
            f"transformers {transformers.__version__} does not know the model type {model_type!r} "
            f"of {folder}; "
            + (
                "it brings code of its own, which runs only with --trust-remote-code."
                if "auto_map" in raw
                else "install a newer transformers."
            )
        )
    if reference and not FAMILIES.get(model_type, Family(())).replaces_code:
        raise CheckpointError(
            f"{folder} brings its own code for the model ({reference}, by auto_map in "
            f"{CONFIG}), which may compute otherwise than transformers' {model_type}; "
            "run it with --trust-remote-code, or remove auto_map to run transformers' own class."
        )


def has_own_code(folder: Path) -> bool:
    """Say whether a checkpoint's config.json names code of its own as its model."""
    return _code_reference(read_json(folder / CONFIG)) is not None


def _code_reference(raw: Mapping[str, Any]) -> str | None:
    """Return "module.Class" of a checkpoint's own model, or None when transformers has its class.

    Of auto_map, AutoModel's entry only decides which class embeds.
    """
    auto_map = raw.get("auto_map")
    reference = auto_map.get("AutoModel") if isinstance(auto_map, dict) else None
    return reference if isinstance(reference, str) else None


def model_class(folder: Path, model_type: str, *, own_code: bool) -> Any:
    """Return the class of a checkpoint's bare model: transformers', or the code that it brings.

    Raises:
        CheckpointError: when its code cannot be imported.
    """
    if not own_code:
        return bare_class(model_type)
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    reference = _code_reference(read_json(folder / CONFIG))
    try:
        return get_class_from_dynamic_module(reference, folder)
    except Exception as error:  # code of anybody may raise anything
        raise CheckpointError(
            f"the code of {folder} ({reference}) cannot be loaded: {one_line(error)}"
        ) from error


def is_native(model_type: str) -> bool:
    """Say whether transformers has a model type without code from the checkpoint."""
    return bare_class(model_type) is not None


def cut_config(
    raw: Mapping[str, Any], family: Family, whole: int, layers: int, *, own_code: bool
) -> dict[str, Any]:
    """Return config.json for the first ``layers`` of ``whole`` layers.

    Lists with one entry per layer are cut, too: a list left at full length makes transformers
    raise, or give a layer the wrong kind of attention.

    Raises:
        CheckpointError: when groups of layers that share weights cannot be cut there.
    """
    new = dict(raw)
    keys = [key for key in family.depth_keys if key in raw] or [family.depth_keys[0]]
    new.update(dict.fromkeys(keys, layers))
    per_layer = family.per_layer
    if family.inferred:
        per_layer = tuple(key for key, value in raw.items() if _per_layer(key, value, whole))
    for key in per_layer:
        if isinstance(raw.get(key), list):
            new[key] = raw[key][:layers]
    if family.groups_key:
        new[family.groups_key] = _groups(raw, family.groups_key, whole, layers)
    if not own_code:
        new["architectures"] = [bare_class(raw["model_type"]).__name__]  # task heads are left out
        new.pop("auto_map", None)  # transformers' own code is what was measured
    return new


def _per_layer(key: str, value: Any, whole: int) -> bool:
    return "layer" in key and isinstance(value, list) and len(value) == whole


def _groups(raw: Mapping[str, Any], key: str, whole: int, layers: int) -> int:
    groups = int(raw.get(key, 1))
    size = whole // groups
    if layers > size and layers % size:
        raise CheckpointError(
            f"{groups} groups of {size} layers share weights, so --layers {layers} would change "
            f"which layer uses which group; choose a multiple of {size}, or fewer than {size}."
        )
    return -(-layers // size)
