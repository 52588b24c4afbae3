"""Queries of one cell against documents of another: may an index be queried by a smaller encoder?

What is compared is already there: the vectors of a pass, and the documents that the full depth
wrote in the reference's weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from m2dexport.precisions import Align, VectorPrecision, WeightPrecision
from m2dexport.profile.grid import Graph, Pass, graph_of
from m2dexport.profile.maps import Maps
from m2dexport.profile.schema import CrossDepth
from m2dexport.profile.surface import Corpus, Surface
from m2dexport.vectors import codecs
from m2dexport.vectors.codecs import Ranges
from m2dexport.vectors.quality import BRIEF, comparable, ranking_scores, score_ranking
from m2dexport.vectors.ranking import Doubles, Rows, rank, rounded
from m2dexport.vectors.resample import Score
from m2dexport.vectors.retrieval import TOP, RetrievalTask

Floats = NDArray[np.float32]
_Scores = dict[str, Score]  # by "task/metric"
_View = tuple[int, Align]  # depth, and whether it is aligned
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
    depths: Mapping[int, Floats]  # (texts, width) of the whole corpus, as they were pooled
    static: Mapping[int, Floats]  # dim -> those of depth 0, (texts, dim)
    maps: Maps  # as the weights of the pass store them
    tasks: tuple[tuple[RetrievalTask, tuple[list[int], ...]], ...]  # and the rows of their texts
    full: int  # the full depth

    def views(self, dim: int) -> list[_View]:
        """Return the depths that are there at a dim, plain and aligned."""
        plan = self.one.plan
        asked = [
            (layers, align)
            for layers in plan.layers
            for align in plan.alignments(layers, self.full)
        ]
        return [view for view in asked if self._there(*view, dim)]

    def _there(self, layers: int, align: Align, dim: int) -> bool:
        if layers == 0:
            return dim in self.static
        mapped = align == "none" or (layers, dim) in self.maps.linear
        return layers in self.depths and mapped

    def at(self, view: _View, dim: int, rows: list[int]) -> Floats:
        """Return normalised (texts, dim) vectors of some texts."""
        layers, align = view
        if layers == 0:
            return codecs.normalize(self.static[dim][rows])
        if align == "none":
            return codecs.normalize(self.depths[layers][rows, :dim])
        found = codecs.normalize(self.depths[layers][rows])
        return codecs.normalize(self.maps.linear[layers, dim](found))

    def index(self, calibration: Sequence[int]) -> Index | None:
        """Return what the full depth wrote; None where it was not measured, or failed.

        Args:
            calibration: the rows of the texts that freeze ranges.
        """
        vectors = self.depths.get(self.full)
        if vectors is None:
            return None
        known = vectors[list(calibration)]
        dims = self.one.plan.dims
        ranges = {dim: codecs.calibrate_ranges(codecs.truncate(known, dim)) for dim in dims}
        documents = [vectors[rows[1]] for _, rows in self.tasks]
        return Index(self.one.plan.engine, self.one.weights, documents, ranges)


def side_of(
    surface: Surface,
    static: Mapping[int, Floats],
    maps: Maps,
    corpus: Corpus,
    one: Pass,
    full: int,
) -> Side:
    """Return what of a pass is crossed: the vectors of retrieval tasks.

    Args:
        surface: the transformer's depths.
        static: dim -> the vectors of depth 0, (texts, dim).
        maps: as these weights store them.
        corpus: whose rows they are.
        one: the pass.
        full: the full depth.
    """
    depths = {layers: depth.vectors for layers, depth in surface.depths.items()}
    tasks = tuple((task, rows) for task, rows in corpus.tasks if isinstance(task, RetrievalTask))
    return Side(one, depths, static, maps, tasks, full)


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
    found: dict[str, dict[str, _Scores]] = {}
    plan = side.one.plan
    for dim, (number, (task, rows)) in product(plan.dims, enumerate(side.tasks)):
        queries = {view: side.at(view, dim, rows[0]) for view in side.views(dim)}
        for index, vectors in product(indexes, plan.vectors):
            written = Graph(side.full, index.weights, engine=index.engine).cell(dim, vectors)
            names = {_id(side, view, dim, vectors): view for view in queries}
            asking = [name for name in names if name in side.one.wanted and name != written]
            if written not in wanted or dim not in index.ranges or not asking:
                continue
            ranges = index.ranges[dim]
            documents = codecs.truncate(index.documents[number], dim)
            scores = partial(_scores, task, vectors, ranges, comparable(documents, vectors, ranges))
            scored = threads.map(scores, [queries[names[name]] for name in asking])
            for name, of_task in zip(asking, scored, strict=True):
                found.setdefault(name, {}).setdefault(written, {}).update(of_task)
    return found


def _id(side: Side, view: _View, dim: int, vectors: VectorPrecision) -> str:
    graph = graph_of(side.one.plan, view[0], side.one.weights, view[1], dim)
    return graph.cell(dim, vectors)


def cross_depth(side: Side, threads: Executor) -> tuple[CrossDepth, ...]:
    """Return queries of every depth against documents of every depth, unquantized.

    Args:
        side: the queries and the documents.
        threads: that score.
    """
    found = []
    for dim in side.one.plan.dims if side.tasks else ():
        views = side.views(dim)
        points: dict[tuple[_View, _View], dict[str, float]] = {pair: {} for pair in _pairs(views)}
        for task, rows in side.tasks:
            for pair, of_task in _crossed(side, dim, task, rows, threads):
                points[pair] |= {f"{task.name}/{metric}": each for metric, each in of_task.items()}
        found += [
            CrossDepth(
                dim=dim,
                queries=_depth_name(*asking),
                documents=_depth_name(*holding),
                quality=points[asking, holding],
            )
            for asking, holding in _pairs(views)
        ]
    return tuple(found)


def _pairs(views: Sequence[_View]) -> Iterable[tuple[_View, _View]]:
    """Return every view as the one whose queries meet documents of every view."""
    return [(asking, holding) for asking in views for holding in views]


def _crossed(
    side: Side, dim: int, task: RetrievalTask, rows: tuple[list[int], ...], threads: Executor
) -> Iterator[tuple[tuple[_View, _View], dict[str, float]]]:
    """Yield whose queries and whose documents, and what of a task is found."""
    views = side.views(dim)
    queries: Floats | Doubles = np.concatenate([side.at(view, dim, rows[0]) for view in views])
    if queries.nbytes <= _ROUNDED_ONCE:
        queries = rounded(queries)

    def asked_by_all(holding: _View) -> list[dict[str, float]]:
        rankings = _ranked(task, queries, side.at(holding, dim, rows[1]))
        each_view = np.split(rankings, len(views))
        return [score_ranking(task, rankings, only=BRIEF) for rankings in each_view]

    for holding, found in zip(views, threads.map(asked_by_all, views), strict=True):
        for asking, points in zip(views, found, strict=True):
            yield (asking, holding), points


def _scores(
    task: RetrievalTask,
    vectors: VectorPrecision,
    ranges: Ranges,
    documents: Floats,
    queries: Floats,
) -> _Scores:
    """Return what queries that are not stored yet find in documents as an index compares them."""
    ranking = _ranked(task, comparable(queries, vectors, ranges), documents)
    scores = ranking_scores(task, ranking, only=BRIEF)
    return {f"{task.name}/{metric}": score for metric, score in scores.items()}


def _ranked(task: RetrievalTask, queries: Floats | Doubles, documents: Floats) -> Rows:
    """Rank documents for the queries of a task, which may be there several times."""
    times = len(queries) // len(task.queries)
    own = np.tile(np.array(task.own, dtype=np.intp), times) if task.own else None
    return rank(queries, documents, TOP, own)


def _depth_name(layers: int, align: str) -> str:
    """Return how ``CrossDepth`` calls a depth."""
    return f"{layers}-aligned" if align == "full" else str(layers)
