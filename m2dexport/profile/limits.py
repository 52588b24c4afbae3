"""Limits of a budget: by how much a cell keeps or misses each, and what to raise when none fits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal

from m2dexport.profile.frontier import Quality, points_of
from m2dexport.profile.schema import MEAN, Cell
from m2dexport.profile.target import Budget
from m2dexport.vectors.resample import Score, interval

_MEGA = 1e6
_NAMES = {
    "p50_ms": ("p50", "ms"),
    "p95_ms": ("p95", "ms"),
    "size_mb": ("size", "MB"),
    "memory_mb": ("peak memory", "MB"),
    "vector_bytes": ("vector", "bytes"),
}


@dataclass(frozen=True)
class Standing:
    """How a cell stands against one limit."""

    key: str  # of the budget
    value: float  # the cell's, in the limit's unit
    bound: float
    near: bool  # the limit lies within the noise of the value

    def excess(self) -> float:
        """Return by which share of the limit the cell misses it; 0 or less when it keeps it."""
        sign = -1 if self.key == "min_quality" else 1
        return sign * (self.value - self.bound) / max(abs(self.bound), 1e-9)

    def sentence(self, metric: str = MEAN) -> str:
        """Return such as "p95 4.8 of 5 ms, within its noise"."""
        noise = ", within its noise" if self.near else ""
        if self.key == "min_quality":
            return f"{metric} {self.value:.2f} where {self.bound:g} is needed{noise}"
        name, unit = _NAMES[self.key]
        return f"{name} {self.value:.3g} of {self.bound:g} {unit}{noise}"

    def missed(self) -> str:
        """Return what is wrong, in the budget's words."""
        verb = "needed" if self.key == "min_quality" else "allowed"
        return f"{self.key} is {self.value:.4g} where {self.bound:g} is {verb}"

    def remedy(self) -> str:
        """Return the limit that the cell would keep, rounded to three digits in its favour."""
        if self.key == "min_quality":
            return f"lower {self.key} to {_rounded(self.value, up=False):g}"
        if self.key == "vector_bytes":
            return f"raise {self.key} to {self.value:g}"
        return f"raise {self.key} to {_rounded(self.value, up=True):g}"


def standings(cell: Cell, quality: Quality, budget: Budget) -> tuple[Standing, ...]:
    """Return how a cell stands against every limit of a budget.

    Args:
        cell: the cell.
        quality: its figure in the budget's metric.
        budget: the limits.
    """
    first = cell.latency[0]
    low, high = interval(quality) if isinstance(quality, Score) else (points_of(quality),) * 2
    found = {
        "p50_ms": (cell.p50_ms, first.p50_interval.low, first.p50_interval.high),
        "p95_ms": (cell.p95_ms, first.p95_interval.low, first.p95_interval.high),
        "size_mb": (cell.size_bytes / _MEGA,) * 3,
        "memory_mb": (cell.peak_memory_bytes / _MEGA,) * 3,
        "vector_bytes": (float(cell.bytes_per_vector),) * 3,
        "min_quality": (points_of(quality), low, high),
    }
    return tuple(
        Standing(key, found[key][0], bound, found[key][1] < bound < found[key][2])
        for key, bound in budget.limits().items()
    )


def fits(standing: Sequence[Standing]) -> bool:
    """Say whether a cell keeps every limit."""
    return all(each.excess() <= 0 for each in standing)


def missed_by(standing: Sequence[Standing]) -> list[Standing]:
    """Return the limits that a cell misses."""
    return [each for each in standing if each.excess() > 0]


def _rounded(value: float, *, up: bool) -> float:
    """Round to three digits, up or down."""
    digits = 2 - math.floor(math.log10(value)) if value > 0 else 0
    exact = Decimal(value).scaleb(digits)
    whole = exact.to_integral_value(ROUND_CEILING if up else ROUND_FLOOR)
    return float(whole.scaleb(-digits))
