"""The file of a static model's table: safetensors of one precision.

======  =========================================================================
fp32    ``rows`` float32 (tokens, dim)
fp16    ``rows`` float16 (tokens, dim)
int8    ``codes`` int8 (tokens, dim), ``scale`` float32 (tokens, 1)
int4    ``packed`` uint8 (tokens, dim / 32, 16), ``scale`` and ``offset`` float16
        (tokens, dim / 32, 1): in each byte, code i of a block below code i + 16
======  =========================================================================

The format is an 8-byte length, a JSON header and the raw arrays. It is read here, since a device
need not have the safetensors package.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m2dexport.errors import UnsafeContent, UsageError
from m2dexport.strict import parse_json

Table = Mapping[str, NDArray[Any]]

_DTYPES = {"F32": "<f4", "F16": "<f2", "I8": "i1", "U8": "u1"}
#: The arrays of each precision: name -> dtype, and the number of axes.
_KINDS: tuple[dict[str, tuple[tuple[str, ...], int]], ...] = (
    {"rows": (("F32", "F16"), 2)},
    {"codes": (("I8",), 2), "scale": (("F32",), 2)},
    {"packed": (("U8",), 3), "scale": (("F16",), 3), "offset": (("F16",), 3)},
)
_BLOCK_BYTES = 16
_MOST_AXES = 3


def table_bytes(table: Table) -> bytes:
    """Return the file of a table."""
    names = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
    header: dict[str, Any] = {}
    end = 0
    for name, array in sorted(table.items()):
        start, end = end, end + array.nbytes
        shape = list(array.shape)
        header[name] = {"dtype": names[array.dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    parts = [np.ascontiguousarray(array).tobytes() for _, array in sorted(table.items())]
    return len(text).to_bytes(8, "little") + text + b"".join(parts)


def read_table(content: memoryview, name: str) -> Table:
    """Return the arrays of a table's file, which stay in it.

    Args:
        content: of the file.
        name: what messages call it.

    Raises:
        UnsafeContent: when it is not one that ``table_bytes`` wrote.
    """
    size = int.from_bytes(content[:8], "little")
    if len(content) < 8 or size > len(content) - 8:
        raise UnsafeContent(f"{name} is no table of token vectors: its header is missing.")
    try:
        header = parse_json(bytes(content[8 : 8 + size]), name)
        data = content[8 + size :]
        table = {str(key): _array(entry, data) for key, entry in header.items()}
    except (UsageError, AttributeError, TypeError, KeyError, ValueError, OverflowError) as error:
        raise UnsafeContent(
            f"{name} is no table of token vectors: its header is damaged."
        ) from error
    _require_table(table, len(data), name)
    return table


def _array(entry: Any, data: memoryview) -> NDArray[Any]:
    dtype, shape = np.dtype(_DTYPES[entry["dtype"]]), entry["shape"]
    start, end = entry["data_offsets"]
    numbers = [*shape, start, end]
    if len(shape) > _MOST_AXES or not all(
        type(number) is int and 0 <= number <= len(data) for number in numbers
    ):
        raise ValueError("a number is out of range")
    if end - start != math.prod(shape) * dtype.itemsize:
        raise ValueError("an array has another size than its shape")
    array: NDArray[Any] = np.frombuffer(data[start:end], dtype=dtype).reshape(shape)
    return array


def _require_table(table: Table, size: int, name: str) -> None:
    """Refuse arrays that are not those of one precision, and belong together."""
    kind = next((kind for kind in _KINDS if kind.keys() == table.keys()), None)
    if kind is None or sum(array.nbytes for array in table.values()) != size:
        raise UnsafeContent(f"{name} is no table of token vectors: it holds other arrays.")
    first, *others = table.values()
    for key, (dtypes, axes) in kind.items():
        array = table[key]
        known = [np.dtype(_DTYPES[dtype]) for dtype in dtypes]
        if array.dtype not in known or array.ndim != axes or 0 in array.shape:
            raise UnsafeContent(
                f"{name} is no table of token vectors: its {key} are of another form."
            )
    leads = {array.shape[:-1] for array in (first, *others)}
    lasts = [table[key].shape[-1] for key in table if key in ("scale", "offset")]
    packed = table.get("packed")
    if (
        len(leads) > 1
        or any(last != 1 for last in lasts)
        or (packed is not None and packed.shape[-1] != _BLOCK_BYTES)
    ):
        raise UnsafeContent(f"{name} is no table of token vectors: its arrays do not fit together.")


def width_of(table: Table) -> int:
    """Return how many dims its vectors have."""
    width: int = rows_of(table, np.zeros(0, dtype=np.intp)).shape[1]
    return width


def rows_of(table: Table, ids: NDArray[np.intp]) -> NDArray[np.float32]:
    """Return the vectors of tokens, float32 (tokens, dim)."""
    if "rows" in table:
        rows: NDArray[np.float32] = table["rows"][ids].astype(np.float32)
        return rows
    if "codes" in table:
        wide: NDArray[np.float32] = table["codes"][ids].astype(np.float32) * table["scale"][ids]
        return wide
    packed = table["packed"][ids]
    codes = np.concatenate([packed & 15, packed >> 4], axis=-1).astype(np.float32)
    step, start = (table[key][ids].astype(np.float32) for key in ("scale", "offset"))
    blocks: NDArray[np.float32] = codes * step + start
    return blocks.reshape(len(ids), math.prod(blocks.shape[1:]))
