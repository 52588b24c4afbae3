"""Queries of one cell against documents of another: may an index be queried by a smaller encoder?

What is compared is already there: the vectors of a pass, and the documents that the full depth
wrote in the reference's weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from m2dexport.precisions import VectorPrecision, WeightPrecision
from m2dexport.profile.grid import Graph, Pass, graph_of
from m2dexport.profile.schema import CrossDepth
from m2dexport.profile.surface import Corpus
from m2dexport.profile.views import View
from m2dexport.vectors import codecs
from m2dexport.vectors.codecs import Ranges
from m2dexport.vectors.quality import BRIEF, comparable, ranking_scores, score_ranking
from m2dexport.vectors.ranking import Doubles, Rows, rank, rounded
from m2dexport.vectors.resample import Score
from m2dexport.vectors.retrieval import TOP, RetrievalTask

Floats = NDArray[np.float32]
_Scores = dict[str, Score]  # by "task/metric"
_RANGES = "ranges.json"
#: Queries of up to so many bytes are rounded once, to twice as many, and not for all documents.
_ROUNDED_ONCE = 64 << 20


@dataclass(frozen=True)
class Index:
    """What the full depth of one pass wrote."""

    engine: str
    weights: WeightPrecision
    documents: Sequence[Floats]  # of each retrieval task: (texts, width), as they were pooled
    ranges: Mapping[int, Ranges]  # dim -> those that its vectors are coded with

    def write(self, folder: Path) -> None:
        """Write an index into a new folder, for passes to come."""
        folder.mkdir()
        for number, documents in enumerate(self.documents):
            np.save(folder / f"{number}.npy", documents)
        stored = {dim: ranges.to_json() for dim, ranges in self.ranges.items()}
        kept = {"engine": self.engine, "weights": self.weights, "ranges": stored}
        (folder / _RANGES).write_text(json.dumps(kept), encoding="utf-8")


def read_index(folder: Path) -> Index:
    """Return an index that was written; its documents stay on disk."""
    stored = json.loads((folder / _RANGES).read_text(encoding="utf-8"))
    count = len(list(folder.glob("*.npy")))
    return Index(
        stored["engine"],
        stored["weights"],
        [np.load(folder / f"{number}.npy", mmap_mode="r") for number in range(count)],
        {int(dim): codecs.ranges_from_json(text) for dim, text in stored["ranges"].items()},
    )


@dataclass(frozen=True)
class Side:
    """The vectors of one pass, to be crossed."""

    one: Pass
    views: tuple[View, ...]  # in the order of the plan
    tasks: tuple[tuple[RetrievalTask, tuple[Rows, ...]], ...]  # and the rows of their texts
    full: int  # the full depth

    def at(self, dim: int) -> list[View]:
        """Return the depths that are there at a dim, plain and aligned."""
        return [view for view in self.views if view.dim == dim]

    def index(self, calibration: Sequence[int]) -> Index | None:
        """Return what the full depth wrote; None where it was not measured, or failed.

        Args:
            calibration: the rows of the texts that freeze ranges.
        """
        vectors = next((view.vectors for view in self.views if view.layers == self.full), None)
        if vectors is None:
            return None
        known = vectors[list(calibration)]
        dims = self.one.plan.dims
        ranges = {dim: codecs.calibrate_ranges(codecs.truncate(known, dim)) for dim in dims}
        documents = [vectors[rows[1]] for _, rows in self.tasks]
        return Index(self.one.plan.engine, self.one.weights, documents, ranges)


def side_of(views: Iterable[View], corpus: Corpus, one: Pass, full: int) -> Side:
    """Return what of a pass is crossed: the vectors of retrieval tasks.

    Args:
        views: of the transformer's depths and of depth 0.
        corpus: whose vectors they are.
        one: the pass.
        full: the full depth.
    """
    tasks = tuple((task, rows) for task, rows in corpus.tasks if isinstance(task, RetrievalTask))
    layers, aligns = one.plan.layers, one.plan.align
    ordered = sorted(views, key=lambda view: (layers.index(view.layers), aligns.index(view.align)))
    return Side(one, tuple(ordered), tasks, full)


def as_queries(
    side: Side, indexes: Sequence[Index], wanted: frozenset[str], threads: Executor
) -> dict[str, dict[str, _Scores]]:
    """Return cell -> index cell -> what the cell's queries find in what the index cell wrote.

    The index cell has the same dim and vector precision.

    Args:
        side: whose queries they are.
        indexes: the full depth's, in the weights of the pass and in the reference's.
        wanted: ids of all cells that there will be.
        threads: that score.
    """

    def asked(at: tuple[int, int]) -> list[tuple[str, str, _Scores]]:
        return list(_asked(side, indexes, wanted, *at))

    found: dict[str, dict[str, _Scores]] = {}
    # The widest first, which take longest.
    dims = sorted(side.one.plan.dims, reverse=True)
    for of_task in threads.map(asked, product(dims, range(len(side.tasks)))):
        for name, written, scores in of_task:
            found.setdefault(name, {}).setdefault(written, {}).update(scores)
    return found


def _asked(
    side: Side, indexes: Sequence[Index], wanted: frozenset[str], dim: int, number: int
) -> Iterator[tuple[str, str, _Scores]]:
    """Yield a cell, an index cell, and what the one's queries of a task find in the other."""
    plan, (task, rows) = side.one.plan, side.tasks[number]
    queries = [(view, view.at(rows[0])) for view in side.at(dim)]
    for vectors in plan.vectors:
        every = {_id(side, view, vectors): floats for view, floats in queries}
        named = {name: floats for name, floats in every.items() if name in side.one.wanted}
        asked: Floats | None = None
        for index in indexes:
            written = Graph(side.full, index.weights, engine=index.engine).cell(dim, vectors)
            if written not in wanted or dim not in index.ranges or not named.keys() - {written}:
                continue
            ranges = index.ranges[dim]
            if asked is None or vectors in codecs.LEVELS:  # which are coded with the index's ranges
                coded = [comparable(floats, vectors, ranges) for floats in named.values()]
                asked = np.concatenate(coded)
            documents = codecs.truncate(index.documents[number], dim)
            rankings = _ranked(task, asked, comparable(documents, vectors, ranges))
            for name, ranking in zip(named, np.split(rankings, len(named)), strict=True):
                if name != written:
                    scores = ranking_scores(task, ranking, only=BRIEF)
                    yield name, written, {f"{task.name}/{m}": each for m, each in scores.items()}


