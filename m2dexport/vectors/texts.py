"""Texts to be scored, and how the files that hold them are read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from m2dexport.data import read_utf8
from m2dexport.errors import UsageError
from m2dexport.strict import is_unicode, parse_json, sha256_of_json, shown


@dataclass(frozen=True)
class TextSet:
    """Texts that are encoded with the same prompt."""

    texts: tuple[str, ...]
    role: str | None  # the name of a prompt, "query" or "document", or None


def read_jsonl(path: Path, keys: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, object) of a JSONL file whose objects have all the keys.

    Raises:
        UsageError: when the file cannot be read or is empty, or naming the line that is wrong.
    """
    found = False
    # Not splitlines(), which also breaks at characters that JSON allows inside a text.
    for number, line in enumerate(read_utf8(path).split("\n"), start=1):
        if not line.strip():
            continue
        item = parse_json(line, f"{path}, line {number}")
        if not isinstance(item, dict):
            raise UsageError(f"{path}, line {number} is not a JSON object.")
        if missing := [key for key in keys if key not in item]:
            raise UsageError(f"{path}, line {number} has no {missing[0]!r}.")
        found = True
        yield number, item
    if not found:
        raise UsageError(f"{path} is empty.")


def text_of(value: object, path: Path, line: int) -> str:
    """Return a value that is a text which can be encoded.

    Raises:
        UsageError: when it is not a string, or holds half of a surrogate pair.
    """
    if not isinstance(value, str):
        raise UsageError(f"{path}, line {line}: {shown(value)} is not a text.")
    if not is_unicode(value):
        raise UsageError(
            f"{path}, line {line} holds half of a surrogate pair, which is not text; "
            "mend or remove that line."
        )
    return value


def number_of(value: object, path: Path, line: int) -> float:
    """Return the finite number that a value is, or that a string spells.

    Raises:
        UsageError: when it is neither.
    """
    number = as_number(value)
    if number is None:
        raise UsageError(f"{path}, line {line}: the score {shown(value)} is not a number.")
    return number


def as_number(value: object) -> float | None:
    """Return the finite number that a value is, or that a string spells, or None."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    if isinstance(value, str) and ("_" in value or not value.isascii()):  # Python reads 1_000
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if np.isfinite(number) else None


def digest_of(*content: Any) -> str:
    """Return a hash of a task's texts and judgements, however its files wrote them down."""
    return sha256_of_json(content)
