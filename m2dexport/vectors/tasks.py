"""Evaluation data: scored sentence pairs, and retrieval sets in BEIR's layout, read from files."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from m2dexport.data import default_task_paths
from m2dexport.errors import UsageError

TOP = 10  # documents of a ranking that count


@dataclass(frozen=True)
class TextSet:
    """Texts that are encoded with the same prompt."""

    texts: tuple[str, ...]
    role: str | None  # the name of a prompt, "query" or "document", or None


@dataclass(frozen=True)
class StsTask:
    """Sentence pairs with a similarity score given by people."""

    name: str
    sentences1: tuple[str, ...]
    sentences2: tuple[str, ...]
    scores: tuple[float, ...]
    sha256: str

    kind: ClassVar[Literal["sts"]] = "sts"
    main_metric: ClassVar[str] = "spearman"

    def texts(self) -> tuple[TextSet, ...]:
        """Return what must be encoded, in the order in which ``evaluate`` takes the vectors."""
        return TextSet(self.sentences1, None), TextSet(self.sentences2, None)


@dataclass(frozen=True)
class RetrievalTask:
    """Queries, documents, and which documents answer which query."""

    name: str
    queries: tuple[str, ...]
    documents: tuple[str, ...]
    relevance: tuple[Mapping[int, float], ...]  # per query: document row -> gain above 0
    sha256: str

    kind: ClassVar[Literal["retrieval"]] = "retrieval"
    main_metric: ClassVar[str] = f"ndcg@{TOP}"

    def texts(self) -> tuple[TextSet, ...]:
        """Return what must be encoded, in the order in which ``evaluate`` takes the vectors."""
        return TextSet(self.queries, "query"), TextSet(self.documents, "document")


Task = StsTask | RetrievalTask


def default_tasks() -> tuple[Task, ...]:
    """Return the tasks that ship: STS-B dev and LIMIT-small."""
    return tuple(load_task(path) for path in default_task_paths())


def load_task(path: Path) -> Task:
    """Read evaluation data.

    Args:
        path: a .tsv or .csv file of score, sentence1, sentence2; a .jsonl file of objects with
            ``score``, ``sentence1``, ``sentence2``; or a folder in BEIR's layout: corpus.jsonl,
            queries.jsonl, and qrels as qrels.jsonl or qrels/test.tsv.

    Raises:
        UsageError: when it is none of these, is empty, or a line of it is wrong.
    """
    if path.is_dir():
        return _load_retrieval(path)
    if not path.is_file():
        raise UsageError(f"{path} does not exist; name a file of STS pairs or a BEIR folder.")
    if path.suffix not in (".tsv", ".csv", ".jsonl"):
        raise UsageError(f"{path} is neither .tsv, .csv nor .jsonl, nor a BEIR folder.")
    return _load_sts(path)


def _load_sts(path: Path) -> StsTask:
    rows = _jsonl_pairs(path) if path.suffix == ".jsonl" else _delimited_pairs(path)
    scores, firsts, seconds = [], [], []
    for line, score, first, second in rows:
        try:
            number = float(score)
        except (TypeError, ValueError):
            number = float("nan")
        if not np.isfinite(number):
            raise UsageError(f"{path}, line {line}: the score {score!r} is not a number.")
        scores.append(number)
        firsts.append(first)
        seconds.append(second)
    if len(scores) < 2:
        raise UsageError(f"{path} holds {len(scores)} sentence pairs; at least 2 are needed.")
    return StsTask(
        path.stem, tuple(firsts), tuple(seconds), tuple(scores), _digest(path.read_bytes())
    )


def _delimited_pairs(path: Path) -> Iterator[tuple[int, Any, str, str]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:  # spreadsheets put a mark first
            if path.suffix == ".csv":
                reader = csv.reader(stream)
            else:
                reader = csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE)
            for row in reader:
                if not row or (reader.line_num == 1 and row[0].strip().lower() == "score"):
                    continue
                if len(row) < 3:
                    raise UsageError(
                        f"{path}, line {reader.line_num}: {len(row)} columns where score, "
                        "sentence1 and sentence2 are needed."
                    )
                yield reader.line_num, row[0], row[1], row[2]
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text: {error}.") from error
    except csv.Error as error:
        raise UsageError(f"{path}, line {reader.line_num} cannot be read: {error}.") from error


def _jsonl_pairs(path: Path) -> Iterator[tuple[int, Any, str, str]]:
    for line, item in _jsonl(path, ("score", "sentence1", "sentence2")):
        texts = [_text(item[key], path, line) for key in ("sentence1", "sentence2")]
        yield line, item["score"], texts[0], texts[1]


def _load_retrieval(folder: Path) -> RetrievalTask:
    corpus, queries = folder / "corpus.jsonl", folder / "queries.jsonl"
    qrels = next(
        (p for p in (folder / "qrels.jsonl", folder / "qrels" / "test.tsv") if p.exists()),
        folder / "qrels.jsonl",
    )
    documents = {
        str(item["_id"]): f"{item.get('title') or ''} {_text(item['text'], corpus, line)}".strip()
        for line, item in _jsonl(corpus, ("_id", "text"))
    }
    texts = {
        str(item["_id"]): _text(item["text"], queries, line)
        for line, item in _jsonl(queries, ("_id", "text"))
    }
    row_of = {name: row for row, name in enumerate(documents)}
    relevance: dict[str, dict[int, float]] = {}
    for line, query, document, gain in _judgements(qrels):
        if query not in texts or document not in row_of:
            unknown = query if query not in texts else document
            raise UsageError(f"{qrels}, line {line}: {unknown!r} is no known id.")
        if gain > 0:
            relevance.setdefault(query, {})[row_of[document]] = gain
    # As in BEIR, queries without a relevant document are not scored.
    judged = [name for name in texts if name in relevance]
    if not judged:
        raise UsageError(f"{qrels} names no relevant document for any query.")
    return RetrievalTask(
        folder.resolve().name,
        tuple(texts[name] for name in judged),
        tuple(documents.values()),
        tuple(relevance[name] for name in judged),
        _digest(*(path.read_bytes() for path in (corpus, queries, qrels))),
    )


def _judgements(path: Path) -> Iterator[tuple[int, str, str, float]]:
    """Yield (line number, query id, document id, gain) of a qrels file."""
    keys = ("query-id", "corpus-id", "score")
    rows: Iterable[tuple[int, Mapping[str, Any]]]
    if path.suffix == ".tsv":
        lines = _lines(path)
        rows = (
            (number, dict(zip(keys, line.split("\t"), strict=False)))
            for number, line in enumerate(lines[1:], start=2)
            if line.strip()
        )
    else:
        rows = _jsonl(path, keys)
    for line, row in rows:
        try:
            query, document, gain = str(row["query-id"]), str(row["corpus-id"]), float(row["score"])
        except (KeyError, TypeError, ValueError):
            query, document, gain = "", "", float("nan")
        if not np.isfinite(gain):
            raise UsageError(f"{path}, line {line} is not a query id, a document id and a number.")
        yield line, query, document, gain


def _jsonl(path: Path, keys: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, object) of a JSONL file whose objects have all the keys."""
    found = False
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except ValueError:
            item = None
        if not isinstance(item, dict):
            raise UsageError(f"{path}, line {number} is not a JSON object.")
        if missing := [key for key in keys if key not in item]:
            raise UsageError(f"{path}, line {number} has no {missing[0]!r}.")
        found = True
        yield number, item
    if not found:
        raise UsageError(f"{path} is empty.")


def _lines(path: Path) -> list[str]:
    try:
        # Not splitlines(), which also breaks at characters that JSON allows inside a text.
        return path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read as UTF-8 text: {error}.") from error


def _text(value: Any, path: Path, line: int) -> str:
    if not isinstance(value, str):
        raise UsageError(f"{path}, line {line}: {value!r} is not a text.")
    return value


def _digest(*contents: bytes) -> str:
    digest = hashlib.sha256()
    for content in contents:
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()
