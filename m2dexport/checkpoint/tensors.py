"""Tensors in safetensors files: found without loading, copied block by block, written as they come.

The format is an 8-byte little-endian header length, a JSON header and the raw tensors. Reading and
writing it here, rather than through a library that holds whole files, keeps the memory of every
copy at one block of 16 MiB, whatever the size of the model.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from operator import index as integer
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from m2dexport.errors import CheckpointError, UsageError, one_line

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_BLOCK = 16 << 20
_MAX_HEADER = 100 << 20  # the limit of the safetensors library itself

_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
PLAIN_FLOATS = ("F64", "F32", "F16", "BF16")
FLOATS = (*PLAIN_FLOATS, "F8_E4M3", "F8_E5M2")
FLOAT_NAMES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies in a safetensors file."""

    name: str
    dtype: str  # as safetensors writes it: "F32", "BF16", "I64", ...
    shape: tuple[int, ...]
    path: Path
    start: int  # bytes from the start of the file
    size: int  # bytes

    @property
    def parameters(self) -> int:
        """The number of values."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class NewTensor:
    """One tensor to be written: its header entry, and its values, made when they are written."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    blocks: Callable[[], Iterable[NDArray[Any]]]  # the values in order, in pieces of any shape

    @property
    def size(self) -> int:
        """Bytes of the tensor in the file."""
        return math.prod(self.shape) * _DTYPES[self.dtype].itemsize


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Return every tensor of a checkpoint folder by name, from one safetensors file or its shards.

    Raises:
        CheckpointError: when there is no safetensors file, or one is truncated or corrupt.
    """
    listing = folder / INDEX
    if (folder / WEIGHTS).exists() or not listing.exists():  # in transformers' order
        return tensors_in(folder / WEIGHTS)
    try:
        stored = json.loads(listing.read_text(encoding="utf-8"))["weight_map"]
        weight_map = {str(name): str(shard) for name, shard in stored.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{listing} is not a valid index of shards: {one_line(error)}."
        ) from error
    found: dict[str, StoredTensor] = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard:
            raise CheckpointError(f"{listing} names {shard!r}, which is not a file beside it.")
        found.update(tensors_in(folder / shard))
    missing = sorted(set(weight_map) - set(found))
    if missing:
        raise CheckpointError(f"{listing} names {missing[0]!r}, which no shard holds.")
    return found


def tensors_in(path: Path) -> dict[str, StoredTensor]:
    """Return every tensor of one safetensors file by name, after checking it against the file size.

    Raises:
        CheckpointError: when the file is missing, truncated or corrupt.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise CheckpointError(f"{path} is truncated or not a safetensors file.")
            header = json.loads(stream.read(length), object_pairs_hook=_once)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise CheckpointError(f"{path} is missing.") from error
    except KeyError as error:
        raise CheckpointError(f"{path} is corrupt: its header names {error} twice.") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is corrupt: its header is not JSON.") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} is corrupt: its header is not a JSON object.")
    header.pop("__metadata__", None)
    found = {
        name: _stored(path, name, entry, 8 + length, size) for name, entry in sorted(header.items())
    }
    for before, after in pairwise(sorted(found.values(), key=lambda t: (t.start, t.size))):
        if before.start + before.size > after.start:
            raise CheckpointError(
                f"{path} is corrupt: tensors {before.name!r} and {after.name!r} overlap."
            )
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of a header, whose names must differ."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise KeyError(name)
        found[name] = value
    return found


def _stored(path: Path, name: str, entry: Any, data: int, file_size: int) -> StoredTensor:
    try:
        dtype, shape = entry["dtype"], tuple(integer(n) for n in entry["shape"])
        begin, end = (integer(n) for n in entry["data_offsets"])
        itemsize = _DTYPES[dtype].itemsize
    except (TypeError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{path} is corrupt or of an unknown type: the header entry of {name!r} is not valid."
        ) from error
    size = math.prod(shape) * itemsize
    if begin < 0 or min(shape, default=0) < 0 or end - begin != size or data + end > file_size:
        raise CheckpointError(
            f"{path} is truncated or corrupt: tensor {name!r} does not fit in the file."
        )
    return StoredTensor(name, dtype, shape, path, data + begin, size)


def blocks_of(tensor: StoredTensor, block_size: int = _BLOCK) -> Iterator[NDArray[Any]]:
    """Yield a stored tensor as flat arrays of at most ``block_size`` bytes, 16 MiB by default.

    Raises:
        CheckpointError: when the file ends before the tensor does.
    """
    dtype = _DTYPES[tensor.dtype]
    left = tensor.size
    with tensor.path.open("rb") as stream:
        stream.seek(tensor.start)
        while left:
            block = stream.read(min(left, block_size))
            if not block:
                raise CheckpointError(f"{tensor.path} ends within tensor {tensor.name!r}.")
            left -= len(block)
            yield np.frombuffer(block, dtype)


