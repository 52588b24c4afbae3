"""What timed runs say about a quantile and a ratio, without assuming how times spread."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

_SEED = 0
_OUTSIDE = 0.025  # of the probability, on either side of an interval of 95%
_RESAMPLES = 1000
LONG_TAIL = 10  # p95 over p50


@dataclass(frozen=True)
class Ratio:
    """How many times as long one takes as another, and where that lies with 95% confidence."""

    value: float
    low: float
    high: float


@lru_cache(maxsize=64)
def _ranks(count: int, share: float) -> tuple[int, int]:
    """Return the ranks, from 1, of the values between which the quantile of a share lies."""
    below = np.arange(count + 1)
    ways = np.array([math.lgamma(k + 1) + math.lgamma(count - k + 1) for k in below])
    logs = math.lgamma(count + 1) - ways
    logs += below * math.log(share) + (count - below) * math.log1p(-share)
    sums = np.cumsum(np.exp(logs))  # of the binomial probabilities of 0, 1, ... values below it
    low = int((sums <= _OUTSIDE).sum())
    high = int((sums < 1 - _OUTSIDE).sum()) + 1
    return max(low, 1), min(high, count)


def quantile_range(times: Sequence[float], share: float) -> tuple[float, float]:
    """Return the range of 95% confidence, or more, of a quantile, from the order of the values.

    The number of values below a quantile has a binomial distribution, whatever that of the values
    (Conover, "Practical Nonparametric Statistics", 1999, section 3.2; David and Nagaraja, "Order
    Statistics", 2003, section 7.1). Where there are too few values for a bound, that is the
    smallest or largest, and the confidence is lower: of p95, below 72 values.

    Args:
        times: one or more values.
        share: of values below the quantile, such as 0.95.
    """
    ordered = sorted(times)
    low, high = _ranks(len(ordered), share)
    return ordered[low - 1], ordered[high - 1]


def ratio_of(times: Sequence[float], others: Sequence[float]) -> Ratio:
    """Return the median of one over that of another, from rounds in which both ran.

    Rounds are drawn with replacement, each with both of its times, so that a slow moment of the
    machine falls on both (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, section
    13.3: percentile interval). The draws are the same every time.

    Args:
        times: one per round.
        others: those of the same rounds, in the same order.
    """
    pairs = np.array([times, others])
    value = float(np.divide(*np.median(pairs, axis=1)))
    drawn = np.random.default_rng(_SEED).integers(0, len(times), (_RESAMPLES, len(times)))
    medians = np.median(pairs[:, drawn], axis=2)
    low, high = np.percentile(medians[0] / medians[1], (100 * _OUTSIDE, 100 * (1 - _OUTSIDE)))
    return Ratio(value, min(float(low), value), max(float(high), value))


def tail_comment(p50_ms: float, p95_ms: float) -> str | None:
    """Return a sentence on a p95 that is ten times its p50 or more, None on any other."""
    if p95_ms < LONG_TAIL * p50_ms:
        return None
    return (
        f"the p95 of {p95_ms:.2f} ms is {p95_ms / p50_ms:.0f} times the p50 of {p50_ms:.2f} ms: "
        "something else had the processor then; measure again on a quieter machine."
    )
