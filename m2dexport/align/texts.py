"""The texts that maps are fitted on: streamed from a file, however many there are."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from m2dexport.checkpoint.open import Checkpoint
from m2dexport.data import align_texts_path
from m2dexport.errors import UsageError
from m2dexport.lines import JSONL, text_lines
from m2dexport.strict import is_unicode, parse_json

_CORPUS = "corpus.jsonl"  # of a BEIR folder
#: Characters of a text that count, far more than any maximum length; and of a chunk.
_LONGEST, _AT_ONCE = 1 << 18, 1 << 21


@dataclass(frozen=True)
class TextFile:
    """The texts of a file, read anew by each iteration.

    Raises:
        UsageError: while iterating, when it cannot be read, is not UTF-8, holds no text, or a line
            is wrong, naming it.
    """

    path: Path  # one text per line, or JSONL of objects with "text" and perhaps "title"

    def __iter__(self) -> Iterator[str]:
        found = False
        with self.path.open("rb") as stream:
            for number, line in text_lines(stream, self.path):
                text = self._text(line, f"{self.path}:{number}") if line.strip() else ""
                if text:
                    found = True
                    yield text[:_LONGEST]
        if not found:
            raise UsageError(f"{self.path} holds no text; it needs one text per line.")

    def _text(self, line: str, where: str) -> str:
        if self.path.suffix not in JSONL:
            return line
        row = parse_json(line, where)
        found = [row.get("title") or "", row.get("text")] if isinstance(row, dict) else []
        parts = [part for part in found if isinstance(part, str) and is_unicode(part)]
        if len(parts) < 2:
            raise UsageError(f'{where} is not an object with a "text" string.')
        return " ".join(parts).strip()


def align_texts(path: Path | None) -> TextFile:
    """Return the texts of a file or of a BEIR folder's corpus; None takes those that ship.

    Raises:
        UsageError: when there is no such file.
    """
    if path is None:
        return TextFile(align_texts_path())
    file = path / _CORPUS if path.is_dir() else path
    if not file.is_file():
        raise UsageError(f"{file} is not a file; name a file of texts, or a BEIR folder.")
    return TextFile(file)


def texts_or_shipped(texts: Iterable[str] | None) -> Iterable[str]:
    """Return texts to fit maps on: None takes those that ship."""
    return align_texts(None) if texts is None else texts


def sha256_of_texts(texts: Iterable[str]) -> str:
    """Return the hash that ``data.texts_sha256`` gives, without holding the texts."""
    digest = hashlib.sha256()
    for number, text in enumerate(texts):
        digest.update(b"\n" * (number > 0) + text.encode())
    return digest.hexdigest()


def chunks_of(texts: Iterable[str], size: int) -> Iterator[list[str]]:
    """Yield texts in lists of at most ``size`` texts and, but for one text, 2 MB."""
    chunk: list[str] = []
    held = 0
    for text in texts:
        if chunk and (len(chunk) == size or held + len(text) > _AT_ONCE):
            yield chunk
            chunk, held = [], 0
        chunk.append(text)
        held += len(text)
    if chunk:
        yield chunk


def prompts_of(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Return the prompts that texts are fitted behind, in turn: the default one first."""
    default = checkpoint.prompts[checkpoint.default_prompt] if checkpoint.default_prompt else ""
    return tuple(dict.fromkeys([default, *checkpoint.prompts.values()]))


def prompted(texts: Iterable[str], prompts: Sequence[str], start: int = 0) -> Iterator[str]:
    """Yield texts behind prompts that take turns; ``start`` is the number of the first text."""
    for number, text in enumerate(texts, start=start):
        yield prompts[number % len(prompts)] + text
