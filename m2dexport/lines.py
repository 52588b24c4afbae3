"""The lines of a stream, none of which may fill the memory."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import BinaryIO

from m2dexport.errors import UsageError

#: How the names of files of JSON lines end.
JSONL = (".jsonl", ".ndjson")
_MOST_BYTES = 1 << 28  # of a line


def lines_of(stream: BinaryIO, name: object) -> Iterator[tuple[int, bytes]]:
    """Yield the number of each line, from 1, and the line with its end.

    Args:
        stream: read a line at a time.
        name: what messages call it.

    Raises:
        UsageError: naming a line that is too long, as all of /dev/zero is.
    """
    for number, line in enumerate(iter(partial(stream.readline, _MOST_BYTES + 1), b""), start=1):
        if len(line) > _MOST_BYTES:
            raise UsageError(
                f"{name}:{number} has more than {_MOST_BYTES:,} bytes; put one text on each line."
            )
        yield number, line


def text_lines(stream: BinaryIO, name: object) -> Iterator[tuple[int, str]]:
    """Yield the number of each line of UTF-8 text, from 1, and the line without its end.

    A byte order mark in front is left out.

    Args:
        stream: read a line at a time.
        name: what messages call it.

    Raises:
        UsageError: naming a line that is not UTF-8, or too long.
    """
    for number, line in lines_of(stream, name):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise UsageError(f"{name}:{number} is not UTF-8; convert it first.") from error
        yield number, text.removesuffix("\n").removesuffix("\r")
