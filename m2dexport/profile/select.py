"""Choosing: the Pareto frontier of a profile, and the best cell within a budget."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from m2dexport.engines import ENGINES
from m2dexport.errors import M2DError, UsageError
from m2dexport.profile.schema import Cell, Profile, Recommended
from m2dexport.profile.target import Budget, Target

_MEGA = 1e6

#: Smaller differences than these decide nothing: points of quality, factors of latency and size.
QUALITY_NOISE = 0.1
LATENCY_NOISE = 1.05
SIZE_NOISE = 1.01
#: So are smaller differences of latency than this, in ms: a table of token vectors takes some tens
#: of microseconds, and what ran before it decides how many.
LATENCY_GRAIN_MS = 0.02


@dataclass(frozen=True)
class Selection:
    """The best cell within a budget."""

    cell: Cell
    points: float  # in the budget's metric
    metric: str
    binding: str | None  # the limit without which a better cell would fit; None: none does
    next_better: Cell | None  # that cell
    index: Cell | None = None  # that wrote the index whose query encoder was chosen
    native: float = 0.0  # points of its own queries
    #: With an index: cells that can query it and points, best first, of which none is slower and
    #: worse than another.
    encoders: tuple[tuple[Cell, float], ...] = ()


@dataclass(frozen=True)
class _Limit:
    key: str
    limit: float
    sign: int  # 1: at most; -1: at least
    values: dict[str, float] = field(repr=False)  # cell id -> value

    def excess(self, cell: Cell) -> float:
        """Return by which share of the limit a cell misses it; 0 or less when it holds."""
        return self.sign * (self.values[cell.id] - self.limit) / max(abs(self.limit), 1e-9)


def frontier(cells: Sequence[Cell]) -> frozenset[str]:
    """Return the ids of the cells that no other cell dominates.

    A cell dominates another when it is no worse in mean quality, p50 latency, file size and bytes
    per vector, and better in one of them. Differences of quality, latency and size within
    ``QUALITY_NOISE``, ``LATENCY_NOISE``, ``LATENCY_GRAIN_MS`` and ``SIZE_NOISE`` count as none.
    """
    quality = np.array([cell.mean_quality for cell in cells])
    cost = np.array([[cell.p50_ms, cell.size_bytes, cell.bytes_per_vector] for cell in cells])
    noise = np.array([LATENCY_NOISE, SIZE_NOISE, 1])
    grain = np.array([LATENCY_GRAIN_MS, 0, 0])
    best = []
    for index, cell in enumerate(cells):
        no_dearer = (cost <= cost[index] * noise + grain).all(axis=1)
        no_worse = (quality >= quality[index] - QUALITY_NOISE) & no_dearer
        cheaper = (cost * noise + grain < cost[index]).any(axis=1)
        better = (quality > quality[index] + QUALITY_NOISE) | cheaper
        if not (no_worse & better).any():
            best.append(cell.id)
    return frozenset(best)


def recommend(cells: Sequence[Cell]) -> Recommended:
    """Return the cells of one target that are worth shipping first."""
    best = max(cells, key=lambda cell: cell.mean_quality)
    smallest = min(cells, key=lambda cell: cell.size_bytes)
    return Recommended(best=best.id, balanced=best.id, smallest=smallest.id, within_budget=None)


def require_measured_for(profile: Profile, target: Target) -> None:
    """Refuse to choose for a target that a profile was not measured for; warn of more threads.

    Raises:
        UsageError: when the profile's engine, provider or isa is not the target's, or its threads
            spin for longer than the target allows.
    """
    reason = _unlike(profile, target)
    if reason is not None:
        raise UsageError(f"{reason}; profile with that target first.")
    reason = _more_threads(profile, target)
    if reason is not None:
        warnings.warn(f"{reason}.", stacklevel=2)


def measured_otherwise(profile: Profile, target: Target) -> str | None:
    """Return why a profile was not measured for a target; None: it was, or might have been."""
    return _unlike(profile, target) or _more_threads(profile, target)


def _unlike(profile: Profile, target: Target) -> str | None:
    return (
        _other_engine(profile, target)
        or _other_isa(profile, target)
        or _more_spinning(profile, target)
    )


def _other_engine(profile: Profile, target: Target) -> str | None:
    cell = profile.reference_cell()
    provider = target.provider or ENGINES[target.engine].provider
    if (cell.engine, cell.device.provider) == (target.engine, provider):
        return None
    return (
        f"the profile was measured with {cell.engine} on {cell.device.provider}, and the target "
        f"runs {target.engine} on {provider}"
    )


def _other_isa(profile: Profile, target: Target) -> str | None:
    made_for = {cell.isa for cell in profile.cells if cell.weights == "int8" and cell.layers > 0}
    if made_for <= {target.isa}:
        return None
    return (
        f"the profile has int8 weights of isa={', '.join(sorted(made_for))}, and the target asks "
        f"for isa={target.isa}"
    )


def _more_spinning(profile: Profile, target: Target) -> str | None:
    spun = max(each.device.spin_us for each in profile.cells)
    if target.spin_us is None or spun <= target.spin_us:
        return None
    return (
        f"the profile's threads spin for {spun} microseconds, and the target allows "
        f"{target.spin_us}"
    )


def _more_threads(profile: Profile, target: Target) -> str | None:
    if target.threads is None or profile.threads() <= target.threads:
        return None
    return (
        f"the profile was measured with {profile.threads()} threads, and the target has "
        f"{target.threads}"
    )


def select_cell(profile: Profile, budget: Budget, index: str | None = None) -> Selection:
    """Return the cell of the highest quality within the budget.

    Ties go to the lower p50, then the smaller file, the fewer vector bytes, and the id. With an
    index, quality is that of queries to it; within ``QUALITY_NOISE``, the fastest is taken.

    Args:
        profile: the profile.
        budget: the limits.
        index: the id of the cell that wrote an index, to choose what queries it.

    Raises:
        UsageError: when the profile lacks the budget's metric, or the index cell, or that is not of
            the full depth.
        M2DError: when no cell fits, naming the one that misses by the least.
    """
    wrote = None if index is None else _index_cell(profile, index)
    points = _points(profile, budget.metric, wrote)
    limits = _limits(profile, budget, points)
    cells = [cell for cell in profile.cells if cell.id in points]
    ranked = sorted(cells, key=lambda cell: _rank(cell, points))
    fitting = [cell for cell in ranked if all(limit.excess(cell) <= 0 for limit in limits)]
    if not fitting:
        nearest = min(ranked, key=lambda cell: max(limit.excess(cell) for limit in limits))
        missed = "; ".join(
            f"{limit.key} is {limit.values[nearest.id]:.4g} where {limit.limit:g} is "
            f"{'allowed' if limit.sign > 0 else 'needed'}"
            for limit in limits
            if limit.excess(nearest) > 0
        )
        raise M2DError(f"no cell fits the budget; the nearest is {nearest.id}: {missed}.")
    best = fitting[0]
    if wrote is not None:
        near = [cell for cell in fitting if points[cell.id] >= points[best.id] - QUALITY_NOISE]
        best = min(near, key=lambda cell: (cell.p50_ms, *_rank(cell, points)))
    binding, better = _binding(ranked, fitting[0], limits)
    found = Selection(best, points[best.id], budget.metric, binding, better)
    if wrote is None:
        return found
    return replace(found, index=wrote, native=points[wrote.id], encoders=_encoders(ranked, points))


def _index_cell(profile: Profile, name: str) -> Cell:
    wrote = profile.cell(name)
    full = profile.checkpoint.layers
    if wrote.layers != full:
        raise UsageError(
            f"{name} is a cell of depth {wrote.layers}, and encoders are aligned with the full "
            f"depth; name a cell of {full} layers."
        )
    return wrote


def _points(profile: Profile, metric: str, index: Cell | None) -> dict[str, float]:
    """Return cell id -> points; with an index, of the cells whose vectors may be put to it."""
    if index is None:
        return {cell.id: profile.metric(cell, metric) for cell in profile.cells}
    found = {
        cell.id: profile.query_metric(cell, index, metric)
        for cell in profile.cells
        if cell.align == "full" or cell.layers == index.layers
    }
    return {name: points for name, points in found.items() if points is not None}


def _encoders(ranked: Sequence[Cell], points: dict[str, float]) -> tuple[tuple[Cell, float], ...]:
    """Return the cells of which none is both slower and worse than another."""
    kept: list[Cell] = []
    for cell in ranked:
        if not kept or cell.p50_ms < kept[-1].p50_ms:
            kept.append(cell)
    return tuple((cell, points[cell.id]) for cell in kept)


def _limits(profile: Profile, budget: Budget, points: dict[str, float]) -> list[_Limit]:
    def limit(key: str, sign: int, values: dict[str, float]) -> list[_Limit]:
        bound = getattr(budget, key)
        return [] if bound is None else [_Limit(key, float(bound), sign, values)]

    cells = profile.cells
    return [
        *limit("p50_ms", 1, {c.id: c.p50_ms for c in cells}),
        *limit("p95_ms", 1, {c.id: c.p95_ms for c in cells}),
        *limit("size_mb", 1, {c.id: c.size_bytes / _MEGA for c in cells}),
        *limit("memory_mb", 1, {c.id: c.peak_memory_bytes / _MEGA for c in cells}),
        *limit("vector_bytes", 1, {c.id: c.bytes_per_vector for c in cells}),
        *limit("min_quality", -1, points),
    ]


def _rank(cell: Cell, points: dict[str, float]) -> tuple[float, float, int, int, str]:
    return -points[cell.id], cell.p50_ms, cell.size_bytes, cell.bytes_per_vector, cell.id


def _binding(
    ranked: Sequence[Cell], best: Cell, limits: Sequence[_Limit]
) -> tuple[str | None, Cell | None]:
    """Return the limit whose removal admits the best cell that ranks above ``best``."""
    for cell in ranked[: ranked.index(best)]:
        missed = [limit.key for limit in limits if limit.excess(cell) > 0]
        if len(missed) == 1:
            return missed[0], cell
    if ranked[0] is not best:
        missed = [limit.key for limit in limits if limit.excess(ranked[0]) > 0]
        return " and ".join(missed), ranked[0]
    return None, None
