"""Choosing: the best cell of a profile within a budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from m2dexport.errors import M2DError, UsageError
from m2dexport.profile.frontier import (
    LATENCY_GRAIN_MS,
    Quality,
    Relations,
    beating,
    on_frontier,
    points_of,
    relations,
)
from m2dexport.profile.limits import Standing, fits, missed_by, standings
from m2dexport.profile.measured_for import require_measured_for
from m2dexport.profile.schema import MEAN, Cell, Profile
from m2dexport.profile.target import Budget, budget_from, is_shipped, load_target
from m2dexport.vectors.resample import Score, difference, interval

_SHOWN = 3
#: Cells that miss the budget by shares that differ by less than this miss it alike.
_AS_NEAR = 0.05


@dataclass(frozen=True)
class Choice:
    """A cell that fits a budget."""

    cell: Cell
    points: float  # in the budget's metric
    interval: tuple[float, float] | None  # 95%, of the points; None: it is not known
    loss: float  # below the full fp32 cell; with an index, below its own queries
    loss_interval: tuple[float, float] | None  # None: the metric has no replicates
    standings: tuple[Standing, ...]  # against every limit


@dataclass(frozen=True)
class Selection:
    """The best cell within a budget."""

    cell: Cell
    points: float  # in the budget's metric
    metric: str
    binding: str | None  # the limit without which a better cell would fit; None: none does
    next_better: Cell | None  # that cell
    best: tuple[Choice, ...]  # at most three: the cell itself, then the best others that fit
    beaten_by: Cell | None = None  # off the frontier: what beats the cell, and does not fit
    #: Off the frontier, but better and fitting: what beats it does not fit.
    passed_over: Choice | None = None
    without_consent: Cell | None = None  # would be chosen if its vectors might depend on the batch
    index: Cell | None = None  # that wrote the index whose query encoder was chosen
    native: float = 0.0  # points of its own queries
    #: With an index: cells of the frontier that can query it and their points, best first.
    encoders: tuple[tuple[Cell, float], ...] = ()

    @property
    def by_one_metric(self) -> bool:
        """Whether quality is one metric, and not their mean."""
        return self.metric != MEAN


@dataclass(frozen=True)
class Pool:
    """Cells of one target, compared in one metric."""

    cells: Sequence[Cell]
    qualities: Sequence[Quality]
    found: Relations
    on: Sequence[bool]  # the frontier
    standings: Sequence[tuple[Standing, ...]]

    def best_first(self, indices: Sequence[int]) -> list[int]:
        """Return indices, that of the most points first, and of those the cheapest."""
        return sorted(indices, key=lambda i: (-self.found.points[i], cost(self.cells[i])))

    def better(self, indices: Sequence[int], than: int) -> list[int]:
        """Return which are better than a cell beyond noise, the best first."""
        return self.best_first([index for index in indices if self.found.better[index, than]])


def cost(cell: Cell) -> tuple[float, str]:
    """Return what orders cells that are as good: log of p50 x size x bytes per vector, then id."""
    p50 = cell.p50_ms + LATENCY_GRAIN_MS  # less is noise
    return math.log(p50 * cell.size_bytes * cell.bytes_per_vector), cell.id


def pool_of(cells: Sequence[Cell], qualities: Sequence[Quality], budget: Budget) -> Pool:
    """Compare cells of one target with each other and with a budget.

    Args:
        cells: the cells, one or more.
        qualities: a figure per cell, in the budget's metric.
        budget: the limits.
    """
    found = relations(cells, qualities)
    against = [standings(*each, budget) for each in zip(cells, qualities, strict=True)]
    return Pool(cells, qualities, found, on_frontier(found).tolist(), against)


def cheapest_of_the_best(pool: Pool, among: Sequence[int]) -> int:
    """Return which cell to take: of those that none is better than, beyond noise, the cheapest.

    Args:
        pool: cells of a target.
        among: indices of those to choose from, one or more.
    """
    worse = np.any(pool.found.better[np.ix_(among, among)], axis=0)
    as_good: list[int] = [among[index] for index in np.flatnonzero(~worse).tolist()]
    return min(as_good, key=lambda index: cost(pool.cells[index]))


def take(pool: Pool, among: Sequence[int]) -> int | None:
    """Return which cell to take of those that fit; None: none does.

    Only when no cell of the frontier fits is one taken that others beat, which do not fit.

    Args:
        pool: cells of a target.
        among: indices of those that may be taken.
    """
    fitting = [index for index in among if fits(pool.standings[index])]
    on = [index for index in fitting if pool.on[index]]
    if fitting and not on:
        cells = [pool.cells[index] for index in fitting]
        best = on_frontier(relations(cells, [pool.qualities[index] for index in fitting]))
        on = [index for index, is_best in zip(fitting, best, strict=True) if is_best]
    return cheapest_of_the_best(pool, on) if on else None


def select_cell(
    profile: Profile,
    budget: Budget,
    index: str | None = None,
    *,
    target: str | None = None,
    allow_batch_dependent: bool = False,
) -> Selection:
    """Return the cell of the frontier to take within a budget.

    Of the cells of the frontier that fit, those are as good as the best that none is better than
    beyond noise; the one of the least p50 x size x bytes per vector is taken. The frontier is that
    of the budget's metric. Only when none of it fits are cells taken that others beat. With an
    index, quality is that of queries to it.

    Args:
        profile: the profile.
        budget: the limits.
        index: the id of the cell that wrote an index, to choose what queries it.
        target: whose cells to choose from; None: those of the only target.
        allow_batch_dependent: whether cells whose vectors depend on the batch may be chosen.

    Raises:
        UsageError: when the profile lacks the target, the budget's metric, or the index cell, or
            that is not of the full depth; when it has several targets and none is named.
        M2DError: when no cell fits, saying which is nearest and which limit to raise.
    """
    target = profile_target(profile, target)
    wrote = None if index is None else _index_cell(profile, index, target)
    pool = _pool(profile, budget, wrote, target)
    asked = [i for i in range(len(pool.cells)) if pool.found.eligible[i]]
    open_to = [i for i in asked if allow_batch_dependent or not needs_consent(pool.cells[i])]
    chosen, freely = take(pool, open_to), take(pool, asked)
    if chosen is None or freely is None:
        raise M2DError(_nothing_fits(pool, open_to, budget.metric))
    # A device that was added need not have measured the full cell; quality is the same on any.
    whole = profile.reference_cell() if wrote is None else wrote
    full = _quality(profile, whole, budget.metric, wrote)
    assert full is not None  # that of a cell's own vectors
    selection = _selection(pool, open_to, chosen, full, budget.metric)
    if freely != chosen:
        selection = replace(selection, without_consent=pool.cells[freely])
    if wrote is None:
        return selection
    on = pool.best_first([i for i in open_to if pool.on[i]])
    encoders = tuple((pool.cells[i], pool.found.points[i]) for i in on)
    return replace(selection, index=wrote, native=points_of(full), encoders=encoders)


def _selection(
    pool: Pool, open_to: Sequence[int], chosen: int, full: Quality, metric: str
) -> Selection:
    """Return a choice, and what else there is to know of it; ``full`` is what it is compared to."""
    on = [i for i in open_to if pool.on[i]]
    others = [i for i in pool.best_first(on) if fits(pool.standings[i]) and i != chosen]
    passed = pool.better([i for i in open_to if fits(pool.standings[i])], chosen)
    binding, better = _binding(pool, on, chosen)
    return Selection(
        cell=pool.cells[chosen],
        points=pool.found.points[chosen],
        metric=metric,
        binding=binding,
        next_better=better,
        best=tuple(_as_choice(pool, i, full) for i in (chosen, *others)[:_SHOWN]),
        beaten_by=None if pool.on[chosen] else _beater(pool, chosen),
        passed_over=_as_choice(pool, passed[0], full) if passed else None,
    )


def profile_target(profile: Profile, name: str | None) -> str:
    """Return the name of the target that is meant.

    Raises:
        UsageError: when the profile lacks it, or has several and none is named.
    """
    if name is None and len(profile.targets) > 1:
        known = ", ".join(target.name for target in profile.targets)
        raise UsageError(f"the profile has several targets; name one by --target: {known}.")
    return profile.target(name).name


def budget_for(
    profile: Profile, target: str | None, *, unlimited: bool = False, **limits: Any
) -> tuple[str, Budget]:
    """Return whose cells to choose from, and the budget.

    Where the profile holds the target, that is where its cells were measured; a budget that the
    profile does not hold is read from the target itself, and so is that of a .toml file.

    Args:
        profile: the profile.
        target: the name of one of its targets, of a shipped one, or a .toml file; None: the only
            target of the profile, and no budget but the limits.
        unlimited: whether a budget without any limit will do.
        limits: that replace the target's; None stands for none.

    Raises:
        UsageError: when no target is named and there are several, the profile was not measured for
            the target that is, or nothing is limited.
    """
    metric = limits.get("metric")
    if metric is not None:
        profile.metric(profile.cells[0], metric)  # refused where there is none of that name
        unlimited = True
    if target is None:
        only = profile_target(profile, None)
        return only, budget_from(None, unlimited=unlimited, **limits)
    name = Path(target).stem
    held = {each.name: each for each in profile.targets}.get(name)
    if held is None:
        require_measured_for(profile, load_target(target))
        return profile.targets[0].name, budget_from(target, unlimited=unlimited, **limits)
    from_file = target != name
    if from_file:
        require_measured_for(profile, load_target(target), name)
    base = target if from_file or (is_shipped(name) and not held.budget) else held.budget
    return name, budget_from(base, unlimited=unlimited, **limits)


def _index_cell(profile: Profile, name: str, target: str) -> Cell:
    held = {cell.id for cell in profile.of_target(target)}
    wrote = profile.cell(name, target if name in held else None)  # it may be another machine's
    full = profile.checkpoint.layers
    if wrote.layers != full:
        raise UsageError(
            f"{name} is a cell of depth {wrote.layers}, and encoders are aligned with the full "
            f"depth; name a cell of {full} layers."
        )
    return wrote


def _pool(profile: Profile, budget: Budget, index: Cell | None, target: str) -> Pool:
    """Compare the cells of a target; with an index, those whose vectors may be put to it."""
    known = {
        cell.id: (cell, quality)
        for cell in profile.of_target(target)
        if index is None or cell.align == "full" or cell.layers == index.layers
        if (quality := _quality(profile, cell, budget.metric, index)) is not None
    }
    cells, qualities = [each[0] for each in known.values()], [each[1] for each in known.values()]
    return pool_of(cells, qualities, budget)


def _quality(profile: Profile, cell: Cell, metric: str, index: Cell | None) -> Quality | None:
    """Return a cell's figure in a metric; None: it was not measured on the index."""
    points: float | None
    if index is None:
        points = profile.metric(cell, metric)
    else:
        points = profile.query_metric(cell, index, metric)
    if points is None:
        return None
    return profile.score(cell, metric, index) or points


