"""Checkpoints that need a step before they can be sliced: pickles, LoRA adapters, text towers.

The result is an ordinary checkpoint folder in the cache, made once and found again by its content:
see ``cache_folder``.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from m2dexport.checkpoint.hf_config import CONFIG
from m2dexport.checkpoint.jsonfile import read_object, write_json
from m2dexport.checkpoint.lora import ADAPTER, ADAPTER_CONFIG, merged_tensors, read_adapter
from m2dexport.checkpoint.st_modules import listed_modules
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
from m2dexport.errors import CheckpointError, M2DError
from m2dexport.files import atomic_folder, sha256_of

OTHER_FORMATS = ("*.onnx", "*.h5", "*.msgpack", "*.ot", "*.gguf")  # of weights, on the hub
_UNREAD = (*OTHER_FORMATS, "*.bin", "*.pt")
_SAFETENSORS = "*.safetensors*"  # and their index
_PICKLED_ADAPTER = "adapter_model.bin"
_FORMAT = 1  # of the folders in the cache; raised when what is written changes


def pickles(folder: Path) -> dict[Path, list[Path]]:
    """Return the pickles of a checkpoint that stand where safetensors are needed.

    Only the files of the model, of an adapter and of the modules that modules.json names are looked
    at.

    Returns:
        Where a safetensors file is needed -> the pickles that hold its tensors.
    """
    found = {}
    adapter = (folder / ADAPTER_CONFIG).exists()
    if adapter and not (folder / ADAPTER).exists() and (folder / _PICKLED_ADAPTER).exists():
        found[folder / ADAPTER] = [folder / _PICKLED_ADAPTER]
    parts = dict.fromkeys([folder, *(path for _, path in listed_modules(folder))])
    for part in parts:
        whole, shards = part / "pytorch_model.bin", sorted(part.glob("pytorch_model-*.bin"))
        stored = [whole] if whole.exists() else shards  # the loader's order
        safe = any((part / name).exists() for name in (WEIGHTS, INDEX))
        if stored and not safe and not (adapter and part == folder):
            found[part / WEIGHTS] = stored
    return found


def converted(folder: Path, found: Mapping[Path, Sequence[Path]]) -> Path:
    """Return a copy of a checkpoint folder with its pickles, from ``pickles``, as safetensors.

    torch's restricted unpickler reads them, which builds tensors and runs no code.

    Raises:
        CheckpointError: when a file holds more than tensors, or tensors of an unknown type.
    """
    sources = [sha256_of(path) for paths in found.values() for path in paths]

    def write(copy: Path) -> None:
        for target, paths in found.items():
            tensors = [tensor for path in paths for tensor in _unpickled(path)]
            made = copy / target.relative_to(folder)
            made.parent.mkdir(parents=True, exist_ok=True)
            write_tensors(made, tensors)

    return _made("safetensors", sources, _files(folder), write)


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
    sources = [sha256_of(folder / name) for name in (ADAPTER, ADAPTER_CONFIG)]
    files = _files(base, _SAFETENSORS) | _files(folder, _SAFETENSORS, "adapter_*", CONFIG)

    def write(copy: Path) -> None:
        write_tensors(copy / WEIGHTS, merged_tensors(tensors, adapter, folder))

    return _made("merged", [*sources, *_stamps(tensors)], files, write)


def extracted(folder: Path, tower: Tower) -> Path:
    """Return a checkpoint folder that holds only a text tower.

    NV-Embed's latent attention comes along, as a module of the folder, and its tokenizer ends every
    text in the token that the model's code appends.
    """
    tensors = stored_tensors(folder)
    files = _files(folder, _SAFETENSORS, "*processor_config.json")

    def write(copy: Path) -> None:
        write_json(copy / CONFIG, dict(tower.config))
        names = tower.names(tensors)
        write_tensors(copy / WEIGHTS, [copied(tensors[old], new) for old, new in names.items()])
        if tower.latent_heads is not None:
            latent = [copied(tensors[o], n) for o, n in tower.latent_names(tensors).items()]
            write_latent_modules(copy, tower.config["hidden_size"], tower.latent_heads, latent)
            append_eos(copy)

    return _made("tower", _stamps(tensors), files, write)


def base_of(folder: Path) -> str | None:
    """Return what an adapter folder names as its base model, or None when it is not an adapter."""
    path = folder / ADAPTER_CONFIG
    if not path.exists():
        return None
    base = read_object(path).get("base_model_name_or_path")
    if not isinstance(base, str):
        raise CheckpointError(f"{path} names no base_model_name_or_path.")
    return base


def _made(
    kind: str, sources: Sequence[str], files: Mapping[str, Path], write: Callable[[Path], None]
) -> Path:
    """Return a folder of the cache, made unless it is there already.

    Of several processes that make it at once, the first to finish is taken.

    Args:
        kind: what its name starts with.
        sources: what changes when the weights do.
        files: what is copied, contents only (in a copy of a read-only file nothing could be
            replaced): name in the folder -> file.
        write: writes the rest.
    """
    copied_files = [f"{name}={sha256_of(path)}" for name, path in sorted(files.items())]
    digest = hashlib.sha256(":".join([str(_FORMAT), *sources, *copied_files]).encode())
    target = cache_folder() / f"{kind}-{digest.hexdigest()[:32]}"
    if target.exists():
        return target
    try:
        with atomic_folder(target) as copy:
            for name, path in files.items():
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy / name)
            write(copy)
    except CheckpointError:
        raise
    except M2DError:
        if not target.is_dir():
            raise
    return target


def cache_folder() -> Path:
    """Return where converted checkpoints are kept.

    That is ``$M2DEXPORT_CACHE``, else ``m2dexport`` in ``$XDG_CACHE_HOME`` or ``~/.cache``, else,
    for a user without a home, a temporary folder that is this user's own.

    Raises:
        M2DError: when the temporary folder is somebody else's.
    """
    if named := os.environ.get("M2DEXPORT_CACHE"):
        return Path(named)
    if caches := os.environ.get("XDG_CACHE_HOME"):
        return Path(caches) / "m2dexport"
    with contextlib.suppress(RuntimeError):  # an unknown user, and no $HOME
        return Path.home() / ".cache" / "m2dexport"
    own = Path(tempfile.gettempdir()) / f"m2dexport-{os.getuid()}"
    own.mkdir(mode=0o700, exist_ok=True)
    if own.is_symlink() or own.stat().st_uid != os.getuid():
        raise M2DError(f"{own} is not this user's; name a folder for the cache in M2DEXPORT_CACHE.")
    return own


def _stamps(tensors: Mapping[str, StoredTensor]) -> list[str]:
    """Return what changes when a file of weights does, without reading it."""
    stats = [path.stat() for path in {tensor.path for tensor in tensors.values()}]
    return sorted(f"{stat.st_mtime_ns}:{stat.st_size}" for stat in stats)


def _files(folder: Path, *skipped: str) -> dict[str, Path]:
    """Return the files of a checkpoint and of its modules, by their names within its folder.

    Weights in other formats, hidden files and, of the folder's top, ``skipped`` are left out.
    """
    found = {}
    for part in dict.fromkeys([folder, *(path for _, path in listed_modules(folder))]):
        left_out = (".*", *_UNREAD, *(skipped if part == folder else ()))
        for path in part.iterdir() if part.is_dir() else ():  # a missing one is said when needed
            if path.is_file() and not any(fnmatch(path.name, pattern) for pattern in left_out):
                found[path.relative_to(folder).as_posix()] = path
    return found


def _unpickled(path: Path) -> Iterator[NewTensor]:
    import torch

    mapped = zipfile.is_zipfile(path)  # files of torch before 1.6 cannot be
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # what a damaged archive makes torch raise is not documented
        raise CheckpointError(
            f"{path} is damaged, or holds more than tensors; it is not loaded."
        ) from error
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path} does not hold a dictionary of tensors.")
    for name, value in sorted(state.items()):
        if isinstance(value, torch.Tensor):
            yield _new(path, str(name), value)


def _new(path: Path, name: str, value: Any) -> NewTensor:
    import ml_dtypes
    import torch

    views = {  # numpy knows these only through ml_dtypes
        torch.bfloat16: (torch.int16, ml_dtypes.bfloat16),
        torch.float8_e4m3fn: (torch.uint8, ml_dtypes.float8_e4m3fn),
        torch.float8_e5m2: (torch.uint8, ml_dtypes.float8_e5m2),
    }
    plain = value.layout == torch.strided and not value.is_quantized and not value.is_complex()
    if not plain or (value.dtype not in views and not _known_to_numpy(value.dtype)):
        kind = "sparse" if value.layout != torch.strided else str(value.dtype)
        raise CheckpointError(
            f"{path} holds {name!r} as a {kind} tensor, which cannot be converted; save the model "
            "in float32, float16 or bfloat16."
        )
    if value.dtype in views:
        as_bits, dtype = views[value.dtype]
        return new_tensor(name, value.contiguous().view(as_bits).numpy().view(dtype))
    return new_tensor(name, value.contiguous().numpy())


def _known_to_numpy(dtype: Any) -> bool:
    import torch

    try:
        torch.empty(0, dtype=dtype).numpy()
    except (TypeError, RuntimeError):
        return False
    return True
