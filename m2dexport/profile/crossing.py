"""Queries of one cell against documents of another: may an index be queried by a smaller encoder?

What is compared is already there: each weight precision's vectors of queries and documents.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from m2dexport.checkpoint.alignment import LinearMap
from m2dexport.precisions import Align, VectorPrecision, WeightPrecision
from m2dexport.profile.maps import Maps
from m2dexport.profile.plan import Plan
from m2dexport.profile.schema import CrossDepth, cell_id, depth_name
from m2dexport.profile.surface import Corpus, Surface
from m2dexport.vectors import codecs
from m2dexport.vectors.codecs import Ranges
from m2dexport.vectors.quality import BRIEF, comparable, ranking_scores
from m2dexport.vectors.ranking import rank
from m2dexport.vectors.resample import Score
from m2dexport.vectors.retrieval import TOP, RetrievalTask

Floats = NDArray[np.float32]
_Scores = dict[str, Score]  # by "task/metric"


@dataclass(frozen=True)
class _Depth:
    """One depth's vectors of one retrieval task: (texts, width), neither cut nor normalised."""

    queries: Floats
    documents: Floats


@dataclass(frozen=True)
class Side:
    """What one weight precision of a sweep leaves behind to be crossed with the others."""

    depths: Mapping[tuple[str, int], _Depth]  # (task, depth)
    static: Mapping[tuple[str, int], _Depth]  # (task, dim): depth 0
    linear: Mapping[tuple[int, int], LinearMap]  # (depth, dim)
    ranges: Mapping[int, Ranges]  # dim -> those of the full depth, where it was measured


def side_of(
    surface: Surface,
    static: Mapping[int, Floats],
    maps: Maps,
    corpus: Corpus,
    plan: Plan,
    full: int,
) -> Side:
    """Return what is kept of a weight precision: the vectors of retrieval tasks.

    Args:
        surface: the transformer's depths.
        static: dim -> the vectors of depth 0, (texts, dim).
        maps: as these weights store them.
        corpus: whose rows they are.
        plan: the dims.
        full: the full depth.
    """
    tasks = [(task, rows) for task, rows in corpus.tasks if isinstance(task, RetrievalTask)]

    def part(vectors: Floats, rows: tuple[list[int], ...]) -> _Depth:
        return _Depth(vectors[rows[0]], vectors[rows[1]])

    whole = surface.depths.get(full)
    calibration = None if whole is None else whole.vectors[list(corpus.calibration)]
    return Side(
        {
            (task.name, layers): part(depth.vectors, rows)
            for task, rows in tasks
            for layers, depth in surface.depths.items()
        },
        {
            (task.name, dim): part(vectors, rows)
            for task, rows in tasks
            for dim, vectors in static.items()
        },
        maps.linear,
        {}
        if calibration is None
        else {dim: codecs.calibrate_ranges(codecs.truncate(calibration, dim)) for dim in plan.dims},
    )


@dataclass(frozen=True)
class Crossing:
    """All weight precisions of a sweep, to be crossed."""

    sides: Mapping[WeightPrecision, Side]
    tasks: tuple[RetrievalTask, ...]
    plan: Plan
    full: int  # the full depth

    def as_queries(self) -> dict[str, dict[str, _Scores]]:
        """Return cell -> index cell -> what the cell's queries find in what the index cell wrote.

        The index is the full depth's, of the same dim and vector precision, in the reference's
        weights or in those of the cell.
        """
        found: dict[str, dict[str, _Scores]] = {}
        reference = self.plan.weights[0]
        for index, dim, vectors in product(self.sides, self.plan.dims, self.plan.vectors):
            side = self.sides[index]
            if dim not in side.ranges:  # the full depth was not measured, or failed
                continue
            written = self._id(self.full, dim, index, vectors)
            for task in self.tasks:
                documents = codecs.truncate(side.depths[task.name, self.full].documents, dim)
                stored = comparable(documents, vectors, side.ranges[dim])
                asking = self.sides if index == reference else (index,)
                for name, queries in self._queries(task, dim, vectors, asking):
                    if name != written:
                        asked = comparable(queries, vectors, side.ranges[dim])
                        scores = _scores(task, asked, stored)
                        found.setdefault(name, {}).setdefault(written, {}).update(scores)
        return found

    def cross_depth(self) -> tuple[CrossDepth, ...]:
        """Return queries of every depth against documents of every depth, unquantized."""
        weights = next(iter(self.sides), None)
        if weights is None or not self.tasks:
            return ()
        found = []
        for dim in self.plan.dims:
            views = self._views(weights, dim)
            vectors = {
                (task.name, view, part): self._at(weights, task, *view, dim, part)
                for task, view, part in product(self.tasks, views, ("queries", "documents"))
            }
            for asking, holding in product(views, repeat=2):
                quality: _Scores = {}
                for task in self.tasks:
                    queries = vectors[task.name, asking, "queries"]
                    documents = vectors[task.name, holding, "documents"]
                    quality |= _scores(task, queries, documents)
                names = [depth_name(*view) for view in (asking, holding)]
                found.append(
                    CrossDepth(
                        dim=dim,
                        queries=names[0],
                        documents=names[1],
                        quality={name: score.points for name, score in quality.items()},
                    )
                )
        return tuple(found)

    def _queries(
        self,
        task: RetrievalTask,
        dim: int,
        vectors: VectorPrecision,
        precisions: Iterable[WeightPrecision],
    ) -> Iterator[tuple[str, Floats]]:
        """Yield the cells of a dim in some weight precisions, and their normalised queries."""
        for weights in precisions:
            for layers, align in self._views(weights, dim):
                name = self._id(layers, dim, weights, vectors, align)
                yield name, self._at(weights, task, layers, align, dim, "queries")

    def _id(
        self,
        layers: int,
        dim: int,
        weights: WeightPrecision,
        vectors: VectorPrecision,
        align: Align = "none",
    ) -> str:
        return cell_id(layers, dim, weights, vectors, align, self.plan.engine)

    def _views(self, weights: WeightPrecision, dim: int) -> list[tuple[int, Align]]:
        """Return the depths that were measured in a weight precision, plain and aligned."""
        side = self.sides[weights]
        measured = {layers for _, layers in side.depths}
        views = []
        for layers in self.plan.layers:
            for align in self.plan.alignments(layers, self.full):
                if layers == 0:
                    there = any(key[1] == dim for key in side.static)
                else:
                    mapped = align == "none" or (layers, dim) in side.linear
                    there = layers in measured and mapped
                if there:
                    views.append((layers, align))
        return views

    def _at(
        self,
        weights: WeightPrecision,
        task: RetrievalTask,
        layers: int,
        align: Align,
        dim: int,
        part: str,
    ) -> Floats:
        """Return normalised (texts, dim) vectors of a task's queries or documents."""
        side = self.sides[weights]
        if layers == 0:
            return codecs.normalize(getattr(side.static[task.name, dim], part))
        found: Floats = getattr(side.depths[task.name, layers], part)
        if align == "none":
            return codecs.truncate(found, dim)
        return codecs.normalize(side.linear[layers, dim](codecs.normalize(found)))


def _scores(task: RetrievalTask, queries: Floats, documents: Floats) -> _Scores:
    own = np.array(task.own, dtype=np.intp) if task.own else None
    scores = ranking_scores(task, rank(queries, documents, TOP, own), only=BRIEF)
    return {f"{task.name}/{metric}": score for metric, score in scores.items()}