def needs_consent(cell: Cell) -> bool:
    """Say whether a cell's vectors depend on the batch, as not everyone can accept."""
    return "batch_dependent" in cell.flags


def _beater(pool: Pool, index: int) -> Cell | None:
    beaters = np.flatnonzero(beating(pool.found)[:, index] & np.array(pool.on)).tolist()
    return pool.cells[pool.best_first(beaters)[0]] if beaters else None


def _as_choice(pool: Pool, index: int, full: Quality) -> Choice:
    quality, between = pool.qualities[index], None
    if isinstance(quality, Score) and isinstance(full, Score):
        between = interval(difference(full, quality))
    return Choice(
        cell=pool.cells[index],
        points=points_of(quality),
        interval=interval(quality) if isinstance(quality, Score) else None,
        loss=points_of(full) - points_of(quality),
        loss_interval=between,
        standings=pool.standings[index],
    )


def _binding(pool: Pool, on: Sequence[int], chosen: int) -> tuple[str | None, Cell | None]:
    """Return the limit whose removal admits the best cell that is better than the chosen one."""
    better = pool.better(on, chosen)
    missing = [missed_by(pool.standings[i]) for i in better]
    for index, missed in zip(better, missing, strict=True):
        if len(missed) == 1:
            return missed[0].key, pool.cells[index]
    for index, missed in zip(better, missing, strict=True):
        if missed:
            return " and ".join(each.key for each in missed), pool.cells[index]
    return None, None


def _nothing_fits(pool: Pool, indices: Sequence[int], metric: str) -> str:
    """Return which cell misses the budget by the least, and what one limit more would allow."""
    excess = {i: max((each.excess() for each in pool.standings[i]), default=0) for i in indices}
    least = min(excess.values())
    alike = [i for i in indices if excess[i] <= least + _AS_NEAR * (1 + least)]
    nearest = _best(pool, alike)
    missed = "; ".join(each.missed() for each in missed_by(pool.standings[nearest]))
    said = f"no cell fits the budget; the nearest is {pool.cells[nearest].id}: {missed}"
    single = [i for i in indices if len(missed_by(pool.standings[i])) == 1]
    if not single:
        return f"{said}."
    best = _best(pool, single)
    remedy = missed_by(pool.standings[best])[0].remedy()
    points = f"{metric} {pool.found.points[best]:.2f}"
    return f"{said}; {remedy} for {pool.cells[best].id} with {points}."


def _best(pool: Pool, among: Sequence[int]) -> int:
    """Return the best of some cells, of the frontier where one of them is on it."""
    return cheapest_of_the_best(pool, [i for i in among if pool.on[i]] or among)
