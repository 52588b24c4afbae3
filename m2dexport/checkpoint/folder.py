"""Find a checkpoint's folder, and turn adapters, pickles and larger models into ordinary ones."""

from __future__ import annotations

from pathlib import Path

from m2dexport.checkpoint.convert import (
    OTHER_FORMATS,
    base_of,
    converted,
    extracted,
    merged,
    pickles,
)
from m2dexport.checkpoint.hf_config import CONFIG
from m2dexport.checkpoint.lora import ADAPTER_CONFIG
from m2dexport.checkpoint.tensors import INDEX, WEIGHTS, stored_tensors
from m2dexport.checkpoint.towers import find_tower
from m2dexport.data import default_checkpoint
from m2dexport.errors import CheckpointError, UsageError, one_line

#: Files of a hub's model that are not read. Of onnx/, model_config.json is: it may list depths.
NOT_FETCHED = ("onnx/[!m]*", "onnx/*/*", "onnx/*data", "openvino/*", *OTHER_FORMATS, "*.onnx_data")


def checkpoint_folder(model: str | Path | None, *, allow_pickle: bool) -> tuple[Path, list[str]]:
    """Return a local folder of a text model in safetensors, made from what was named if need be.

    Args:
        model: a folder, a hub id, or None for the checkpoint that ships.
        allow_pickle: read pickled weights with torch's restricted unpickler.

    Returns:
        The folder, and sentences about what was taken or left out.

    Raises:
        UsageError: when there is neither such a folder nor such a hub id.
        CheckpointError: when it cannot be turned into an ordinary checkpoint.
    """
    return _prepared(_local_folder(model), allow_pickle, ())


def _prepared(
    origin: Path, allow_pickle: bool, adapters: tuple[Path, ...]
) -> tuple[Path, list[str]]:
    """Return what ``checkpoint_folder`` does, for a local folder.

    ``adapters`` are those that were found on the way to this folder, their base model.
    """
    folder = _converted(origin, allow_pickle)
    base_name = base_of(folder)
    if base_name is not None:
        adapters = (*adapters, origin.resolve())
        base = _base_folder(origin, base_name)
        if base.resolve() in adapters:
            raise CheckpointError(
                f"{origin / ADAPTER_CONFIG} names {base_name!r} as its base model, which leads "
                "back to the same adapter; name the model that it was trained on."
            )
        base_folder, notes = _prepared(base, allow_pickle, adapters)
        merged_folder = merged(folder, base_folder)
        return merged_folder, [*notes, f"the adapter was merged into {base} at {merged_folder}."]
    if not any((folder / name).exists() for name in (WEIGHTS, INDEX)):
        return folder, []  # what is missing is said when it is needed
    stored = list(stored_tensors(folder))
    wrapped = next((name for name in stored if ".base_layer." in name), None)
    if wrapped is not None:
        raise CheckpointError(
            f"{origin} holds a whole model under peft's names, such as {wrapped}; load it with "
            "peft and save what merge_and_unload() returns."
        )
    tower = find_tower(folder, stored)
    if tower is None:
        return folder, []
    return extracted(folder, tower), [f"{tower.note}."]


def _base_folder(adapter: Path, name: str) -> Path:
    """Return the folder of an adapter's base model.

    A relative path was written in the folder where training ran: the adapter's, this one, or one
    that holds the adapter's.
    """
    for place in (adapter, Path(), *adapter.resolve().parents):
        if any((place / name / file).is_file() for file in (CONFIG, ADAPTER_CONFIG)):
            return place / name
    try:
        return _local_folder(name)
    except UsageError as error:
        raise CheckpointError(
            f"{adapter / ADAPTER_CONFIG} names a base model that is not at hand: {error} Correct "
            "its base_model_name_or_path."
        ) from error


def _converted(folder: Path, allow_pickle: bool) -> Path:
    found = pickles(folder)
    if not found:
        return folder
    if not allow_pickle:
        raise CheckpointError(
            f"{next(iter(found.values()))[0]} is a pickle, which can run code when loaded, and no "
            "safetensors file stands in its place; convert it, or pass --allow-pickle to read it "
            "with torch's restricted unpickler."
        )
    return converted(folder, found)


def _local_folder(model: str | Path | None) -> Path:
    if model is None:
        return default_checkpoint()
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

    try:
        return Path(snapshot_download(hub_id, ignore_patterns=list(NOT_FETCHED)))
    except HFValidationError as error:
        raise UsageError(f"{hub_id!r} is neither a folder nor a hub id.") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        cause: BaseException = error
        while cause.__cause__ is not None:  # the hub's own errors wrap what went wrong
            cause = cause.__cause__
        raise UsageError(
            f"{hub_id!r} is not a folder here and could not be fetched from the hub "
            f"({one_line(cause)}); check the name and the network."
        ) from error
