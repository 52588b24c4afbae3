"""Queries of one cell against documents of another: may an index be queried by a smaller encoder?

What is compared is already there: the vectors of a pass, and the documents that the full depth
wrote in the reference's weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from m2dexport.precisions import Align, VectorPrecision, WeightPrecision
from m2dexport.profile.grid import Graph, Pass, graph_of
from m2dexport.profile.maps import Maps
from m2dexport.profile.schema import CrossDepth, depth_name
from m2dexport.profile.surface import Corpus, Surface
from m2dexport.vectors import codecs
from m2dexport.vectors.codecs import Ranges
from m2dexport.vectors.quality import BRIEF, comparable, ranking_scores, score_ranking
from m2dexport.vectors.ranking import Rows, rank
from m2dexport.vectors.resample import Score
from m2dexport.vectors.retrieval import TOP, RetrievalTask

Floats = NDArray[np.float32]
_Scores = dict[str, Score]  # by "task/metric"
_View = tuple[int, Align]  # depth, and whether it is aligned
_RANGES = "ranges.json"


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
    side: Side, indexes: Iterable[Index], wanted: frozenset[str]
) -> dict[str, dict[str, _Scores]]:
    """Return cell -> index cell -> what the cell's queries find in what the index cell wrote.

    The index cell has the same dim and vector precision.

    Args:
        side: whose queries they are.
        indexes: the full depth's, in the weights of the pass and in the reference's.
        wanted: ids of all cells that there will be.
    """
    found: dict[str, dict[str, _Scores]] = {}
    plan = side.one.plan
    for index, dim, vectors in product(indexes, plan.dims, plan.vectors):
        written = Graph(side.full, index.weights, engine=index.engine).cell(dim, vectors)
        asking = [
            (name, view)
            for view in side.views(dim)
            if (name := _id(side, view, dim, vectors)) in side.one.wanted and name != written
        ]
        if written not in wanted or dim not in index.ranges or not asking:
            continue
        ranges = index.ranges[dim]
        for (task, rows), documents in zip(side.tasks, index.documents, strict=True):
            stored = comparable(codecs.truncate(documents, dim), vectors, ranges)
            for name, view in asking:
                asked = comparable(side.at(view, dim, rows[0]), vectors, ranges)
                scores = _scores(task, asked, stored)
                found.setdefault(name, {}).setdefault(written, {}).update(scores)
    return found


def _id(side: Side, view: _View, dim: int, vectors: VectorPrecision) -> str:
    graph = graph_of(side.one.plan, view[0], side.one.weights, view[1], dim)
    return graph.cell(dim, vectors)


def cross_depth(side: Side) -> tuple[CrossDepth, ...]:
    """Return queries of every depth against documents of every depth, unquantized."""
    found = []
    for dim in side.one.plan.dims if side.tasks else ():
        qualities: dict[tuple[_View, _View], dict[str, float]] = {}
        for task, rows in side.tasks:
            queries = {view: side.at(view, dim, rows[0]) for view in side.views(dim)}
            for holding in queries:  # whose documents may be large: one after the other
                documents = side.at(holding, dim, rows[1])
                for asking, vectors in queries.items():
                    points = score_ranking(task, _ranked(task, vectors, documents))
                    kept = {f"{task.name}/{metric}": points[metric] for metric in BRIEF}
                    qualities.setdefault((asking, holding), {}).update(kept)
        for asking, holding in product(side.views(dim), repeat=2):
            found.append(
                CrossDepth(
                    dim=dim,
                    queries=depth_name(*asking),
                    documents=depth_name(*holding),
                    quality=qualities[asking, holding],
                )
            )
    return tuple(found)


def _scores(task: RetrievalTask, queries: Floats, documents: Floats) -> _Scores:
    scores = ranking_scores(task, _ranked(task, queries, documents), only=BRIEF)
    return {f"{task.name}/{metric}": score for metric, score in scores.items()}


def _ranked(task: RetrievalTask, queries: Floats, documents: Floats) -> Rows:
    own = np.array(task.own, dtype=np.intp) if task.own else None
    return rank(queries, documents, TOP, own)
