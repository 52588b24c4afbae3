"""The frontier: which cells are worth their cost, when differences within noise count as none.

One definition serves the table, the picture and ``select``. A cell beats another of its target when
it is no dearer in any cost (p50 latency, file size, bytes per vector), no worse in quality, and
cheaper or better in one of them, all beyond noise. The frontier is the set in which no cell beats
another and of which one beats any cell off it. (Noise is not transitive: a cell may be beaten by
none but such as are beaten themselves. von Neumann and Morgenstern, "Theory of Games and Economic
Behavior", 1944, section 4.5, call such a set a solution. Without noise, it is Pareto's frontier.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from m2dexport.profile.intervals import score_from
from m2dexport.profile.schema import Cell
from m2dexport.vectors.resample import BOUNDS, Score, mean_of

#: Smaller differences than these decide nothing: points of quality, factors of latency and size.
QUALITY_NOISE = 0.1
LATENCY_NOISE = 1.05
SIZE_NOISE = 1.01
#: So are smaller differences of latency than this, in ms: a table of token vectors takes some tens
#: of microseconds, and what ran before it decides how many.
LATENCY_GRAIN_MS = 0.02

Quality = Score | float  # a figure without replicates is one that has none
Pairs = NDArray[np.bool_]  # (cells, cells): whether the row's cell is so against the column's


@dataclass(frozen=True)
class Relations:
    """How every two of some cells compare, beyond noise."""

    points: tuple[float, ...]  # of quality
    better: Pairs  # in quality
    slower: Pairs
    dearer: Pairs  # in one cost or more, of which latency is one
    #: Who may beat whom: a cell that is measured for comparison beats none, and one whose vectors
    #: depend on the batch only its like, since many cannot use it.
    rivals: Pairs
    eligible: NDArray[np.bool_]  # (cells,): the grid asks for it


def relations(cells: Sequence[Cell], qualities: Sequence[Quality] | None = None) -> Relations:
    """Compare every two cells of a target.

    Args:
        cells: the cells, one or more.
        qualities: a figure per cell, in place of their mean quality.
    """
    if qualities is None:
        qualities = [mean_score(cell) for cell in cells]
    size = np.array([cell.size_bytes for cell in cells], dtype=np.float64)
    stored = np.array([cell.bytes_per_vector for cell in cells])
    slower = slower_pairs(cells)
    dearer = slower | (size[:, None] > size * SIZE_NOISE) | (stored[:, None] > stored)
    eligible = np.array(["reference" not in cell.flags for cell in cells])
    mixing = np.array(["batch_dependent" in cell.flags for cell in cells])
    return Relations(
        points=tuple(points_of(quality) for quality in qualities),
        better=better_pairs(qualities),
        slower=slower,
        dearer=dearer,
        rivals=eligible[:, None] & (~mixing[:, None] | mixing),
        eligible=eligible if eligible.any() else ~eligible,
    )


def beating(found: Relations) -> Pairs:
    """Return which cell beats which."""
    cheaper = found.dearer.T
    beats: Pairs = found.rivals & ~found.dearer & ~found.better.T & (found.better | cheaper)
    return beats


def on_frontier(found: Relations) -> NDArray[np.bool_]:
    """Return which cells are on the frontier, (cells,)."""
    chosen: NDArray[np.bool_] = unbeaten(beating(found), found.points) & found.eligible
    return chosen


def frontier(cells: Sequence[Cell], qualities: Sequence[Quality] | None = None) -> frozenset[str]:
    """Return the ids of the cells of the frontier.

    Args:
        cells: all cells of one target.
        qualities: a figure per cell, in place of their mean quality.
    """
    if not cells:
        return frozenset()
    chosen = on_frontier(relations(cells, qualities))
    return frozenset(cell.id for cell, on in zip(cells, chosen, strict=True) if on)


def frontier_line(cells: Sequence[Cell]) -> tuple[Cell, ...]:
    """Return the cells to draw a line through, fastest first: each has more points than the last.

    The frontier has others, too, which are ahead in size or bytes per vector.

    Args:
        cells: all cells of one target, or those of its frontier.
    """
    line: list[Cell] = []
    on = (cell for cell in cells if cell.on_frontier)
    for cell in sorted(on, key=lambda c: (c.p50_ms, -c.mean_quality, c.id)):
        if not line or cell.mean_quality > line[-1].mean_quality:
            line.append(cell)
    return tuple(line)


def unbeaten(beats: Pairs, points: Sequence[float]) -> NDArray[np.bool_]:
    """Return which cells form the set that the module describes, (cells,).

    Args:
        beats: which cell beats which.
        points: their quality: where noise lets cells beat each other in a circle, the best stays,
            and what it beats and what beats it goes.
    """
    on = np.zeros(len(beats), dtype=bool)
    left = ~on
    while left.any():
        free = left & ~beats[left].any(axis=0)
        if not free.any():
            free[max(np.flatnonzero(left).tolist(), key=lambda index: points[index])] = True
        on |= free
        left &= ~free & ~beats[free].any(axis=0) & ~beats[:, free].any(axis=1)
    return on


def better_pairs(qualities: Sequence[Quality]) -> Pairs:
    """Return which figure is better than which.

    It exceeds the other by more than ``QUALITY_NOISE`` and, where all have replicates, the 95%
    interval of their difference, replicate by replicate, lies above zero.
    """
    points = np.array([points_of(each) for each in qualities])
    better: Pairs = points[:, None] - points > QUALITY_NOISE
    scores = [each for each in qualities if isinstance(each, Score)]
    if len(scores) < len(points):
        return better
    replicates = np.array([score.replicates for score in scores], dtype=np.float32)
    place = (replicates.shape[1] - 1) * BOUNDS[0] / 100  # in order, of the interval's lower end
    for index, row in enumerate(replicates):
        rivals = np.flatnonzero(better[index])
        not_above = np.count_nonzero(row <= replicates[rivals], axis=1)
        above = not_above <= int(place)
        # The lower end lies between two replicates, of which one is above zero.
        for edge in np.flatnonzero(not_above == int(place) + 1):
            above[edge] = np.percentile(row - replicates[rivals[edge]], BOUNDS[0]) > 0
        better[index, rivals] = above
    return better


def slower_pairs(cells: Sequence[Cell]) -> Pairs:
    """Return which cell's p50 is above which, beyond the noise of either.

    It exceeds the other by ``LATENCY_NOISE`` and ``LATENCY_GRAIN_MS``, and their 95% intervals do
    not meet.
    """
    p50 = np.array([cell.p50_ms for cell in cells])
    low = np.array([cell.latency[0].p50_interval.low for cell in cells])
    high = np.array([cell.latency[0].p50_interval.high for cell in cells])
    found: Pairs = (p50[:, None] > p50 * LATENCY_NOISE + LATENCY_GRAIN_MS) & (low[:, None] > high)
    return found


def mean_score(cell: Cell) -> Quality:
    """Return a cell's mean quality, with its replicates where it has them."""
    if not cell.replicates:
        return cell.mean_quality
    scores = [score_from(cell.quality[name], kept) for name, kept in cell.replicates.items()]
    return Score(cell.mean_quality, mean_of(scores).replicates)


def metric_score(cell: Cell, metric: str) -> Quality:
    """Return a cell's points in one metric that it has, with replicates where it has them."""
    kept, points = cell.replicates.get(metric), cell.quality[metric]
    return points if kept is None else score_from(points, kept)


def points_of(quality: Quality) -> float:
    """Return a figure without its replicates."""
    return quality.points if isinstance(quality, Score) else quality
