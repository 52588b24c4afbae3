"""Files of vectors, as ``encode_stream`` writes them: read, and of which space they are.

Nothing that is read is trusted: sizes are held against the file's before anything is mapped.
"""

from __future__ import annotations

import contextlib
import json
import math
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, BinaryIO, NoReturn

import numpy as np
from numpy.typing import NDArray

from m2dexport.errors import M2DError, UsageError, one_line
from m2dexport.lines import JSONL, lines_of
from m2dexport.runtime.artifact import (
    ArtifactSpec,
    SpaceId,
    require_same_space,
    spaces_of,
    spec_from_json,
)
from m2dexport.runtime.encoder import Encoder
from m2dexport.runtime.vector_writing import SIDECAR_FORMAT, TENSOR_DTYPES, sidecar_of
from m2dexport.strict import Within, parse_json, read_value, require_format, shown
from m2dexport.vectors.codecs import code_dtype, code_width

#: How the names of files of vectors end.
VECTOR_FILES = (".npy", ".safetensors", *JSONL)
_AT_ONCE = 1 << 22  # values of a file that are held at a time
_MOST_HEADER = 1 << 24  # bytes of a safetensors header, or of a sidecar
_ENCODER = "this encoder"  # what messages call it


@dataclass(frozen=True)
class StoredVectors:
    """The vectors of a file, which are of the space that an encoder speaks."""

    vectors: NDArray[Any]  # (texts, width) codes; a memory map, but of JSONL
    ids: list[Any] | None  # of each text, None where it has none; None: the file holds none
    space_id: str  # that the file and the encoder have in common


def read_vectors(path: str | Path, encoder: Encoder) -> StoredVectors:
    """Return the vectors of a file, for the search of an encoder that speaks their space.

    Vectors of .npy and .safetensors stay in the file and are read when they are used; those of
    JSONL are read at once, where a text without a vector becomes zeros.

    Args:
        path: the .npy, .safetensors or .jsonl file, as ``encode_stream`` writes it.
        encoder: a loaded bundle, whose queries are to be compared with the vectors.

    Raises:
        UsageError: as ``require_vectors_of``.

    Example:
        >>> stored = read_vectors("index.npy", encoder)
        >>> found = encoder.codec.search(encoder.encode(["a query"]), stored.vectors)
    """
    path, spec = Path(path), encoder.spec
    _require_file(path)
    if path.suffix in JSONL:
        return _rows_at_once(path, spec)
    held, space = _block_of_space(path, spec, _ENCODER)
    ids = _ids_of(path, held)
    if 0 in held.shape:  # which cannot be mapped
        return StoredVectors(np.zeros(held.shape, held.dtype), ids, space)
    return StoredVectors(np.memmap(path, held.dtype, "r", held.start, held.shape), ids, space)


def require_vectors_of(path: Path, spec: ArtifactSpec, bundle: object) -> tuple[int, str]:
    """Refuse a file of vectors, an index for instance, that another bundle made.

    Args:
        path: the .npy, .safetensors or .jsonl file, as ``encode_stream`` writes it.
        spec: the specification of the bundle whose vectors are to be compared with them.
        bundle: what the message calls it.

    Returns:
        The number of vectors, and the space that they and the bundle have in common.

    Raises:
        UsageError: when the spaces differ, naming both and, but of JSONL, the parts that differ;
            when the file does not name its space, or its sidecar another one; or when what it
            holds are not vectors of it.
    """
    _require_file(path)
    if path.suffix in JSONL:
        count, space = 0, spec.space_id
        for row in _rows_of(path, spec, bundle):
            count, space = count + 1, row["space_id"]
        return count, space
    held, space = _block_of_space(path, spec, bundle)
    _ids_of(path, held)  # which are refused as by whoever reads them
    return held.shape[0], space


def _require_file(path: Path) -> None:
    if not path.is_file():  # nor a pipe, which would wait for a writer
        raise UsageError(f"{path} is not a file; name a .npy, .safetensors or .jsonl file.")


