"""Checkpoints that need a step before they can be sliced: pickles, LoRA adapters, text towers.

The result is an ordinary checkpoint folder in the cache, made once and found again by its content:
``$M2DEXPORT_CACHE``, or ``~/.cache/m2dexport``.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from m2dexport.checkpoint.jsonfile import read_object, write_json
from m2dexport.checkpoint.lora import merged_tensors, read_adapter
from m2dexport.checkpoint.st_write import write_latent_modules
from m2dexport.checkpoint.tensors import (
    INDEX,
    WEIGHTS,
    NewTensor,
    StoredTensor,
    copied,
    new_tensor,
    stored_tensors,
    write_tensors,
)
from m2dexport.checkpoint.tokenizer import append_eos
from m2dexport.checkpoint.towers import Tower
from m2dexport.errors import CheckpointError
from m2dexport.files import atomic_folder, sha256_of

_PICKLE = "pytorch_model*.bin"
_ADAPTER = "adapter_config.json"
_FORMAT = 1  # of the folders in the cache; raised when what is written changes


def needs_conversion(folder: Path) -> bool:
    """Say whether a folder of a checkpoint has pickled weights where safetensors are needed."""
    return any(_pickled_folders(folder))


def converted(folder: Path) -> Path:
    """Return a copy of a checkpoint folder with its pickled weights as safetensors.

    torch's restricted unpickler reads them, which builds tensors and runs no code.

    Raises:
        CheckpointError: when a file holds more than tensors.
    """
    pickles = [path for part in _pickled_folders(folder) for path in sorted(part.glob(_PICKLE))]
    target = _cached("safetensors", [sha256_of(path) for path in pickles], [folder])
    if target.exists():
        return target
    with atomic_folder(target) as copy:
        _copy_files(folder, copy, ("*.bin",))
        for part in _pickled_folders(folder):
            tensors = [t for path in sorted(part.glob(_PICKLE)) for t in _unpickled(path)]
            write_tensors(copy / part.relative_to(folder) / WEIGHTS, tensors)
    return target


def merged(folder: Path, base: Path) -> Path:
    """Return a checkpoint folder with a LoRA adapter added to its base model's weights.

    Tensors stream from the base to the copy; one is in memory at a time. Everything but the
    weights and config.json comes from the adapter's folder where it has it: its tokenizer, its
    sentence-transformers modules.

    Raises:
        CheckpointError: when the adapter is of a kind that cannot be merged.
    """
    adapter = read_adapter(folder)
    tensors = stored_tensors(base)
    sources = [sha256_of(folder / "adapter_model.safetensors"), sha256_of(folder / _ADAPTER)]
    target = _cached("merged", [*sources, *_stamps(tensors)], [base, folder])
    if target.exists():
        return target
    with atomic_folder(target) as copy:
        for source in (base, folder):
            _copy_files(source, copy, (WEIGHTS, INDEX, "model-*.safetensors", "adapter_*"))
        shutil.copyfile(base / "config.json", copy / "config.json")
        write_tensors(copy / WEIGHTS, merged_tensors(tensors, adapter, folder))
    return target


def extracted(folder: Path, tower: Tower) -> Path:
    """Return a checkpoint folder that holds a text tower alone.

    NV-Embed's latent attention comes along, as a module of the folder, and its tokenizer ends every
    text in the token that the model's code appends.
    """
    tensors = stored_tensors(folder)
    target = _cached("tower", _stamps(tensors), [folder])
    if target.exists():
        return target
    with atomic_folder(target) as copy:
        _copy_files(folder, copy, (WEIGHTS, INDEX, "model-*.safetensors", "*processor_config.json"))
        write_json(copy / "config.json", dict(tower.config))
        names = tower.names(tensors)
        write_tensors(copy / WEIGHTS, [copied(tensors[old], new) for old, new in names.items()])
        if tower.latent_heads is not None:
            latent = [copied(tensors[o], n) for o, n in tower.latent_names(tensors).items()]
            write_latent_modules(copy, tower.config["hidden_size"], tower.latent_heads, latent)
            append_eos(copy)
    return target


def base_of(folder: Path) -> str | None:
    """Return what an adapter folder names as its base model, or None when it is no adapter."""
    path = folder / _ADAPTER
    if not path.exists():
        return None
    base = read_object(path).get("base_model_name_or_path")
    if not isinstance(base, str):
        raise CheckpointError(f"{path} names no base_model_name_or_path.")
    return base


def _pickled_folders(folder: Path) -> Iterator[Path]:
    for part in (folder, *sorted(p for p in folder.iterdir() if p.is_dir())):
        safe = any((part / name).exists() for name in (WEIGHTS, INDEX, "adapter_model.safetensors"))
        if not safe and any(part.glob(_PICKLE)):
            yield part


def _cached(kind: str, sources: Sequence[str], folders: Sequence[Path]) -> Path:
    """Return a place in the cache that changes with the sources and with every JSON file."""
    root = os.environ.get("M2DEXPORT_CACHE") or Path.home() / ".cache" / "m2dexport"
    small = [sha256_of(path) for folder in folders for path in sorted(folder.rglob("*.json"))]
    digest = hashlib.sha256(":".join([str(_FORMAT), *sources, *small]).encode())
    return Path(root) / f"{kind}-{digest.hexdigest()[:32]}"


def _stamps(tensors: Mapping[str, StoredTensor]) -> list[str]:
    """Return what changes when a file of weights does, without reading it."""
    stats = [path.stat() for path in {tensor.path for tensor in tensors.values()}]
    return sorted(f"{stat.st_mtime_ns}:{stat.st_size}" for stat in stats)


def _copy_files(source: Path, target: Path, skipped: Sequence[str]) -> None:
    """Copy a checkpoint folder and the modules in it, without some files of its top level."""

    def ignored(folder: str, names: list[str]) -> set[str]:
        others = {n for n in names if n.startswith(".") or n in ("onnx", "openvino")}
        top = Path(folder) == source
        return others | {n for n in names if top and any(fnmatch(n, p) for p in skipped)}

    shutil.copytree(source, target, ignore=ignored, dirs_exist_ok=True)


def _unpickled(path: Path) -> Iterator[NewTensor]:
    import pickle

    import torch

    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise CheckpointError(
            f"{path} is damaged, or holds more than tensors; it is not loaded."
        ) from error
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path} does not hold a dictionary of tensors.")
    for name, value in sorted(state.items()):
        if isinstance(value, torch.Tensor):
            yield _new(str(name), value)


def _new(name: str, value: Any) -> NewTensor:
    import ml_dtypes
    import torch

    if value.dtype == torch.bfloat16:  # numpy knows it only through ml_dtypes
        return new_tensor(
            name, value.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        )
    return new_tensor(name, value.contiguous().numpy())
