"""Texts from a file or stdin, vectors to .npy or JSONL, a chunk at a time.

The identity of the vector space travels with the vectors:

* JSONL: every row is ``{"id"?, "vector": [...], "space_id": "m2d1-..."}``, so that rows stay
  telling when files are cut, mixed or concatenated, and there is no header to skip;
* .npy: behind the vectors, the file holds two more arrays, the space_id and the artifact.json of
  the model that made them, as strings. ``np.load(path)`` reads the vectors and ignores the rest.

``require_vectors_of`` compares it with the bundle whose queries are to be put to them.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from m2dexport.errors import UsageError
from m2dexport.files import atomic_file, require_file
from m2dexport.runtime.artifact import ArtifactSpec, require_same_space, spec_from_json
from m2dexport.runtime.encoder import Encoder

_CHUNK = 1024  # texts held in memory at a time
_JSONL = (".jsonl", ".ndjson")
_STDIN = "stdin"


@dataclass(frozen=True)
class StreamSummary:
    """What ``encode_stream`` did."""

    texts: int
    truncated: int  # texts that were longer than the model's maximum length
    space_id: str  # vectors of another space must not be compared with these
    seconds: float  # from the first text read to the last vector written

    def sentence(self) -> str:
        """Return the summary as one line."""
        rate = self.texts / self.seconds if self.seconds > 0 else 0.0
        return (
            f"{self.texts} texts in {self.seconds:.2f} s ({rate:.0f}/s), {self.truncated} cut at "
            f"the maximum length, space {self.space_id}"
        )


@dataclass(frozen=True)
class _Row:
    text: str
    id: tuple[Any, ...]  # the row's id, or nothing


def encode_stream(
    encoder: Encoder,
    source: Path | None = None,
    out: Path | None = None,
    *,
    prompt: str | None = None,
    batch_size: int = 32,
    force: bool = False,
    on_progress: Callable[[int], None] = lambda _: None,
) -> StreamSummary:
    """Encode texts into a file, in their order; memory does not grow with their number.

    Args:
        encoder: a loaded bundle.
        source: a .jsonl (or .ndjson) file of objects with "text" and perhaps "id", or any other
            file of one text a line, empty lines being empty texts; None reads stdin, as JSONL
            when its first line is an object with a "text".
        out: .npy (rows in the order of the texts, ids left out) or .jsonl, written only when all
            went well; None writes JSONL to stdout.
        prompt: name of one of the model's prompts; None takes its default.
        batch_size: texts run together at most.
        force: whether a file at ``out`` is replaced.
        on_progress: told the number of texts done, from time to time.

    Raises:
        UsageError: when a path is of no known kind, both are one file, or a line cannot be read,
            naming its number.
        M2DError: when the output cannot be written.
    """
    if out is not None and out.suffix not in (".npy", *_JSONL):
        raise UsageError(f"{out} has an unknown ending; name it .npy or .jsonl.")
    if source is not None and not source.is_file():
        raise UsageError(f"{source} is not a file; name a file of texts, or pass them on stdin.")
    if out is not None:
        if source is not None and out.exists() and out.samefile(source):
            raise UsageError(f"{out} is the file of the texts; name another one for the vectors.")
        require_file(out, force=force)
    # A process may be started without either of the two.
    if source is None and sys.stdin is None:
        raise UsageError("stdin is closed; name a file of texts with --in.")
    if out is None and sys.stdout is None:
        raise UsageError("stdout is closed; name a file for the vectors with --out.")
    with contextlib.ExitStack() as stack:
        stream: BinaryIO = stack.enter_context(source.open("rb")) if source else sys.stdin.buffer
        rows = _rows(stream, str(source) if source else _STDIN, _is_jsonl(source))
        run = _Run(encoder, prompt, batch_size, on_progress)
        if out is None:
            _write_jsonl(sys.stdout, run, rows)
        else:
            temporary = stack.enter_context(atomic_file(out, force=force))
            if out.suffix == ".npy":
                with temporary.open("wb") as binary:
                    _write_npy(binary, run, rows)
            else:
                with temporary.open("w", encoding="utf-8", newline="\n") as text:
                    _write_jsonl(text, run, rows)
    return StreamSummary(run.texts, run.truncated, encoder.spec.space_id, run.seconds)


def read_space_id(path: Path) -> str | None:
    """Return the space_id behind the vectors of a .npy file, None when there is none.

    Raises:
        UsageError: when it is no .npy file.
    """
    told = _told_behind(path)
    return told[0] if told else None


def require_vectors_of(path: Path, spec: ArtifactSpec, bundle: object) -> None:
    """Refuse a file of vectors, an index for instance, that another bundle made.

    Args:
        path: the .npy or .jsonl file, as ``encode_stream`` writes it.
        spec: the specification of the bundle whose vectors are to be compared with them.
        bundle: what the message calls it.

    Raises:
        UsageError: when the spaces differ, naming both and, of a .npy file, the parts that differ,
            or when the file does not tell its space.
    """
    if path.suffix in _JSONL:
        _require_rows_of(path, spec, bundle)
        return
    told = _told_behind(path)
    if len(told) < 2:
        raise UsageError(
            f"{path} does not tell the space of its vectors; encode makes files that do."
        )
    require_same_space(spec_from_json(told[1], path), spec, path, bundle)


def _told_behind(path: Path) -> list[str]:
    """Return the strings behind the vectors of a .npy file."""
    try:
        with path.open("rb") as stream:
            version = np.lib.format.read_magic(stream)
            shape, _, dtype = (
                np.lib.format.read_array_header_1_0(stream)
                if version == (1, 0)
                else np.lib.format.read_array_header_2_0(stream)
            )
            stream.seek(int(np.prod(shape, dtype=np.int64)) * dtype.itemsize, 1)
            told = []
            while stream.read(1):
                stream.seek(-1, 1)
                told.append(str(np.lib.format.read_array(stream, allow_pickle=False)))
            return told
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is not a .npy file of vectors: {error}.") from error


def _require_rows_of(path: Path, spec: ArtifactSpec, bundle: object) -> None:
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                told = json.loads(line)["space_id"]
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise UsageError(f"{path}:{number} is not a vector with its space_id.") from error
            if told != spec.space_id:
                raise UsageError(
                    f"{path}:{number} (space {told}) and {bundle} (space {spec.space_id}) must not "
                    "be compared; encode both with one bundle."
                )


class _Run:
    """Encodes chunks and counts; the counts are complete once the chunks are used up."""

    def __init__(
        self,
        encoder: Encoder,
        prompt: str | None,
        batch_size: int,
        on_progress: Callable[[int], None],
    ) -> None:
        self.encoder = encoder
        self.texts = 0
        self.truncated = 0
        self._prompt = prompt
        self._batch_size = batch_size
        self._on_progress = on_progress
        self._started = time.perf_counter()
        # An unknown prompt must fail before any text is read; it also tells dtype and width.
        self.empty = self._encode([])

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._started

    def chunks(self, rows: Iterator[_Row]) -> Iterator[tuple[list[_Row], NDArray[Any]]]:
        while chunk := list(itertools.islice(rows, _CHUNK)):
            yield chunk, self._encode([row.text for row in chunk])

    def _encode(self, texts: list[str]) -> NDArray[Any]:
        encoded = self.encoder.encode_report(
            texts, prompt=self._prompt, batch_size=self._batch_size
        )
        self.texts += len(texts)
        self.truncated += encoded.truncated
        self._on_progress(self.texts)
        return encoded.vectors


def _write_jsonl(stream: IO[str], run: _Run, rows: Iterator[_Row]) -> None:
    tail = f', "space_id": {json.dumps(run.encoder.spec.space_id)}}}\n'
    # Nine digits tell every float32 apart.
    number = "{:.9g}".format if run.empty.dtype == np.float32 else str
    for chunk, vectors in run.chunks(rows):
        for row, vector in zip(chunk, vectors, strict=True):
            head = f'"id": {json.dumps(row.id[0])}, ' if row.id else ""
            values = ", ".join(map(number, vector.tolist()))
            stream.write(f'{{{head}"vector": [{values}]{tail}')
        stream.flush()


def _write_npy(stream: BinaryIO, run: _Run, rows: Iterator[_Row]) -> None:
    """Write rows behind a header whose number of rows is put in at the end."""
    dtype = run.empty.dtype
    descr = np.lib.format.dtype_to_descr(dtype)

    def write_header(count: int) -> None:
        shape = (count, *run.empty.shape[1:])
        header = {"descr": descr, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(stream, header)

    write_header(0)
    start = stream.tell()
    for _, vectors in run.chunks(rows):
        stream.write(np.ascontiguousarray(vectors, dtype=dtype).tobytes())
    for told in (run.encoder.spec.space_id, run.encoder.spec.to_json()):
        np.lib.format.write_array(stream, np.array(told), allow_pickle=False)
    stream.seek(0)
    write_header(run.texts)
    # numpy leaves room in the header for the rows to grow in number.
    assert stream.tell() == start, "the header of the .npy file grew over its first rows"


def _is_jsonl(source: Path | None) -> bool | None:
    """Whether a source is JSONL; None: its first line tells."""
    return None if source is None else source.suffix in _JSONL


def _rows(stream: Iterable[bytes], name: str, jsonl: bool | None) -> Iterator[_Row]:
    for number, line in enumerate(stream, start=1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise UsageError(f"{name}:{number} is not UTF-8; convert it first.") from error
        text = text.removesuffix("\n").removesuffix("\r")
        if jsonl is None:
            jsonl = _is_text_object(text)
        if not jsonl:
            yield _Row(text, ())
        elif text.strip():
            yield _row(text, f"{name}:{number}")


def _is_text_object(line: str) -> bool:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and "text" in value


def _row(line: str, where: str) -> _Row:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where} is not JSON: {error}.") from error
    if not isinstance(value, dict) or not isinstance(value.get("text"), str):
        raise UsageError(f'{where} is not an object with a "text" string.')
    try:
        value["text"].encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{where} holds half of a surrogate pair, which is no text.") from error
    return _Row(value["text"], (value["id"],) if "id" in value else ())
