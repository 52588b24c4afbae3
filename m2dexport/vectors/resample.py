"""Bootstrap resamples of evaluation data: how far a figure would move with other data of its kind.

The pairs, queries or texts of a task are drawn with replacement, ``REPLICATES`` times. The draws
follow from the task's content alone, so every cell of every profile sees the same ones, and two
cells are compared replicate by replicate: what they have in common cancels out (Efron and
Tibshirani, "An Introduction to the Bootstrap", 1993, sections 13.3 and 16.4; paired: Koehn,
"Statistical Significance Tests for Machine Translation Evaluation", 2004).

Draws are counts, one column per replicate: an item that is drawn twice weighs twice, which is what
two equal items would do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

REPLICATES = 256
#: The bounds of an interval, in percent of the replicates: 95% lie within.
BOUNDS = (2.5, 97.5)

_BLOCK_VALUES = 1 << 20  # items x replicates that are computed at a time
_STRETCH = 32  # rows that are cumulated one by one
# What every cell needs again is kept: draws of so many tasks, and blocks of 4 or 8 MB at most.
_KEPT_DRAWS, _KEPT_BLOCKS, _KEPT_DOUBLES = 128, 16, 8

Doubles = NDArray[np.float64]
Singles = NDArray[np.float32]
Draws = NDArray[np.uint8]  # (items, replicates)


@dataclass(frozen=True)
class Score:
    """A figure in points, 0 to 100, and what it is on each resample of the data."""

    points: float
    replicates: Doubles  # (REPLICATES,), in points


@lru_cache(maxsize=_KEPT_DRAWS)
def draws(sha256: str, count: int) -> Draws:
    """Return how often each of ``count`` items is drawn by each replicate, (count, REPLICATES).

    Args:
        sha256: hex digest of the data, which seeds the draws.
        count: items of the data, 1 or more.
    """
    random = np.random.default_rng(list(sha256.encode()))
    found = np.empty((count, REPLICATES), dtype=np.uint8)  # of 255 times nothing was ever drawn
    for replicate in range(REPLICATES):
        found[:, replicate] = np.bincount(random.integers(0, count, count), minlength=count)
    found.setflags(write=False)
    return found


def blocks_of(weights: Draws) -> Iterator[slice]:
    """Yield the columns of draws, as many at a time as memory should hold in float32."""
    items, replicates = weights.shape
    size = max(1, min(replicates, _BLOCK_VALUES // max(1, items)))
    for start in range(0, replicates, size):
        yield slice(start, min(start + size, replicates))


def means_of_items(values: Doubles, sha256: str) -> list[Score]:
    """Return the mean over items of each row of (figures, items), in points already.

    Args:
        values: of each item.
        sha256: hex digest of the data, which seeds the draws.
    """
    sums = _weighted_sums(values, sha256)
    count = values.shape[1]
    return [
        Score(float(mean), replicates / count)
        for mean, replicates in zip(values.mean(axis=1), sums, strict=True)
    ]


def mean_of(scores: Sequence[Score]) -> Score:
    """Return the unweighted mean of figures of several tasks, which are drawn independently."""
    return Score(
        float(np.mean([score.points for score in scores])),
        np.mean([score.replicates for score in scores], axis=0),
    )


def interval(score: Score) -> tuple[float, float]:
    """Return the 95% percentile interval of a figure, widened to hold the figure itself."""
    return intervals([score])[0]


def intervals(scores: Sequence[Score]) -> list[tuple[float, float]]:
    """Return the ``interval`` of each of one figure or more, sooner than one by one."""
    bounds = np.percentile([score.replicates for score in scores], BOUNDS, axis=1).T.tolist()
    return [
        (min(low, score.points), max(high, score.points))
        for score, (low, high) in zip(scores, bounds, strict=True)
    ]


def difference(first: Score, second: Score) -> Score:
    """Return by how much the first exceeds the second, replicate by replicate."""
    return Score(first.points - second.points, first.replicates - second.replicates)


@dataclass(frozen=True, eq=False)
class Groups:
    """Items in ascending order of a value, and where those that tie stand together."""

    order: NDArray[np.intp]  # (items,)
    starts: NDArray[np.intp] | None  # (groups,) of ties in that order; None where nothing ties

    def sums(self, values: NDArray[np.uint8] | Singles) -> Singles:
        """Return the sum over each group of (items, replicates) values, (groups, replicates)."""
        if self.starts is None:
            return values[self.order].astype(np.float32, copy=False)
        from scipy.sparse import csr_array  # takes a tenth of a second to import

        ones = np.ones(len(self.order), dtype=np.float32)
        ends = np.append(self.starts, len(self.order))
        shape = len(self.starts), len(self.order)
        found: Singles = csr_array((ones, self.order, ends), shape=shape) @ values
        return found

    def cumulated(self, values: NDArray[np.uint8]) -> Singles:
        """Return ``sums`` of whole numbers, each with those of all groups before it."""
        return _cumulated(self.sums(values))


def groups_of(values: Doubles) -> Groups:
    """Return the order of (items,) values."""
    order = np.argsort(values, kind="stable")
    new = np.flatnonzero(np.diff(values[order])) + 1
    whole = len(new) == len(values) - 1
    return Groups(order, None if whole else np.concatenate([[0], new]))


@dataclass(frozen=True, eq=False)
class Given:
    """What people gave each item of a task, which the values of all its cells are compared with."""

    values: Doubles  # (items,)
    groups: Groups
    ranks: Doubles  # (items,), centred mid-ranks
    sha256: str  # hex digest of the data, which seeds the draws

    @cached_property
    def weights(self) -> Draws:
        """How often each replicate draws each item, (items, replicates)."""
        return draws(self.sha256, len(self.values))

    @cached_property
    def centred(self) -> Doubles:
        """The values, less their mean, (items,)."""
        centred: Doubles = self.values - self.values.mean()
        return centred

    @cached_property
    def spread(self) -> tuple[Doubles, Doubles]:
        """The mean and the variance of ``centred`` in each replicate, (replicates,)."""
        mean, variance = _moments(self.centred, self.sha256)
        return mean, variance


def given_of(values: Doubles, sha256: str) -> Given:
    """Return (items,) given values of data, ready to be compared."""
    groups = groups_of(values)
    return Given(values, groups, _ranks(groups), sha256)


def spearman(values: Doubles, given: Given) -> Score:
    """Return the rank correlation of (items,) values with what was given.

    Each replicate is ranked anew, so it is what scipy gives for the items drawn. It is 0 where one
    side is constant and no correlation exists.
    """
    groups = groups_of(values)
    own = _ranks(groups)
    found = []
    for block in blocks_of(given.weights):
        weighted, spread = _weighted_ranks(given, block.start, block.stop)
        counts = groups.sums(given.weights[:, block])
        ranks = _mid_ranks(counts)
        covariance = _dot(ranks, groups.sums(weighted))
        counts *= ranks
        found.append(_ratio(covariance, _dot(counts, ranks), spread))
    points = _ratio(own @ given.ranks, own @ own, given.ranks @ given.ranks)
    return Score(100 * float(points), 100 * np.concatenate(found))


def pearson(values: Doubles, given: Given) -> Score:
    """Return the linear correlation of (items,) values with what was given; 0 where none exists."""
    x, y = values - values.mean(), given.centred
    mean_y, spread_y = given.spread
    mean_x, spread_x, products = _moments(x, given.sha256, x * y)
    points = _ratio(x @ y, x @ x, y @ y) if np.ptp(values) and np.ptp(given.values) else 0.0
    return Score(100 * float(points), 100 * _ratio(products - mean_x * mean_y, spread_x, spread_y))


@lru_cache(maxsize=_KEPT_BLOCKS)
def _weighted_ranks(given: Given, start: int, stop: int) -> tuple[Singles, Doubles]:
    """Return the centred mid-ranks of what was given, times the draws, and their sum of squares."""
    weights = given.weights[:, start:stop]
    counts = given.groups.sums(weights)
    ranks = _mid_ranks(counts)
    spread = _dot(counts * ranks, ranks)
    return _spread_out(given.groups, ranks) * weights, spread


def _ranks(groups: Groups) -> Doubles:
    """Return the centred mid-rank of each item, (items,)."""
    items = len(groups.order)
    starts = np.arange(items) if groups.starts is None else groups.starts
    sizes = np.diff(starts, append=items)
    ranks = np.empty(items)
    ranks[groups.order] = np.repeat(starts + (sizes - items) / 2, sizes)
    return ranks


def _mid_ranks(counts: Singles) -> Singles:
    """Return the mid-rank of each group in each replicate, less the mean of all ranks.

    Args:
        counts: (groups, replicates): items of the group that were drawn, in ascending order.
    """
    ranks = _cumulated(counts)
    middle = ranks[-1] / 2
    ranks -= counts / 2
    ranks -= middle
    return ranks


def _cumulated(counts: Singles) -> Singles:
    """Return ``np.cumsum(counts, axis=0)`` of whole numbers, which float32 holds up to 2^24.

    Adding whole rows, of several stretches at once, is several times as fast.
    """
    groups, replicates = counts.shape
    stretches = -(-groups // _STRETCH)
    sums = np.zeros((stretches * _STRETCH, replicates), dtype=np.float32)
    sums[:groups] = counts
    parts = sums.reshape(stretches, _STRETCH, replicates)
    for row in range(1, _STRETCH):
        parts[:, row] += parts[:, row - 1]
    for stretch in range(1, stretches):
        parts[stretch] += parts[stretch - 1, -1]
    return sums[:groups]


def _moments(x: Doubles, sha256: str, *others: Doubles) -> tuple[Doubles, ...]:
    """Return the mean and the variance of centred (items,) values in each replicate.

    And the mean of others. A variance that is nothing but rounding is 0.
    """
    squares = x * x
    mean, mean_square, *means = _weighted_sums(np.stack([x, squares, *others]), sha256) / len(x)
    variance = mean_square - mean**2
    return mean, np.where(variance > 1e-12 * squares.mean(), variance, 0), *means


def _weighted_sums(values: Doubles, sha256: str) -> Doubles:
    """Return the sums of (figures, items) over each replicate's draws, (figures, replicates)."""
    items = values.shape[1]
    blocks = (
        _doubles(sha256, items, each.start, each.stop) for each in blocks_of(draws(sha256, items))
    )
    return np.concatenate([values @ block for block in blocks], axis=1)


