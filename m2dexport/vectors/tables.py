"""Rows of .tsv, .csv and .jsonl files, and their columns by name."""

from __future__ import annotations

import contextlib
import csv
import io
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m2dexport.data import read_utf8
from m2dexport.errors import UsageError
from m2dexport.strict import shown
from m2dexport.vectors.texts import read_jsonl

SUFFIXES = (".tsv", ".csv", ".jsonl")

#: A whole quoted field of a .tsv file: quotes inside it are doubled.
_QUOTED = re.compile(r'(?:^|(?<=[\t\r\n]))"(?:[^"]|"")*"(?=[\t\r\n]|\Z)')

_Row = tuple[int, list[str]]  # the line at which it ends, its fields


@dataclass(frozen=True)
class Table:
    """The rows of one file; the first one may hold the columns' names."""

    path: Path
    line: int  # of the first row
    first: tuple[str, ...]  # the first row's fields, or the keys of the first JSON object
    rows: tuple[tuple[int, Any], ...]  # line, and a list of fields or a JSON object

    def columns(self, names: Collection[str]) -> list[int]:
        """Return which columns have one of these names, without case, spaces and punctuation."""
        return [column for column, name in enumerate(self.first) if plain_name(name) in names]

    def named(self, columns: Sequence[int]) -> Iterator[tuple[int, list[Any]]]:
        """Yield (line, values of these columns) of all rows below the names.

        Raises:
            UsageError: naming the line that has other columns than the first.
        """
        rows = self.rows if self.path.suffix == ".jsonl" else self.rows[1:]
        yield from self._values(rows, columns)

    def unnamed(self) -> Iterator[tuple[int, list[Any]]]:
        """Yield (line, values) of all rows of a file without names."""
        yield from self._values(self.rows, range(len(self.first)))

    def _values(
        self, rows: Sequence[tuple[int, Any]], columns: Sequence[int]
    ) -> Iterator[tuple[int, list[Any]]]:
        keys = [self.first[column] for column in columns]
        for line, row in rows:
            if isinstance(row, dict):
                if missing := [key for key in keys if key not in row]:
                    raise UsageError(f"{self.path}, line {line} has no {shown(missing[0])}.")
                yield line, [row[key] for key in keys]
            elif len(row) != len(self.first):
                raise UsageError(
                    f"{self.path}, line {line}: {len(row)} columns where {len(self.first)} are "
                    "needed."
                )
            else:
                yield line, [row[column] for column in columns]


def read_table(path: Path) -> Table:
    """Read a file of rows.

    Args:
        path: a .tsv, .csv or .jsonl file. A .tsv may be quoted as pandas writes it, or not at all.

    Raises:
        UsageError: when it cannot be read, is empty, or a line is wrong.
    """
    rows: list[tuple[int, Any]]
    if path.suffix == ".jsonl":
        rows = list(read_jsonl(path, ()))
    else:
        text = read_utf8(path)
        rows = list(_fields(text, path) if path.suffix == ".csv" else _tab_fields(text, path))
    if not rows:
        raise UsageError(f"{path} is empty.")
    line, first = rows[0]
    return Table(path, line, tuple(first), tuple(rows))


def plain_name(name: str) -> str:
    """Return the name of a column without case, spaces and punctuation."""
    return re.sub(r"[\W_]", "", name.lower())


def _tab_fields(text: str, path: Path) -> list[_Row]:
    """Return the rows of a .tsv file, whose quotes may be part of the text or stand around it."""
    end = "\n" if "\n" in text else "\r"  # alone, as on classic Macs
    plain = [
        (number, line.removesuffix("\r").split("\t"))
        for number, line in enumerate(text.split(end), start=1)
        if line.strip()
    ]
    if '"' not in text or '"' in _QUOTED.sub("", text):
        return plain
    quoted = _fields(text, path, delimiter="\t")
    if len(quoted) != len(plain) and len({len(row) for _, row in plain}) == 1:
        raise UsageError(
            f"{path}: its quotes can be read as text or as marks around texts of several lines; "
            "write it as .csv or .jsonl."
        )
    return quoted


def _fields(text: str, path: Path, delimiter: str = ",") -> list[_Row]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        with _fields_up_to(len(text)):
            return [(reader.line_num, row) for row in reader if row]
    except csv.Error as error:
        raise UsageError(f"{path}, line {reader.line_num} cannot be read: {error}.") from error


@contextlib.contextmanager
def _fields_up_to(size: int) -> Iterator[None]:
    """Lift the csv module's limit, which is one for the whole process, and put it back."""
    limit = csv.field_size_limit()
    csv.field_size_limit(max(limit, size))
    try:
        yield
    finally:
        csv.field_size_limit(limit)
