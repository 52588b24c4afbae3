"""The formats of files of vectors, written a chunk at a time; ``vector_files`` reads them.

Each names the space of its vectors in itself, where it cannot get lost:

* JSONL: every row is ``{"id"?, "vector": [...], "space_id": "m2d1-..."}``, so that rows stay
  identified when files are cut, mixed or concatenated, and there is no header to skip;
* .npy: behind the vectors, the file holds two more arrays, the space_id and the artifact.json of
  the model that made them, as strings. ``np.load(path)`` reads the vectors and ignores the rest.
  A sidecar, ``vectors.npy.json``, says the same to readers that know nothing of that;
* .safetensors: the tensor ``vectors``, and ``ids`` where texts have any: a JSON value a line, as
  bytes. The metadata hold space_id, artifact and count.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Container, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from m2dexport.runtime.artifact import ArtifactSpec
from m2dexport.vectors.codecs import code_dtype, code_width

#: Of a sidecar.
SIDECAR_FORMAT = 1
#: How safetensors calls the types of vectors, and of ids.
TENSOR_DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
}
_MOST = 10**18  # more vectors, and bytes of them, than a file will hold


@dataclass(frozen=True)
class Chunk:
    """The vectors of some texts, in their order."""

    vectors: NDArray[Any]  # (texts, width); the rows of texts without a vector hold zeros
    failed: Container[int]  # those rows
    ids: Sequence[str | None]  # of each text, as JSON; None where it has none


def sidecar_of(path: Path) -> Path:
    """Return where the sidecar of a .npy file lies: ``vectors.npy.json``."""
    return path.with_name(f"{path.name}.json")


def written_at(out: Path) -> tuple[Path, ...]:
    """Return every file that is written for vectors at ``out``."""
    return (out, sidecar_of(out)) if out.suffix == ".npy" else (out,)


def write_sidecar(path: Path, spec: ArtifactSpec, count: int) -> None:
    """Write whose vectors a .npy file holds, and how many, as JSON for any reader."""
    stored = {
        "format": SIDECAR_FORMAT,
        "space_id": spec.space_id,
        "count": count,
        "artifact": asdict(spec),
    }
    text = json.dumps(stored, indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8", newline="\n")


def write_jsonl(stream: IO[str], spec: ArtifactSpec, chunks: Iterator[Chunk]) -> None:
    """Write a row per vector, each with its space; flushed after every chunk."""
    tail = f', "space_id": {json.dumps(spec.space_id)}}}\n'
    # Nine digits tell every float32 apart.
    number = "{:.9g}".format if code_dtype(spec.vectors) == np.float32 else str
    for chunk in chunks:
        for index, (id_, vector) in enumerate(zip(chunk.ids, chunk.vectors, strict=True)):
            head = "" if id_ is None else f'"id": {id_}, '
            values = f"[{', '.join(map(number, vector.tolist()))}]"
            stream.write(f'{{{head}"vector": {"null" if index in chunk.failed else values}{tail}')
        stream.flush()


def write_npy(path: Path, spec: ArtifactSpec, chunks: Iterator[Chunk]) -> None:
    """Write rows behind a header whose number of rows is put in at the end; ids are left out."""
    dtype, width = code_dtype(spec.vectors), code_width(spec.dim, spec.vectors)
    descr = np.lib.format.dtype_to_descr(dtype)

    def write_header(count: int) -> None:
        header = {"descr": descr, "fortran_order": False, "shape": (count, width)}
        np.lib.format.write_array_header_1_0(stream, header)

    with path.open("wb") as stream:
        write_header(0)
        start = stream.tell()
        count = sum(_write_rows(stream, chunk, dtype) for chunk in chunks)
        for text in (spec.space_id, spec.to_json()):
            np.lib.format.write_array(stream, np.array(text), allow_pickle=False)
        stream.seek(0)
        write_header(count)
        # numpy leaves room in the header for the rows to grow in number.
        assert stream.tell() == start, "the header of the .npy file grew over its first rows"


def write_safetensors(path: Path, spec: ArtifactSpec, chunks: Iterator[Chunk]) -> None:
    """Write rows behind a header with room for their number, then the ids, which wait in a file."""
    dtype = code_dtype(spec.vectors).newbyteorder("<")
    room = len(_header(spec, _MOST, _MOST))
    room += -room % 8  # readers map the vectors, so they start at a multiple of 8
    count, named = 0, False
    with path.open("wb") as stream, tempfile.TemporaryFile(dir=path.parent) as ids:
        stream.write(bytes(8 + room))
        for chunk in chunks:
            count += _write_rows(stream, chunk, dtype)
            named = named or any(id_ is not None for id_ in chunk.ids)
            ids.write("".join(f"{id_ or 'null'}\n" for id_ in chunk.ids).encode())
        size = ids.tell() if named else 0
        ids.truncate(size)
        ids.seek(0)
        shutil.copyfileobj(ids, stream)
        stream.seek(0)
        stream.write(room.to_bytes(8, "little") + _header(spec, count, size).ljust(room))


def _write_rows(stream: BinaryIO, chunk: Chunk, dtype: np.dtype[Any]) -> int:
    stream.write(np.ascontiguousarray(chunk.vectors, dtype=dtype).tobytes())
    return len(chunk.vectors)


def _header(spec: ArtifactSpec, count: int, id_bytes: int) -> bytes:
    """Return the header of a safetensors file.

    Args:
        spec: whose vectors it holds.
        count: how many.
        id_bytes: the size of the ids; 0 where there are none.
    """
    dtype, width = code_dtype(spec.vectors).newbyteorder("<"), code_width(spec.dim, spec.vectors)
    names = {known: name for name, known in TENSOR_DTYPES.items()}
    end = count * width * dtype.itemsize
    header: dict[str, Any] = {
        "__metadata__": {
            "space_id": spec.space_id,
            "count": str(count),
            "artifact": spec.to_json(),
        },
        "vectors": {"dtype": names[dtype], "shape": [count, width], "data_offsets": [0, end]},
    }
    if id_bytes:
        offsets = [end, end + id_bytes]
        header["ids"] = {"dtype": "U8", "shape": [id_bytes], "data_offsets": offsets}
    return json.dumps(header, separators=(",", ":")).encode()