@lru_cache(maxsize=_KEPT_DOUBLES)
def _doubles(sha256: str, items: int, start: int, stop: int) -> Doubles:
    return draws(sha256, items)[:, start:stop].astype(np.float64)


def _spread_out(groups: Groups, values: Singles) -> Singles:
    """Return for each item, in its own order, the value of its group, (items, replicates)."""
    found = np.empty((len(groups.order), values.shape[1]), dtype=np.float32)
    if groups.starts is None:
        found[groups.order] = values
    else:
        sizes = np.diff(groups.starts, append=len(groups.order))
        found[groups.order] = np.repeat(values, sizes, axis=0)
    return found


def _dot(first: Singles, second: Singles) -> Doubles:
    """Return the sum of products over axis 0, some items at a time so that float32 does."""
    total = np.zeros(first.shape[1])
    for start in range(0, len(first), 1024):
        rows = slice(start, start + 1024)
        total += np.einsum("ij,ij->j", first[rows], second[rows])
    return total


def _ratio(covariance: Doubles, first: Doubles, second: Doubles) -> Doubles:
    spread = np.sqrt(np.asarray(first) * np.asarray(second))
    found: Doubles = np.zeros_like(spread)
    np.divide(covariance, spread, out=found, where=spread > 0)
    return np.clip(found, -1, 1)
