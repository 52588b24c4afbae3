"""Sentence pairs that people scored, read from .tsv, .csv and .jsonl files.

Columns are found by their names. A delimited file without a header has exactly three: score,
sentence1, sentence2. Scores may have any scale: correlations do not depend on it.
"""

from __future__ import annotations

import contextlib
import csv
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from m2dexport.data import read_utf8
from m2dexport.errors import UsageError
from m2dexport.strict import shown
from m2dexport.vectors.texts import TextSet, as_number, digest_of, number_of, read_jsonl, text_of

#: The names of each column, without case, spaces and punctuation.
_NAMES = {
    "score": ("score", "similarityscore", "similarity", "relatednessscore", "goldscore", "label"),
    "sentence1": ("sentence1", "sentencea", "text1", "texta"),
    "sentence2": ("sentence2", "sentenceb", "text2", "textb"),
}
#: A whole quoted field of a .tsv file: quotes inside it are doubled.
_QUOTED = re.compile(r'(?:^|(?<=[\t\r\n]))"(?:[^"]|"")*"(?=[\t\r\n]|\Z)')


_Row = tuple[int, list[str]]  # the line at which it ends, its fields
_Pair = tuple[int, Any, Any, Any]  # line, score, sentence1, sentence2


@dataclass(frozen=True)
class StsTask:
    """Sentence pairs with a similarity score given by people."""

    name: str
    sentences1: tuple[str, ...]
    sentences2: tuple[str, ...]
    scores: tuple[float, ...]  # of any scale
    sha256: str

    kind: ClassVar[Literal["sts"]] = "sts"
    main_metric: ClassVar[str] = "spearman"

    def texts(self) -> tuple[TextSet, ...]:
        """Return what must be encoded, in the order in which ``evaluate`` takes the vectors."""
        return TextSet(self.sentences1, None), TextSet(self.sentences2, None)


def load_pairs(path: Path) -> StsTask:
    """Read scored sentence pairs.

    Args:
        path: a .tsv, .csv or .jsonl file. A .tsv may be quoted as pandas writes it, or not at all.

    Raises:
        UsageError: when a line is wrong, columns cannot be told apart, there are fewer than two
            pairs, or every score is the same.
    """
    pairs = _jsonl_pairs(path) if path.suffix == ".jsonl" else _delimited_pairs(path)
    rows = [
        (number_of(score, path, line), text_of(first, path, line), text_of(second, path, line))
        for line, score, first, second in pairs
    ]
    if len(rows) < 2:
        raise UsageError(f"{path} holds {len(rows)} sentence pairs; at least 2 are needed.")
    scores, firsts, seconds = zip(*rows, strict=True)
    if len(set(scores)) == 1:
        raise UsageError(
            f"{path}: every score is {scores[0]:g}, so no correlation exists; "
            "pass pairs whose scores differ."
        )
    return StsTask(path.stem, firsts, seconds, scores, digest_of(path))


def _jsonl_pairs(path: Path) -> Iterator[_Pair]:
    keys: list[str] = []
    for line, item in read_jsonl(path, ()):
        if not keys:
            columns = _columns(list(item), path, line)
            keys = [list(item)[column] for column in columns]
        if missing := [key for key in keys if key not in item]:
            raise UsageError(f"{path}, line {line} has no {shown(missing[0])}.")
        yield line, item[keys[0]], item[keys[1]], item[keys[2]]


def _delimited_pairs(path: Path) -> Iterator[_Pair]:
    text = read_utf8(path)
    rows = _fields(text, path) if path.suffix == ".csv" else _tab_fields(text, path)
    if not rows:
        return
    line, first = rows[0]
    if len(first) == len(_NAMES) and as_number(first[0]) is not None:
        columns, width = [0, 1, 2], len(_NAMES)
    else:
        columns, width = _columns(first, path, line), len(first)
        rows = rows[1:]
    for line, row in rows:
        if len(row) != width:
            raise UsageError(f"{path}, line {line}: {len(row)} columns where {width} are needed.")
        yield line, row[columns[0]], row[columns[1]], row[columns[2]]


def _columns(names: Sequence[str], path: Path, line: int) -> list[int]:
    """Return where score, sentence1 and sentence2 are, by the names of all columns."""
    plain = [re.sub(r"[\W_]", "", name.lower()) for name in names]
    found = []
    for wanted, known in _NAMES.items():
        columns = [column for column, name in enumerate(plain) if name in known]
        if not columns:
            raise UsageError(
                f"{path}, line {line} has no {wanted} among {shown(list(names))}; "
                "name the columns score, sentence1 and sentence2."
            )
        if len(columns) > 1:
            first, second = (shown(names[column]) for column in columns[:2])
            raise UsageError(
                f"{path}, line {line}: two columns could be the {wanted}, {first} and {second}; "
                "remove one."
            )
        found += columns
    return found


def _tab_fields(text: str, path: Path) -> list[_Row]:
    """Return the rows of a .tsv file, whose quotes may be part of the text or stand around it."""
    plain = [
        (number, line.removesuffix("\r").split("\t"))
        for number, line in enumerate(text.split("\n"), start=1)
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
