"""Texts from a file or stdin, vectors to .npy or JSONL, a chunk at a time.

The identity of the vector space travels with the vectors:

* JSONL: every row is ``{"id"?, "vector": [...], "space_id": "m2d1-..."}``, so that rows stay
  identified when files are cut, mixed or concatenated, and there is no header to skip;
* .npy: behind the vectors, the file holds two more arrays, the space_id and the artifact.json of
  the model that made them, as strings. ``np.load(path)`` reads the vectors and ignores the rest.

``vector_files`` compares it with the bundle whose queries are to be put to them.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO

import numpy as np

from m2dexport.errors import UsageError, one_line
from m2dexport.files import atomic_file, require_file
from m2dexport.lines import JSONL, text_lines
from m2dexport.runtime.encoder import Encoded, Encoder
from m2dexport.strict import is_unicode

_CHUNK, _CHUNK_CHARACTERS = 1024, 1 << 22  # texts held in memory at a time, and their length
_NAMED = 10  # texts without a vector that are named one by one
_STDIN = "stdin"
_OBJECT = re.compile(r"""\s*\{\s*("|\}\s*$)""")  # how an object begins


@dataclass(frozen=True)
class StreamSummary:
    """What ``encode_stream`` did."""

    texts: int
    truncated: int  # texts that were longer than the model's maximum length
    failed: int  # texts without a vector; each was named as it came
    space_id: str  # vectors of another space must not be compared with these
    seconds: float  # from the first text read to the last vector written

    def sentence(self) -> str:
        """Return the summary as one line."""
        texts = "text" if self.texts == 1 else "texts"
        rate = self.texts / self.seconds if self.seconds > 0 else 0.0
        failed = f", {self.failed} without a vector" if self.failed else ""
        return (
            f"{self.texts} {texts} in {self.seconds:.2f} s ({rate:.0f}/s), {self.truncated} cut at "
            f"the maximum length{failed}, space {self.space_id}"
        )


@dataclass(frozen=True)
class _Row:
    where: str  # file and line
    text: str
    id: tuple[str, ...]  # the row's id as JSON, or nothing


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

    A text that the model cannot encode, since a token of it lies beyond the model's table, is named
    in a warning with its line. The others are encoded; its own row keeps the others in their
    places and holds zeros in .npy and a null in JSONL.

    Args:
        encoder: a loaded bundle.
        source: a .jsonl (or .ndjson) file of objects with "text" and perhaps "id" (or "_id"), or
            any other file of one text per line, empty lines being empty texts, whose first line
            must not begin like a JSON object; None reads stdin, as JSONL when it does.
        out: .npy (rows in the order of the texts, ids left out) or .jsonl, written only when all
            went well; None writes JSONL to stdout.
        prompt: name of one of the model's prompts; None takes its default.
        batch_size: texts run together at most.
        force: whether a file at ``out`` is replaced.
        on_progress: called with the number of texts done, from time to time.

    Raises:
        UsageError: when a path is of no known kind, both are one file, or a line cannot be read,
            naming its number.
        M2DError: when the output cannot be written.
    """
    _require_places(source, out, force)
    with contextlib.ExitStack() as stack:
        stream: BinaryIO = stack.enter_context(source.open("rb")) if source else sys.stdin.buffer
        rows = _rows(stream, source)
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
    return StreamSummary(run.texts, run.truncated, run.failed, encoder.spec.space_id, run.seconds)


def _require_places(source: Path | None, out: Path | None, force: bool) -> None:
    """Refuse what cannot be read or written before any text is read."""
    if out is not None and out.suffix not in (".npy", *JSONL):
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
        self.failed = 0
        self._prompt = prompt
        self._batch_size = batch_size
        self._on_progress = on_progress
        self._started = time.perf_counter()
        # An unknown prompt must fail before any text is read; it also gives dtype and width.
        self.empty = self._encode([]).vectors

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._started

    def chunks(self, rows: Iterator[_Row]) -> Iterator[tuple[list[_Row], Encoded]]:
        for chunk in _chunks(rows):
            encoded = self._encode([row.text for row in chunk])
            for index, reason in encoded.failed.items():
                self.failed += 1
                if self.failed <= _NAMED:
                    warnings.warn(
                        f"{chunk[index].where} {reason}; it gets no vector.", stacklevel=2
                    )
                elif self.failed == _NAMED + 1:
                    warnings.warn(
                        "more texts get no vector; the last line counts them.", stacklevel=2
                    )
            yield chunk, encoded

    def _encode(self, texts: list[str]) -> Encoded:
        encoded = self.encoder.encode_report(
            texts, prompt=self._prompt, batch_size=self._batch_size
        )
        self.texts += len(texts)
        self.truncated += encoded.truncated
        self._on_progress(self.texts)
        return encoded


def _chunks(rows: Iterator[_Row]) -> Iterator[list[_Row]]:
    chunk: list[_Row] = []
    held = 0
    for row in rows:
        chunk.append(row)
        held += len(row.text)
        if len(chunk) == _CHUNK or held >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, held = [], 0
    if chunk:
        yield chunk


def _write_jsonl(stream: IO[str], run: _Run, rows: Iterator[_Row]) -> None:
    tail = f', "space_id": {json.dumps(run.encoder.spec.space_id)}}}\n'
    # Nine digits tell every float32 apart.
    number = "{:.9g}".format if run.empty.dtype == np.float32 else str
    for chunk, encoded in run.chunks(rows):
        for index, (row, vector) in enumerate(zip(chunk, encoded.vectors, strict=True)):
            head = f'"id": {row.id[0]}, ' if row.id else ""
            values = f"[{', '.join(map(number, vector.tolist()))}]"
            stream.write(f'{{{head}"vector": {"null" if index in encoded.failed else values}{tail}')
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
    for _, encoded in run.chunks(rows):
        stream.write(np.ascontiguousarray(encoded.vectors, dtype=dtype).tobytes())
    for text in (run.encoder.spec.space_id, run.encoder.spec.to_json()):
        np.lib.format.write_array(stream, np.array(text), allow_pickle=False)
    stream.seek(0)
    write_header(run.texts)
    # numpy leaves room in the header for the rows to grow in number.
    assert stream.tell() == start, "the header of the .npy file grew over its first rows"


def _rows(stream: BinaryIO, source: Path | None) -> Iterator[_Row]:
    name = str(source) if source else _STDIN
    jsonl = source is not None and source.suffix in JSONL
    for number, text in text_lines(stream, name):
        if number == 1 and not jsonl and _OBJECT.match(text):
            if source is not None:
                raise UsageError(f"{name}:1 looks like JSONL; name the file .jsonl.")
            jsonl = True
        if not jsonl:
            yield _Row(f"{name}:{number}", text, ())
        elif text.strip():
            yield _row(text, f"{name}:{number}")


def _row(line: str, where: str) -> _Row:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where} is not JSON: {one_line(error)}.") from error
    if not isinstance(value, dict) or not isinstance(value.get("text"), str):
        raise UsageError(f'{where} is not an object with a "text" string.')
    if not is_unicode(value["text"]):
        raise UsageError(
            f"{where} holds half of a surrogate pair, which is not text; mend or remove that line."
        )
    try:
        # NaN and infinite numbers, which Python reads, are not JSON.
        ids = [value[key] for key in ("id", "_id") if key in value]  # BEIR's have an underscore
        names = tuple(json.dumps(each, allow_nan=False) for each in ids[:1])
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where} has an id that is not JSON: {one_line(error)}.") from error
    return _Row(where, value["text"], names)
