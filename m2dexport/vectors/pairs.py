"""Sentence pairs that people scored or labelled, read from .tsv, .csv and .jsonl files.

Columns are found by their names. A delimited file without a header has exactly three: score,
sentence1, sentence2. Scores may have any scale: correlations do not depend on it. Where the column
is named as a label and holds only 0 and 1, the pairs are to be classified.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np

from m2dexport.errors import UsageError
from m2dexport.strict import shown
from m2dexport.vectors.classification import PairClassificationTask
from m2dexport.vectors.resample import Given, given_of
from m2dexport.vectors.tables import Table, plain_name
from m2dexport.vectors.texts import TextSet, as_number, digest_of, number_of, text_of

#: Names of a column that may hold labels of two classes, without case, spaces and punctuation.
_LABELS = (
    *("label", "labels", "isduplicate", "duplicate", "isparaphrase", "paraphrase"),
    *("issimilar", "ismatch", "match"),
)
#: The names of each column.
_NAMES = {
    "score": (
        *("score", "similarityscore", "similarity", "relatednessscore", "goldscore"),
        *_LABELS,
    ),
    "sentence1": ("sentence1", "sentencea", "text1", "texta", "question1"),
    "sentence2": ("sentence2", "sentenceb", "text2", "textb", "question2"),
}
_CLASSES = {0.0: False, 1.0: True, "false": False, "true": True}


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

    @cached_property
    def given(self) -> Given:
        """The scores and their resamples, which every cell is compared with."""
        scores = np.array(self.scores, dtype=np.float64)
        # By a power of two, which rounds nothing: squares of what is left are finite.
        scores = np.ldexp(scores, -int(np.frexp(np.abs(scores).max())[1]))
        return given_of(scores, self.sha256)


def load_pairs(table: Table) -> StsTask | PairClassificationTask:
    """Read sentence pairs, scored or labelled.

    Raises:
        UsageError: when a line is wrong, columns cannot be told apart, there are fewer than two
            pairs, or every score or every text is the same.
    """
    path = table.path
    unnamed = path.suffix != ".jsonl" and len(table.first) == 3
    if unnamed and _spells_a_number(table.first[0]):
        name, pairs = "score", list(table.unnamed())
    else:
        columns = _columns(table)
        name, pairs = table.first[columns[0]], list(table.named(columns))
    texts = [
        (text_of(first, path, line), text_of(second, path, line))
        for line, (_, first, second) in pairs
    ]
    labels = _labels(name, [pair[0] for _, pair in pairs])
    scores = () if labels else tuple(number_of(pair[0], path, line) for line, pair in pairs)
    if len(pairs) < 2:
        raise UsageError(f"{path} holds {len(pairs)} sentence pairs; at least 2 are needed.")
    firsts, seconds = zip(*texts, strict=True)
    if len({*firsts, *seconds}) == 1:
        raise UsageError(f"{path}: all texts are the same; pass pairs that differ.")
    if len(set(labels or scores)) == 1:
        lacking = "there is nothing to tell apart" if labels else "no correlation exists"
        raise UsageError(
            f"{path}: every score is {(labels or scores)[0]:g}, so {lacking}; pass pairs whose "
            "scores differ."
        )
    digest = digest_of(firsts, seconds, labels or scores)
    if labels:
        return PairClassificationTask(path.stem, firsts, seconds, labels, digest)
    return StsTask(path.stem, firsts, seconds, scores, digest)


def _spells_a_number(text: str) -> bool:
    """Say whether a field is a score, be it NaN or infinite, and no column's name."""
    try:
        return as_number(text) is not None or not np.isfinite(float(text))
    except ValueError:
        return False


def _labels(name: str, values: Sequence[Any]) -> tuple[bool, ...] | None:
    """Return the labels of a column that is named as one and holds two classes, else None."""
    if plain_name(name) not in _LABELS:
        return None
    found = [_CLASSES.get(str(v).lower() if as_number(v) is None else as_number(v)) for v in values]
    labels = tuple(label for label in found if label is not None)
    return labels if len(labels) == len(values) else None


def _columns(table: Table) -> list[int]:
    """Return where score, sentence1 and sentence2 are, by the names of all columns."""
    found = []
    for wanted, known in _NAMES.items():
        columns = table.columns(known)
        where = f"{table.path}, line {table.line}"
        if not columns:
            raise UsageError(
                f"{where} has no {wanted} among {shown(list(table.first))}; "
                "name the columns score, sentence1 and sentence2."
            )
        if len(columns) > 1:
            first, second = (shown(table.first[column]) for column in columns[:2])
            raise UsageError(
                f"{where}: two columns could be the {wanted}, {first} and {second}; remove one."
            )
        found += columns
    return found
