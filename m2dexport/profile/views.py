"""The views of a surface, every depth at every dim, plain and aligned, and how good each is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from m2dexport.cores import threads_for
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
def scoring_threads(threads: int | None) -> Iterator[Executor]:
    """Yield threads that score, each of which takes its products alone.

    Most products are so small that waiting for the other cores takes longer than they do.

    Args:
        threads: as for ``threads_for``.
    """
    from threadpoolctl import threadpool_limits  # sets a variable when it is imported

    with threadpool_limits(1), ThreadPoolExecutor(threads_for(threads)) as found:
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
    vectors: Floats  # (texts, dim or more), of the whole corpus, not normalised
    ranges: Ranges | None  # that int8 and int4 are coded with; None where none are


def views_of(surface: Surface, maps: Maps, corpus: Corpus, plan: Plan, full: int) -> Iterator[View]:
    """Yield every depth and dim that did not fail, plain and aligned.

    Plain vectors are coded with ranges of their own, aligned ones with the full depth's.
    """
    ranged = any(vectors in (*codecs.LEVELS, *codecs.PER_BYTE) for vectors in plan.vectors)
    for layers, depth in surface.depths.items():
        alignments = plan.alignments(layers, full)
        mapped = [dim for dim in plan.dims if "full" in alignments and (layers, dim) in maps.linear]
        if "none" in alignments:
            calibration = depth.vectors[list(corpus.calibration)]
            for dim in plan.dims:
                cut = codecs.truncate(calibration, dim) if ranged else None
                ranges = None if cut is None else codecs.calibrate_ranges(cut)
                yield View(layers, "none", dim, depth.vectors, ranges)
        normalized = codecs.normalize(depth.vectors) if mapped else depth.vectors
        for dim in mapped:
            aligned = maps.linear[layers, dim](normalized)
            yield View(layers, "full", dim, aligned, maps.ranges[dim])


def qualities(
    views: Iterable[View],
    wanted: Mapping[Spot, str],
    corpus: Corpus,
    rankings: Mapping[str, Rows],
    threads: Executor,
) -> dict[str, dict[str, Score]]:
    """Return cell id -> "task/metric" -> score.

    Args:
        views: the vectors, each of them needed only while it is scored.
        wanted: what is scored -> the id of the cell.
        corpus: whose texts they are.
        rankings: by retrieval task, what the reference cell finds.
        threads: that score.
    """
    found: dict[str, dict[str, Score]] = {}
    for view in views:
        spot = view.layers, view.align, view.dim
        kept = {precision: name for (*each, precision), name in wanted.items() if (*each,) == spot}
        for task, rows in corpus.tasks if kept else ():
            floats = [codecs.truncate(view.vectors[row, : view.dim], view.dim) for row in rows]
            scores = partial(
                stored_scores, task, floats, ranges=view.ranges, reference=rankings.get(task.name)
            )
            for name, scored in zip(kept.values(), threads.map(scores, kept), strict=True):
                of_task = {f"{task.name}/{metric}": score for metric, score in scored.items()}
                found.setdefault(name, {}).update(of_task)
    return found
