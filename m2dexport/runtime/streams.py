"""Texts from a file or stdin, vectors to a file or stdout, a chunk at a time.

``vector_writing`` has the formats, each of which names the space of its vectors; ``vector_files``
compares it with the bundle whose queries are to be put to them.
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
from typing import BinaryIO

from m2dexport.errors import UsageError, one_line
from m2dexport.files import atomic_file, require_file
from m2dexport.lines import JSONL, text_lines
from m2dexport.runtime.encoder import Encoded, Encoder
from m2dexport.runtime.vector_files import VECTOR_FILES
from m2dexport.runtime.vector_writing import (
    Chunk,
    sidecar_of,
    write_jsonl,
    write_npy,
    write_safetensors,
    write_sidecar,
    written_at,
)
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
    id: str | None  # the row's id as JSON


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
    places and holds zeros, or a null in JSONL.

    Args:
        encoder: a loaded bundle.
        source: a .jsonl (or .ndjson) file of objects with "text" and perhaps "id" (or "_id"), or
            any other file of one text per line, empty lines being empty texts, whose first line
            must not begin like a JSON object; None reads stdin, as JSONL when it does.
        out: .npy (rows in the order of the texts, ids left out; a sidecar is written beside it),
            .safetensors or .jsonl, written only when all went well; None writes JSONL to stdout.
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
            write_jsonl(sys.stdout, encoder.spec, run.chunks(rows))
        else:
            _write_file(out, run, rows, force)
    return StreamSummary(run.texts, run.truncated, run.failed, encoder.spec.space_id, run.seconds)


def _write_file(out: Path, run: _Run, rows: Iterator[_Row], force: bool) -> None:
    spec, chunks = run.encoder.spec, run.chunks(rows)
    if out.suffix == ".npy":
        # Entered first, the sidecar is renamed last: without it, the file still tells its space.
        with (
            atomic_file(sidecar_of(out), force=force) as sidecar,
            atomic_file(out, force=force) as path,
        ):
            write_npy(path, spec, chunks)
            write_sidecar(sidecar, spec, run.texts)
        return
    with atomic_file(out, force=force) as path:
        if out.suffix == ".safetensors":
            write_safetensors(path, spec, chunks)
        else:
            with path.open("w", encoding="utf-8", newline="\n") as text:
                write_jsonl(text, spec, chunks)


def _require_places(source: Path | None, out: Path | None, force: bool) -> None:
    """Refuse what cannot be read or written before any text is read."""
    if out is not None and out.suffix not in VECTOR_FILES:
        raise UsageError(f"{out} has an unknown ending; name it .npy, .safetensors or .jsonl.")
    if source is not None and not source.is_file():
        raise UsageError(f"{source} is not a file; name a file of texts, or pass them on stdin.")
    for path in () if out is None else written_at(out):
        if source is not None and path.exists() and path.samefile(source):
            raise UsageError(f"{path} is the file of the texts; name another one for the vectors.")
        require_file(path, force=force)
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
        self._encode([])  # an unknown prompt fails before any text is read

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._started

    def chunks(self, rows: Iterator[_Row]) -> Iterator[Chunk]:
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
            yield Chunk(encoded.vectors, encoded.failed, [row.id for row in chunk])

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


def _rows(stream: BinaryIO, source: Path | None) -> Iterator[_Row]:
    name = str(source) if source else _STDIN
    jsonl = source is not None and source.suffix in JSONL
    for number, text in text_lines(stream, name):
        if number == 1 and not jsonl and _OBJECT.match(text):
            if source is not None:
                raise UsageError(f"{name}:1 looks like JSONL; name the file .jsonl.")
            jsonl = True
        if not jsonl:
            yield _Row(f"{name}:{number}", text, None)
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
        name = json.dumps(ids[0], allow_nan=False) if ids else None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where} has an id that is not JSON: {one_line(error)}.") from error
    return _Row(where, value["text"], name)
