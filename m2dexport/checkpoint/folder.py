"""Find a checkpoint's folder, and turn adapters, pickles and larger models into ordinary ones."""

from __future__ import annotations

import importlib.resources
from pathlib import Path

from m2dexport.checkpoint.convert import base_of, converted, extracted, merged, needs_conversion
from m2dexport.checkpoint.tensors import INDEX, WEIGHTS, stored_tensors
from m2dexport.checkpoint.towers import find_tower
from m2dexport.errors import CheckpointError, UsageError


def checkpoint_folder(model: str | Path | None, *, allow_pickle: bool, assumed: list[str]) -> Path:
    """Return a local folder of a text model in safetensors, made from what was named if need be.

    Args:
        model: a folder, a hub id, or None for the checkpoint that ships.
        allow_pickle: read pickled weights with torch's restricted unpickler.
        assumed: sentences about what was taken or left out are appended to it.

    Raises:
        UsageError: when there is neither such a folder nor such a hub id.
        CheckpointError: when it cannot be turned into an ordinary checkpoint.
    """
    return _prepared(_local_folder(model), allow_pickle, assumed)


def _prepared(folder: Path, allow_pickle: bool, assumed: list[str]) -> Path:
    """Return the folder, or one made from it: a text model in safetensors without an adapter."""
    base_name = base_of(folder)
    if base_name is not None:
        base = folder / base_name if (folder / base_name).is_dir() else _local_folder(base_name)
        merged_folder = merged(folder, _prepared(base, allow_pickle, assumed))
        assumed.append(f"the adapter was merged into {base_name} at {merged_folder}.")
        return merged_folder
    if needs_conversion(folder):
        folder = _converted(folder, allow_pickle)
    if not any((folder / name).exists() for name in (WEIGHTS, INDEX)):
        return folder  # what is missing is told when it is needed
    tower = find_tower(folder, list(stored_tensors(folder)))
    if tower is None:
        return folder
    assumed.append(f"{tower.note}.")
    return extracted(folder, tower)


def _converted(folder: Path, allow_pickle: bool) -> Path:
    if not allow_pickle:
        raise CheckpointError(
            f"{folder} has pickled weights alone, which can run code when loaded; convert them to "
            "safetensors, or pass --allow-pickle to read them with torch's restricted unpickler."
        )
    return converted(folder)


def _local_folder(model: str | Path | None) -> Path:
    if model is None:
        return Path(str(importlib.resources.files("m2dexport"))) / "data" / "checkpoint"
    path = Path(model)
    if path.is_dir():
        return path
    text = str(model)
    if path.exists():
        raise UsageError(f"{text} is a file; name the folder of a checkpoint.")
    if isinstance(model, Path) or text.count("/") > 1 or text.startswith((".", "/", "~")):
        raise UsageError(f"{text} does not exist; name a checkpoint folder or a hub id.")
    return _download(text)


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    ignored = ["onnx/*", "openvino/*", "*.onnx", "*.h5", "*.msgpack", "*.ot", "*.gguf"]
    try:
        return Path(snapshot_download(hub_id, ignore_patterns=ignored))
    except HFValidationError as error:
        raise UsageError(f"{hub_id!r} is neither a folder nor a hub id.") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UsageError(
            f"{hub_id!r} is no folder here and could not be fetched from the hub; check the name "
            "and the network."
        ) from error