@dataclass(frozen=True)
class _Block:
    """What a file holds that has its vectors in one block."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    start: int  # bytes before the values
    space_id: Any  # as the file says, unchecked; None: it does not say
    artifact: Any  # likewise: the text of artifact.json
    ids: tuple[int, int] | None = None  # where they begin and end, in bytes


def _block_of_space(path: Path, spec: ArtifactSpec, bundle: object) -> tuple[_Block, str]:
    """Return what a file holds, and its space, which a bundle has in common with it."""
    held = _block_of(path)
    if held.space_id is None:
        raise UsageError(
            f"{path} does not name the space of its vectors; encode makes files that do."
        )
    if held.space_id not in spaces_of(spec):
        _refuse_space(path, held, spec, bundle)
    width, dtype = code_width(spec.dim, spec.vectors), code_dtype(spec.vectors)
    if (held.shape[1:], held.dtype) != ((width,), dtype):
        raise UsageError(
            f"{path} holds {held.dtype} of shape {held.shape} where vectors of {bundle} are "
            f"{width} values of {dtype}; encode it again."
        )
    return held, held.space_id


def _refuse_space(path: Path, held: _Block, spec: ArtifactSpec, bundle: object) -> NoReturn:
    """Name both spaces and, where this version can read the file's artifact.json, what differs."""
    made_by = None
    with contextlib.suppress(M2DError):
        made_by = spec_from_json(str(held.artifact), path)
    if made_by is not None and made_by.space_id == held.space_id:
        require_same_space(made_by, spec, path, bundle)
    raise _not_comparable(path, held.space_id, spec, bundle)


def _not_comparable(where: object, found: Any, spec: ArtifactSpec, bundle: object) -> UsageError:
    return UsageError(
        f"{where} (space {shown(found)}) and {bundle} (space {spec.space_id}) must not be "
        "compared; encode both with one bundle."
    )


def _block_of(path: Path) -> _Block:
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    held, sidecar = _read_npy(path), sidecar_of(path)
    if not sidecar.is_file():
        return held
    copy, artifact = _read_sidecar(sidecar)
    space, rows = held.space_id or copy.space_id, held.shape[0] if held.shape else 0
    if (space, rows) != (copy.space_id, copy.count):
        raise UsageError(
            f"{path} ({rows} vectors, space {shown(space)}) and its sidecar {sidecar} "
            f"({copy.count}, space {copy.space_id}) do not belong together; remove the wrong one."
        )
    return replace(held, space_id=space, artifact=held.artifact or artifact)


@dataclass(frozen=True)
class _Sidecar:
    """What a sidecar says of the file that it lies beside, but for artifact.json."""

    format: int
    space_id: SpaceId
    count: Annotated[int, Within(0, 1 << 60)]


def _read_sidecar(path: Path) -> tuple[_Sidecar, str]:
    """Return what a sidecar says, and the text of its artifact.json."""
    with path.open("rb") as stream:
        stored = parse_json(stream.read(_MOST_HEADER), path)
    require_format(stored, SIDECAR_FORMAT, path)
    artifact = stored.pop("artifact", None) if isinstance(stored, dict) else None
    return read_value(_Sidecar, stored, path), json.dumps(artifact)


def _read_npy(path: Path) -> _Block:
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            shape, dtype = _npy_header(stream, size)
            start = stream.tell()
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
    space_id, artifact = (*strings, None, None)[:2]
    return _Block(shape, dtype, start, space_id, artifact)