def _id(side: Side, view: View, vectors: VectorPrecision) -> str:
    graph = graph_of(side.one.plan, view.layers, side.one.weights, view.align, view.dim)
    return graph.cell(view.dim, vectors)


def cross_depth(side: Side, threads: Executor) -> tuple[CrossDepth, ...]:
    """Return queries of every depth against documents of every depth, unquantized.

    Args:
        side: the queries and the documents.
        threads: that score.
    """
    found = []
    for dim in side.one.plan.dims if side.tasks else ():
        names = [_depth_name(view) for view in side.at(dim)]
        points: dict[tuple[str, str], dict[str, float]] = {
            pair: {} for pair in product(names, names)
        }
        for task, rows in side.tasks:
            for pair, of_task in _crossed(side, dim, task, rows, threads):
                points[pair] |= {f"{task.name}/{metric}": each for metric, each in of_task.items()}
        found += [
            CrossDepth(dim=dim, queries=asking, documents=holding, quality=quality)
            for (asking, holding), quality in points.items()
        ]
    return tuple(found)


def _crossed(
    side: Side, dim: int, task: RetrievalTask, rows: tuple[Rows, ...], threads: Executor
) -> Iterator[tuple[tuple[str, str], dict[str, float]]]:
    """Yield whose queries and whose documents, and what of a task is found."""
    views = side.at(dim)
    once = 4 * dim * len(rows[0]) * len(views) <= _ROUNDED_ONCE

    def asking(view: View) -> Floats | Doubles:
        queries = view.at(rows[0])
        return rounded(queries) if once else queries

    queries = np.concatenate(list(threads.map(asking, views)))

    def asked_by_all(holding: View) -> list[dict[str, float]]:
        rankings = _ranked(task, queries, holding.at(rows[1]))
        each_view = np.split(rankings, len(views))
        return [score_ranking(task, rankings, only=BRIEF) for rankings in each_view]

    names = [_depth_name(view) for view in views]
    for holding, found in zip(names, threads.map(asked_by_all, views), strict=True):
        for asking_name, of_task in zip(names, found, strict=True):
            yield (asking_name, holding), of_task


def _ranked(task: RetrievalTask, queries: Floats | Doubles, documents: Floats) -> Rows:
    """Rank documents for the queries of a task, which may be there several times."""
    times = len(queries) // len(task.queries)
    own = np.tile(np.array(task.own, dtype=np.intp), times) if task.own else None
    return rank(queries, documents, TOP, own)


def _depth_name(view: View) -> str:
    """Return how ``CrossDepth`` calls a depth."""
    return f"{view.layers}-aligned" if view.align == "full" else str(view.layers)
