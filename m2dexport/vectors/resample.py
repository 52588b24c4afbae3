"""Bootstrap resamples of evaluation data: how far a figure would move with other data of its kind.

The pairs or queries of a task are drawn with replacement, ``REPLICATES`` times. The draws follow
from the task's content alone, so every cell of every profile sees the same ones, and two cells are
compared replicate by replicate: what they have in common cancels out (Efron and Tibshirani, "An
Introduction to the Bootstrap", 1993, sections 13.3 and 16.4; paired: Koehn, "Statistical
Significance Tests for Machine Translation Evaluation", 2004).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

REPLICATES = 256
#: The bounds of an interval, in percent of the replicates: 95% lie within.
BOUNDS = (2.5, 97.5)

Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class Score:
    """A figure in points, 0 to 100, and what it is on each resample of the data."""

    points: float
    replicates: Doubles  # (REPLICATES,), in points


@lru_cache(maxsize=8)
def draws(sha256: str, count: int) -> NDArray[np.uint8]:
    """Return how often each of ``count`` items is drawn by each replicate, (REPLICATES, count).

    Args:
        sha256: hex digest of the data, which seeds the draws.
        count: items of the data, 1 or more.
    """
    random = np.random.default_rng(list(sha256.encode()))
    found = np.empty((REPLICATES, count), dtype=np.uint8)  # of 255 times nothing was ever drawn
    for row in found:
        row[:] = np.bincount(random.integers(0, count, count), minlength=count)
    found.setflags(write=False)
    return found


def mean_of_items(values: Doubles, weights: NDArray[np.uint8]) -> Score:
    """Return the mean of one value per item, (items,), in points already."""
    return Score(float(values.mean()), weights @ values / len(values))


def mean_of(scores: Sequence[Score]) -> Score:
    """Return the unweighted mean of figures of several tasks, which are drawn independently."""
    return Score(
        float(np.mean([score.points for score in scores])),
        np.mean([score.replicates for score in scores], axis=0),
    )


def interval(score: Score) -> tuple[float, float]:
    """Return the 95% percentile interval of a figure, widened to hold the figure itself."""
    low, high = np.percentile(score.replicates, BOUNDS)
    return min(float(low), score.points), max(float(high), score.points)


def difference(first: Score, second: Score) -> Score:
    """Return by how much the first exceeds the second, replicate by replicate."""
    return Score(first.points - second.points, first.replicates - second.replicates)


def weighted_ranks(values: Doubles, weights: NDArray[np.uint8]) -> Doubles:
    """Return the mid-ranks of values in each resample, (replicates, items).

    An item that is drawn twice counts as two that tie. Ranks of items that are not drawn mean
    nothing.

    Args:
        values: (items,), which tie where they are equal.
        weights: (replicates, items) as from ``draws``.
    """
    order = np.argsort(values, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(values[order])), len(values) - 1)
    sums = np.cumsum(weights[:, order], axis=1, dtype=np.float64)[:, ends]
    before = np.concatenate([np.zeros((len(weights), 1)), sums[:, :-1]], axis=1)
    group = np.empty(len(values), dtype=np.intp)
    group[order] = np.repeat(np.arange(len(ends)), np.diff(ends, prepend=-1))
    middles: Doubles = (before + sums + 1) / 2
    return middles[:, group]


def weighted_correlation(first: Doubles, second: Doubles, weights: NDArray[np.uint8]) -> Doubles:
    """Return Pearson's correlation in each resample, (replicates,); 0 where one side is constant.

    Args:
        first: (items,) or (replicates, items).
        second: likewise.
        weights: (replicates, items) as from ``draws``.
    """
    shares = weights / weights.sum(axis=1, keepdims=True, dtype=np.float64)
    a, b = (values - (shares * values).sum(axis=1, keepdims=True) for values in (first, second))
    covariance = (shares * a * b).sum(axis=1)
    spread = np.sqrt((shares * a * a).sum(axis=1) * (shares * b * b).sum(axis=1))
    found: Doubles = np.zeros(len(weights))
    np.divide(covariance, spread, out=found, where=spread > 1e-12)
    return found
