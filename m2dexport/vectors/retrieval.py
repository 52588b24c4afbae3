"""Retrieval sets in BEIR's layout: corpus.jsonl, queries.jsonl and judgements (qrels)."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from m2dexport.data import read_utf8
from m2dexport.errors import UsageError
from m2dexport.strict import shown
from m2dexport.vectors.ranking import NO_ROW, Rows
from m2dexport.vectors.texts import TextSet, as_number, digest_of, read_jsonl, text_of

TOP = 10  # documents of a ranking that count
#: What a gain is worth at each place of a ranking, (TOP,).
DISCOUNTS: NDArray[np.float64] = 1 / np.log2(np.arange(2, TOP + 2))

_COLUMNS = ("query-id", "corpus-id", "score")
#: Their names in files by others, without case, spaces and punctuation.
_NAMES = {
    "query-id": ("queryid", "qid", "query", "topic"),
    "corpus-id": ("corpusid", "docid", "documentid", "docno", "did", "pid"),
    "score": ("score", "relevance", "rel", "label"),
}
_TABLE_VALUES = 1 << 22  # of queries and documents whose gains are kept as a table
_TREC_ITERATIONS = ("0", "Q0")  # TREC's second column, which has no meaning


class MissingDocumentsWarning(UserWarning):
    """Judgements name documents that the corpus lacks."""


@dataclass(frozen=True)
class RetrievalTask:
    """Queries, documents, and which documents answer which query."""

    name: str
    queries: tuple[str, ...]
    documents: tuple[str, ...]
    #: Per query: document row -> gain above 0. A row beyond the documents is one that the corpus
    #: lacks: it can only be missed.
    relevance: tuple[Mapping[int, float], ...]
    sha256: str
    #: Per query: the row of the document that is the query itself, left out of its ranking, or
    #: NO_ROW. Empty: no query is a document.
    own: tuple[int, ...] = ()

    kind: ClassVar[Literal["retrieval"]] = "retrieval"
    main_metric: ClassVar[str] = f"ndcg@{TOP}"

    def texts(self) -> tuple[TextSet, ...]:
        """Return what must be encoded, in the order in which ``evaluate`` takes the vectors."""
        return TextSet(self.queries, "query"), TextSet(self.documents, "document")

    @cached_property
    def judged(self) -> Judged:
        """The relevance of all queries as arrays, for looking many up at once."""
        width = 2 + max((row for gains in self.relevance for row in gains), default=0)
        width = max(width, 1 + len(self.documents))
        pairs = sorted(
            (query * width + row + 1, gain)
            for query, gains in enumerate(self.relevance)
            for row, gain in gains.items()
        )
        best = [sorted(gains.values(), reverse=True)[:TOP] for gains in self.relevance]
        padded = np.array([each + [0.0] * (TOP - len(each)) for each in best], dtype=np.float64)
        ideal = (padded * DISCOUNTS).sum(axis=1)
        return Judged(
            width,
            np.array([key for key, _ in pairs], dtype=np.int64),
            np.array([gain for _, gain in pairs], dtype=np.float64),
            np.where(ideal > 0, ideal, 1),
            np.array([len(gains) for gains in self.relevance]),
        )


@dataclass(frozen=True)
class Judged:
    """Which documents answer which query, as arrays."""

    width: int
    keys: NDArray[np.int64]  # query * width + row + 1, sorted
    values: NDArray[np.float64]  # the gain of each key
    ideal: NDArray[np.float64]  # (queries,): the best discounted sum of gains; 1 without any
    counts: NDArray[np.int64]  # (queries,): relevant documents

    def gains(self, ranking: Rows) -> NDArray[np.float64]:
        """Return the gain of each place of rankings, (queries, places); 0 where there is none."""
        if not len(self.keys):
            return np.zeros(ranking.shape)
        if self._table is not None:
            return np.take_along_axis(self._table, ranking + 1, axis=1)
        keys = np.arange(len(ranking))[:, None] * self.width + ranking + 1
        places = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        found: NDArray[np.float64] = np.where(self.keys[places] == keys, self.values[places], 0.0)
        return found

    @cached_property
    def _table(self) -> NDArray[np.float64] | None:
        """The gain of every document and query, (queries, width); None where they are many."""
        shape = len(self.counts), self.width
        if shape[0] * shape[1] > _TABLE_VALUES:
            return None
        table = np.zeros(shape)
        table.ravel()[self.keys] = self.values
        return table


@dataclass(frozen=True)
class _Judgement:
    line: int
    query: str
    document: str
    gain: float


def folder_of_judgements(path: Path) -> Path | None:
    """Return the BEIR folder whose judgements a file holds, or None when it is not such a file."""
    folder = path.parent.parent if path.parent.name == "qrels" else path.parent
    is_judgements = path.parent.name == "qrels" or path.name == "qrels.jsonl"
    return folder if is_judgements and (folder / "corpus.jsonl").exists() else None


def load_retrieval(folder: Path, qrels: Path | None = None) -> RetrievalTask:
    """Read a folder in BEIR's layout.

    As in BEIR, queries without a relevant document are not scored, a relevant document that the
    corpus lacks counts as not found, and a query that is itself a document, by its id, is left out
    of its own ranking (unless it is judged relevant there).

    Args:
        folder: with corpus.jsonl and queries.jsonl.
        qrels: its judgements, .tsv or .jsonl; None takes qrels.jsonl or qrels/test.tsv.

    Raises:
        UsageError: when a file is missing, a line is wrong, an id occurs twice, or nothing is left.
    """
    corpus, queries = folder / "corpus.jsonl", folder / "queries.jsonl"
    documents, texts = _texts_by_id(corpus), _texts_by_id(queries)
    qrels = qrels or _test_split(folder)
    row_of = {name: row for row, name in enumerate(documents)}
    relevance = _relevance(qrels, texts, row_of, corpus)
    judged = [name for name in texts if name in relevance]
    own = [
        NO_ROW if name not in documents or row_of[name] in relevance[name] else row_of[name]
        for name in judged
    ]
    known = own if any(row != NO_ROW for row in own) else []
    asked, gains = [texts[name] for name in judged], [relevance[name] for name in judged]
    return RetrievalTask(
        name=_task_name(folder, qrels),
        queries=tuple(asked),
        documents=tuple(documents.values()),
        relevance=tuple(gains),
        sha256=digest_of(asked, list(documents.values()), gains, known),
        own=tuple(known),
    )


def _test_split(folder: Path) -> Path:
    choices = [p for p in (folder / "qrels.jsonl", folder / "qrels" / "test.tsv") if p.exists()]
    if len(choices) > 1:
        raise UsageError(f"{folder} has judgements in {choices[0]} and {choices[1]}; name one.")
    if choices:
        return choices[0]
    others = sorted((folder / "qrels").glob("*.tsv"))
    if others:
        splits = ", ".join(path.stem for path in others)
        raise UsageError(
            f"{folder} has no judgements of a test split (qrels/test.tsv), only of: {splits}; "
            f"name the file instead of the folder, such as {others[0]}."
        )
    raise UsageError(f"{folder} has no judgements: neither qrels.jsonl nor qrels/test.tsv exists.")


def _task_name(folder: Path, qrels: Path) -> str:
    name = folder.resolve().name
    return name if qrels.stem in ("qrels", "test") else f"{name}-{qrels.stem}"


def _texts_by_id(path: Path) -> dict[str, str]:
    """Return id -> text of corpus.jsonl or queries.jsonl, titles in front."""
    texts: dict[str, str] = {}
    line_of: dict[str, int] = {}
    for line, item in read_jsonl(path, ("_id", "text")):
        name = _id(item["_id"])
        if name is None:
            raise UsageError(f"{path}, line {line}: {shown(item['_id'])} is not an _id.")
        if name in texts:
            raise UsageError(
                f"{path}, line {line}: the _id {shown(name)} is that of line "
                f"{line_of[name]}, too; give each text an _id of its own."
            )
        title = text_of(item.get("title") or "", path, line)
        texts[name] = f"{title} {text_of(item['text'], path, line)}".strip()
        line_of[name] = line
    return texts


def _id(value: object) -> str | None:
    return str(value) if isinstance(value, (str, int)) and not isinstance(value, bool) else None


def _relevance(
    qrels: Path, queries: Mapping[str, str], row_of: Mapping[str, int], corpus: Path
) -> dict[str, dict[int, float]]:
    """Return query id -> document row -> gain above 0."""
    rows = dict(row_of)
    gains: dict[tuple[str, str], float] = {}
    for one in _judgements(qrels):
        where = f"{qrels}, line {one.line}"
        if one.query not in queries:
            raise UsageError(f"{where}: {shown(one.query)} is not the _id of a query.")
        pair = one.query, one.document
        if gains.setdefault(pair, one.gain) != one.gain:
            raise UsageError(
                f"{where} judges {shown(pair)} as {one.gain:g}, and a line before it as "
                f"{gains[pair]:g}; remove one."
            )
        rows.setdefault(one.document, len(rows))
    relevance: dict[str, dict[int, float]] = {}
    for (query, document), gain in gains.items():
        if gain > 0:
            relevance.setdefault(query, {})[rows[document]] = gain
    if not any(row < len(row_of) for found in relevance.values() for row in found):
        raise UsageError(f"{qrels} names no relevant document that {corpus} has.")
    if missing := list(rows)[len(row_of) :]:
        warnings.warn(
            f"{qrels} judges documents that {corpus} lacks ({len(missing)}, such as "
            f"{shown(missing[0])}); relevant ones count as not found.",
            MissingDocumentsWarning,
            stacklevel=4,
        )
    return relevance


def _judgements(path: Path) -> Iterator[_Judgement]:
    """Yield the judgements of a qrels file."""
    rows = _delimited_rows(path) if path.suffix == ".tsv" else _jsonl_rows(path)
    for line, (query_id, corpus_id, score) in rows:
        query, document, gain = _id(query_id), _id(corpus_id), as_number(score)
        if query is None or document is None or gain is None:
            raise UsageError(f"{path}, line {line} is not a query id, a document id and a number.")
        yield _Judgement(line, query, document, gain)


def _jsonl_rows(path: Path) -> Iterator[tuple[int, tuple[Any, Any, Any]]]:
    for line, item in read_jsonl(path, _COLUMNS):
        yield line, (item["query-id"], item["corpus-id"], item["score"])


def _delimited_rows(path: Path) -> Iterator[tuple[int, tuple[Any, Any, Any]]]:
    """Yield (line, (query, document, gain)): BEIR's columns, TREC's, or those that a header names.

    TREC's files have four columns (query, iteration, document, gain), often between spaces.
    """
    lines = read_utf8(path).split("\n")
    rows = [
        (number, line.rstrip("\r").split("\t") if "\t" in line else line.split())
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not rows:
        raise UsageError(f"{path} is empty.")
    first_line, first = rows[0]
    named = _named_columns(first)
    trec = named is None and len(first) == 4 and first[1] in _TREC_ITERATIONS
    if not (named or trec or len(first) == 3):
        raise UsageError(
            f"{path}, line {first_line}: the {len(first)} columns are neither query, document and "
            "score nor TREC's four; name them query-id, corpus-id and score in a first line."
        )
    query, document, score = named or ((0, 2, 3) if trec else (0, 1, 2))
    for line, row in rows[1:] if named else rows:
        if len(row) != len(first) or (trec and row[1] not in _TREC_ITERATIONS):
            raise UsageError(f"{path}, line {line} has other columns than line {first_line}.")
        yield line, (row[query], row[document], row[score])


def _named_columns(names: Sequence[str]) -> tuple[int, ...] | None:
    """Return where query, document and score are when a row names them, None when it does not."""
    plain = [re.sub(r"[\W_]", "", name.lower()) for name in names]
    found = [[i for i, name in enumerate(plain) if name in _NAMES[key]] for key in _COLUMNS]
    return tuple(i for (i,) in found) if all(len(where) == 1 for where in found) else None