def _npy_header(stream: BinaryIO, size: int) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Return shape and dtype of the array that begins here, all of which the file holds."""
    version = np.lib.format.read_magic(stream)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read is None:
        raise ValueError(f"its version is {version}")
    shape, fortran, dtype = read(stream)
    if dtype.hasobject or min(shape, default=0) < 0 or (fortran and len(shape) > 1):
        order = " by columns" if fortran else ""
        raise ValueError(f"it holds {dtype} of shape {shown(shape)}{order}")
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


def _read_safetensors(path: Path) -> _Block:
    """Return what a file holds; ``require_vectors_of`` compares shape and type."""
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > min(size - 8, _MOST_HEADER):
                raise ValueError("its header is missing")
            header = parse_json(stream.read(length), path)
            data = 8 + length
            shape, dtype, start = _tensor(header["vectors"], size - data)
            stream.seek(data + start)
            _require_finite(stream, shape, dtype)
            ids = None
            if "ids" in header:
                (number,), kind, begin = _tensor(header["ids"], size - data)
                ends = start + math.prod(shape) * dtype.itemsize
                if kind.itemsize != 1 or (begin < ends and start < begin + number):
                    raise ValueError("its ids are no text of their own")
                ids = data + begin, data + begin + number
        stored = header.get("__metadata__", {})
        count = shape[0] if shape else 0
        if "count" in stored and stored["count"] != str(count):
            raise ValueError(f"it counts {shown(stored['count'])} vectors and has {count}")
        space_id, artifact = stored.get("space_id"), stored.get("artifact")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UsageError(
            f"{path} is not a .safetensors file of vectors: {one_line(error)}."
        ) from error
    return _Block(shape, dtype, data + start, space_id, artifact, ids)


def _tensor(entry: Any, size: int) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    """Return shape, dtype and begin of a tensor that lies in ``size`` bytes of data."""
    shape: tuple[int, ...] = tuple(entry["shape"])
    dtype = TENSOR_DTYPES[entry["dtype"]]
    begin, end = entry["data_offsets"]
    if len(shape) > 2 or not all(type(n) is int and n >= 0 for n in (*shape, begin)):
        raise ValueError(f"a tensor of it has the shape {shown(list(shape))}")
    if end - begin != math.prod(shape) * dtype.itemsize or end > size:
        raise ValueError("its end is missing")
    return shape, dtype, begin


def _ids_of(path: Path, held: _Block) -> list[Any] | None:
    if held.ids is None:
        return None
    begin, end = held.ids
    with path.open("rb") as stream:
        stream.seek(begin)
        lines = stream.read(end - begin).splitlines()
    if len(lines) != held.shape[0]:
        raise UsageError(
            f"{path} holds {len(lines)} ids of {held.shape[0]} vectors; encode it again."
        )
    return [parse_json(line, f"{path}, id {row}") for row, line in enumerate(lines)]


def _rows_of(path: Path, spec: ArtifactSpec, bundle: object) -> Iterator[dict[str, Any]]:
    """Yield the rows of a JSONL file, all of which are vectors of one space of a bundle."""
    width, dtype = code_width(spec.dim, spec.vectors), code_dtype(spec.vectors)
    allowed, first = spaces_of(spec), None
    with path.open("rb") as stream:
        for number, line in lines_of(stream, path):
            row = parse_json(line, f"{path}:{number}")
            if not isinstance(row, dict) or not {"space_id", "vector"} <= row.keys():
                raise UsageError(f"{path}:{number} is not a vector with its space_id.")
            space = row["space_id"]
            if space not in allowed:
                raise _not_comparable(f"{path}:{number}", space, spec, bundle)
            first = first or space
            if space != first:
                raise UsageError(
                    f"{path}:{number} (space {space}) and {path}:1 (space {first}) must not be "
                    "compared, nor be in one file; encode all of it with one bundle."
                )
            # encode writes null for a text that gets no vector.
            if row["vector"] is not None and not _is_vector(row["vector"], width, dtype):
                raise UsageError(
                    f"{path}:{number} holds {shown(row['vector'])} where a vector of {bundle} is "
                    f"{width} values of {dtype}; encode it again."
                )
            yield row


def _rows_at_once(path: Path, spec: ArtifactSpec) -> StoredVectors:
    width, dtype = code_width(spec.dim, spec.vectors), code_dtype(spec.vectors)
    rows = list(_rows_of(path, spec, _ENCODER))
    vectors = np.zeros((len(rows), width), dtype)
    for number, row in enumerate(rows):
        vectors[number] = row["vector"] or 0
    named = any("id" in row for row in rows)
    space = rows[0]["space_id"] if rows else spec.space_id
    return StoredVectors(vectors, [row.get("id") for row in rows] if named else None, space)


def _is_vector(found: Any, width: int, dtype: np.dtype[Any]) -> bool:
    if not isinstance(found, list) or len(found) != width:
        return False
    if dtype.kind == "f":
        most = 2.0 ** np.finfo(dtype).maxexp
        return all(type(value) in (int, float) and abs(value) < most for value in found)
    limits = np.iinfo(dtype)
    return all(type(value) is int and limits.min <= value <= limits.max for value in found)
