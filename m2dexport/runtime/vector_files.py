"""Files of vectors, as ``encode_stream`` writes them: of which space they are, and how many."""

from __future__ import annotations

import math
import tokenize
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from m2dexport.errors import UsageError, one_line
from m2dexport.lines import JSONL, lines_of
from m2dexport.runtime.artifact import ArtifactSpec, require_same_space, spaces_of, spec_from_json
from m2dexport.strict import parse_json, shown
from m2dexport.vectors.codecs import code_dtype, code_width

_AT_ONCE = 1 << 22  # values of a file that are held at a time


def require_vectors_of(path: Path, spec: ArtifactSpec, bundle: object) -> tuple[int, str]:
    """Refuse a file of vectors, an index for instance, that another bundle made.

    Args:
        path: the .npy or .jsonl file, as ``encode_stream`` writes it.
        spec: the specification of the bundle whose vectors are to be compared with them.
        bundle: what the message calls it.

    Returns:
        The number of vectors, and the space that they and the bundle have in common.

    Raises:
        UsageError: when the spaces differ, naming both and, of a .npy file, the parts that differ;
            when the file does not name its space; or when what it holds are not vectors of it.
    """
    if not path.is_file():  # nor a pipe, which would wait for a writer
        raise UsageError(f"{path} is not a file; name a .npy or .jsonl file of vectors.")
    if path.suffix in JSONL:
        return _require_rows_of(path, spec, bundle)
    found = _read_npy(path)
    if found.spec is None:
        raise UsageError(
            f"{path} does not name the space of its vectors; encode makes files that do."
        )
    space = require_same_space(spec_from_json(found.spec, path), spec, path, bundle)
    width, dtype = code_width(spec.dim, spec.vectors), code_dtype(spec.vectors)
    if (found.shape[1:], found.dtype) != ((width,), dtype):
        raise UsageError(
            f"{path} holds {found.dtype} of shape {found.shape} where vectors of {bundle} are "
            f"{width} values of {dtype}; encode it again."
        )
    return found.shape[0], space


@dataclass(frozen=True)
class _Npy:
    """What a .npy file holds beside the values."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    spec: str | None  # artifact.json, the second string behind the vectors


def _read_npy(path: Path) -> _Npy:
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            shape, dtype = _npy_header(stream, size)
            _require_finite(stream, shape, dtype)
            strings = []
            while stream.tell() < size:
                _, kind = header = _npy_header(stream, size)
                if header[0] != () or kind.kind != "U":
                    raise ValueError("what follows its vectors is not text")
                coding = "utf-32-be" if kind.str.startswith(">") else "utf-32-le"
                strings.append(stream.read(kind.itemsize).decode(coding).rstrip("\0"))
    # What numpy raises on headers that are not Python, or nested too deeply, beside ValueError.
    except (OSError, ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
        raise UsageError(f"{path} is not a .npy file of vectors: {one_line(error)}.") from error
    except tokenize.TokenError as error:
        raise UsageError(f"{path} is not a .npy file of vectors.") from error
    return _Npy(shape, dtype, strings[1] if len(strings) > 1 else None)


def _npy_header(stream: BinaryIO, size: int) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Return shape and dtype of the array that begins here, all of which the file holds."""
    version = np.lib.format.read_magic(stream)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read is None:
        raise ValueError(f"its version is {version}")
    shape, _, dtype = read(stream)
    if dtype.hasobject or min(shape, default=0) < 0:
        raise ValueError(f"it holds {dtype} of shape {shown(shape)}")
    if math.prod(shape) * dtype.itemsize > size - stream.tell():
        raise ValueError("its end is missing")
    return shape, dtype


def _require_finite(stream: BinaryIO, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    """Read past the values of an array, and refuse numbers that are not finite."""
    size = math.prod(shape)
    if dtype.kind != "f":
        stream.seek(size * dtype.itemsize, 1)
        return
    for start in range(0, size, _AT_ONCE):
        count = min(_AT_ONCE, size - start)
        values = np.frombuffer(stream.read(count * dtype.itemsize), dtype)
        wrong = np.flatnonzero(~np.isfinite(values))
        if wrong.size:
            row = (start + int(wrong[0])) // math.prod(shape[1:])
            raise ValueError(f"its row {row} holds {values[wrong[0]]}")


def _require_rows_of(path: Path, spec: ArtifactSpec, bundle: object) -> tuple[int, str]:
    width, dtype = code_width(spec.dim, spec.vectors), code_dtype(spec.vectors)
    number, spaces = 0, set(spaces_of(spec))
    with path.open("rb") as stream:
        for number, line in lines_of(stream, path):
            row = parse_json(line, f"{path}:{number}")
            if not isinstance(row, dict) or not {"space_id", "vector"} <= row.keys():
                raise UsageError(f"{path}:{number} is not a vector with its space_id.")
            if not isinstance(row["space_id"], str) or row["space_id"] not in spaces:
                raise UsageError(
                    f"{path}:{number} (space {shown(row['space_id'])}) and {bundle} (space "
                    f"{spec.space_id}) must not be compared; encode both with one bundle."
                )
            # encode writes null for a text that gets no vector.
            if row["vector"] is not None and not _is_vector(row["vector"], width, dtype):
                raise UsageError(
                    f"{path}:{number} holds {shown(row['vector'])} where a vector of {bundle} is "
                    f"{width} values of {dtype}; encode it again."
                )
            spaces = {row["space_id"]}  # rows of two spaces are not comparable with each other
    return number, next((space for space in spaces_of(spec) if space in spaces), spec.space_id)


def _is_vector(found: Any, width: int, dtype: np.dtype[Any]) -> bool:
    if not isinstance(found, list) or len(found) != width:
        return False
    if dtype.kind == "f":
        most = 2.0 ** np.finfo(dtype).maxexp
        return all(type(value) in (int, float) and abs(value) < most for value in found)
    limits = np.iinfo(dtype)
    return all(type(value) is int and limits.min <= value <= limits.max for value in found)
