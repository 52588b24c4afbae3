"""The views of a surface, every depth at every dim, plain and aligned, and how good each is."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from m2dexport.checkpoint.alignment import LinearMap
from m2dexport.cores import at_once, threads_for
from m2dexport.precisions import Align, VectorPrecision
from m2dexport.profile.maps import Maps
from m2dexport.profile.plan import Plan
from m2dexport.profile.surface import Corpus, Surface
from m2dexport.vectors import codecs
from m2dexport.vectors.codecs import Ranges
from m2dexport.vectors.quality import ranking_of, stored_scores
from m2dexport.vectors.ranking import Rows
from m2dexport.vectors.resample import Score
from m2dexport.vectors.retrieval import RetrievalTask

Floats = NDArray[np.float32]

#: Where a cell is among the views of a pass: layers, align, dim, and vectors.
Spot = tuple[int, Align, int, VectorPrecision]


@contextmanager
def scoring_threads(threads: int | None, size: int) -> Iterator[Executor]:
    """Yield threads that score, each of which takes its products alone.

    Most products are so small that waiting for the other cores takes longer than they do.

    Args:
        threads: as for ``threads_for``; fewer where the vectors would fill the memory.
        size: bytes of the vectors of one depth.
    """
    from threadpoolctl import threadpool_limits  # sets a variable when it is imported

    most = min(threads_for(threads), at_once(2 * size))  # before and after they are coded
    with threadpool_limits(1), ThreadPoolExecutor(most) as found:
        yield found


def rankings_of(surface: Surface, corpus: Corpus, full: int) -> dict[str, Rows]:
    """Return what the full depth at its full width finds, by retrieval task."""
    vectors = surface.depths[full].vectors
    width = vectors.shape[1]
    return {
        task.name: ranking_of(task, [vectors[row] for row in rows], width)
        for task, rows in corpus.tasks
        if isinstance(task, RetrievalTask)
    }


@dataclass(frozen=True)
class View:
    """The vectors of one depth and dim, aligned or not, before they are coded."""

    layers: int
    align: Align
    dim: int
    vectors: Floats  # (texts, dim or more), of the whole corpus, as they were pooled
    ranges: Ranges | None  # that int8 and int4 are coded with; None where none are
    linear: LinearMap | None = None  # that aligns them; depth 0 is aligned as it is

    def at(self, rows: Rows) -> Floats:
        """Return the normalised (texts, dim) vectors of some texts."""
        if self.linear is None:
            return codecs.normalize(self.vectors[rows, : self.dim])
        return codecs.normalize(self.linear(codecs.normalize(self.vectors[rows])))


def views_of(surface: Surface, maps: Maps, corpus: Corpus, plan: Plan, full: int) -> Iterator[View]:
    """Yield every depth of the transformer that did not fail, plain and aligned, at every dim.

    Plain vectors are coded with ranges of their own, aligned ones with the full depth's.
    """
    ranged = any(vectors in (*codecs.LEVELS, *codecs.PER_BYTE) for vectors in plan.vectors)
    for layers, depth in surface.depths.items():
        alignments = plan.alignments(layers, full)
        if "none" in alignments:
            calibration = depth.vectors[list(corpus.calibration)]
            for dim in plan.dims:
                cut = codecs.truncate(calibration, dim) if ranged else None
                ranges = None if cut is None else codecs.calibrate_ranges(cut)
                yield View(layers, "none", dim, depth.vectors, ranges)
        for dim in plan.dims if "full" in alignments else ():
            linear = maps.linear.get((layers, dim))
            if linear is not None:
                yield View(layers, "full", dim, depth.vectors, maps.ranges[dim], linear)


def qualities(
    views: Collection[View],
    wanted: Mapping[Spot, str],
    corpus: Corpus,
    rankings: Mapping[str, Rows],
    threads: Executor,
    on_view: Callable[[int, int], None],
) -> dict[str, dict[str, Score]]:
    """Return cell id -> "task/metric" -> score.

    Args:
        views: the vectors.
        wanted: what is scored -> the id of the cell.
        corpus: whose texts they are.
        rankings: by retrieval task, what the reference cell finds.
        threads: that score a view each.
        on_view: called with how many views are done, and of how many.
    """
    cells: dict[tuple[int, Align, int], dict[VectorPrecision, str]] = {}
    for (layers, align, dim, precision), name in wanted.items():
        cells.setdefault((layers, align, dim), {})[precision] = name

    def scored(view: View) -> dict[str, dict[str, Score]]:
        names = cells.get((view.layers, view.align, view.dim), {})
        of_view: dict[str, dict[str, Score]] = {name: {} for name in names.values()}
        for task, rows in corpus.tasks if names else ():
            floats, reference = [view.at(row) for row in rows], rankings.get(task.name)
            for precision, name in names.items():
                scores = stored_scores(task, floats, precision, view.ranges, reference)
                of_view[name] |= {f"{task.name}/{each}": score for each, score in scores.items()}
        return of_view

    found: dict[str, dict[str, Score]] = {}
    for done, of_view in enumerate(threads.map(scored, views), 1):
        found |= of_view
        on_view(done, len(views))
    return found