def row_blocks_of(tensor: StoredTensor) -> Iterator[NDArray[Any]]:
    """Yield a stored matrix as (rows, columns) arrays of about 16 MiB."""
    row = tensor.size // tensor.shape[0]
    for block in blocks_of(tensor, max(1, _BLOCK // row) * row):
        yield block.reshape(-1, *tensor.shape[1:])


def read_tensor(tensor: StoredTensor) -> NDArray[Any]:
    """Return a stored tensor whole, in its own shape and type."""
    flat = np.empty(tensor.parameters, _DTYPES[tensor.dtype])
    position = 0
    for block in blocks_of(tensor):
        flat[position : position + block.size] = block
        position += block.size
    return flat.reshape(tensor.shape)


def copied(
    tensor: StoredTensor, name: str, *, dtype: str | None = None, rows: int | None = None
) -> NewTensor:
    """Return a copy of a stored tensor under a new name.

    Args:
        tensor: what to copy.
        name: its name in the new file.
        dtype: the floating type on the way out, "F32", "F16" or "BF16"; None keeps the stored one,
            and so do tensors that are not floating.
        rows: how many leading rows to keep; None keeps all.
    """
    if rows is not None and rows < tensor.shape[0]:
        size = tensor.size // tensor.shape[0] * rows
        tensor = replace(tensor, shape=(rows, *tensor.shape[1:]), size=size)
    target = dtype if dtype and tensor.dtype in FLOATS else tensor.dtype
    if target == tensor.dtype:
        return NewTensor(name, target, tensor.shape, lambda: blocks_of(tensor))
    return NewTensor(name, target, tensor.shape, lambda: _converted(tensor, target))


def selected(
    tensor: StoredTensor,
    name: str,
    index: NDArray[np.int64],
    *,
    axis: int = 0,
    dtype: str | None = None,
) -> NewTensor:
    """Return a copy of the rows or columns of a stored tensor that ``index`` names, in its order.

    Args:
        tensor: what to copy.
        name: its name in the new file.
        index: positions along the axis, in any order.
        axis: 0 for rows (or the values of a vector), 1 for the columns of a matrix.
        dtype: as for ``copied``.
    """
    target = dtype if dtype and tensor.dtype in FLOATS else tensor.dtype
    shape = (len(index), *tensor.shape[1:]) if axis == 0 else (tensor.shape[0], len(index))

    def blocks() -> Iterator[NDArray[Any]]:
        found = _rows(tensor, index) if axis == 0 else row_blocks_of(tensor)
        for block in found:
            yield as_dtype(block if axis == 0 else block[:, index], target, name)

    return NewTensor(name, target, shape, blocks)


def _rows(tensor: StoredTensor, index: NDArray[np.int64]) -> Iterator[NDArray[Any]]:
    """Yield rows in the order of ``index``; neighbours are read together."""
    size = tensor.size // tensor.shape[0]
    for run in np.split(index, np.flatnonzero(np.diff(index) != 1) + 1):
        first, count = int(run[0]), len(run)
        start, shape = tensor.start + first * size, (count, *tensor.shape[1:])
        yield from blocks_of(replace(tensor, shape=shape, start=start, size=count * size))


def _converted(tensor: StoredTensor, dtype: str) -> Iterator[NDArray[Any]]:
    for block in blocks_of(tensor):
        yield as_dtype(block, dtype, tensor.name)


def as_dtype(values: NDArray[Any], dtype: str, name: str) -> NDArray[Any]:
    """Return values as another floating type.

    Raises:
        UsageError: when a finite value becomes infinite, as large bfloat16 weights do in float16.
    """
    with np.errstate(over="ignore"):
        new: NDArray[Any] = values.astype(_DTYPES[dtype])
    if dtype == "F16" and not np.array_equal(np.isfinite(new), np.isfinite(values)):
        raise UsageError(
            f"tensor {name!r} holds values beyond float16's 65504; choose --dtype bf16 or fp32."
        )
    return new


def new_tensor(name: str, values: NDArray[Any], dtype: str | None = None) -> NewTensor:
    """Return an array in memory as a tensor to be written, in its own type or another floating."""
    array = values if dtype is None else as_dtype(values, dtype, name)
    stored = next(key for key, known in _DTYPES.items() if known == array.dtype)
    return NewTensor(name, stored, array.shape, lambda: [array])


def write_tensors(path: Path, tensors: Sequence[NewTensor]) -> None:
    """Write a safetensors file, one block at a time, tensors in the order given.

    The same tensors give the same bytes.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.size],
        }
        offset += tensor.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # readers map the tensors, so they start at a multiple of 8
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little"))
        stream.write(text)
        for tensor in tensors:
            for block in tensor.blocks():
                # A view as bytes: bfloat16 has no buffer protocol of its own.
                stream.write(np.ascontiguousarray(block).reshape(-1).view(np.uint8).data)


def sha256_of_tensors(tensors: Mapping[str, StoredTensor]) -> str:
    """Return the hex sha256 of names, types, shapes and values, in the order of the names.

    The same tensors in one file or in shards, under any file name, give the same hash.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, tensor.dtype, tensor.shape]).encode())
        for block in blocks_of(tensor):
            digest.update(block.view(np.uint8).data)
    return digest.hexdigest()
