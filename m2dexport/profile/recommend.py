"""Recommending: the cells of a target that are worth shipping first, and why."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from m2dexport.profile.frontier import SIZE_NOISE, better_pairs, mean_score, metric_score
from m2dexport.profile.schema import MEAN, Cell, Recommended
from m2dexport.profile.select import Pool, cheapest_of_the_best, cost, needs_consent, pool_of, take
from m2dexport.profile.target import Budget

#: Of the reference's mean: what a small cell must keep, unless it beats the static model.
KEPT_SHARE = 0.9
#: What a cell is recommended for, as in ``Recommended`` -> how it reads; the budget comes first.
ROLES = {
    "within_budget": "within the budget",
    "best": "best",
    "balanced": "balanced",
    "smallest": "smallest",
}
_NAMED = 2  # losses; with eight tasks, all of them would be 250 characters


@dataclass(frozen=True)
class Reason:
    """Why a cell is recommended: "(lead), since (why)"."""

    cell: Cell
    roles: tuple[str, ...]  # of ROLES
    lead: str  # what the first of the reasons is for, as it reads
    why: str  # the end of a sentence, with the other reasons


def recommend(cells: Sequence[Cell], budget: Budget | None = None) -> Recommended:
    """Return the cells of one target that are worth shipping first, all of its frontier.

    - best: of those that none is better than beyond noise, the cheapest (see ``select_cell``).
    - balanced: the knee of quality over cost, among the worthwhile: with both scaled to 0..1, the
      cell whose quality exceeds its cost by the most (Satopaa et al., "Finding a 'Kneedle' in a
      Haystack", 2011). Cost is the log of p50 x size x bytes per vector.
    - smallest: the smallest file among the worthwhile, and of files as small, the best.
    - within_budget: what ``select_cell`` takes; None where nothing fits.

    Worthwhile is a cell that has not collapsed and keeps ``KEPT_SHARE`` of the reference's mean, or
    is better than every cell of depth 0, where there are any; if none is, the best.

    Args:
        cells: all cells of the target, judged (``flags.judged``), one or more.
        budget: of the target; None: it has none.
    """
    pool = pool_of(cells, [mean_score(cell) for cell in cells], Budget.model_validate({}))
    usable = _usable(pool)
    best = cheapest_of_the_best(pool, usable)
    worth = [index for index in usable if _is_worthwhile(pool, index)] or [best]
    least = min(cells[index].size_bytes for index in worth)
    small = [index for index in worth if cells[index].size_bytes <= least * SIZE_NOISE]
    return Recommended(
        best=cells[best].id,
        balanced=cells[_knee(cells, worth)].id,
        smallest=cells[cheapest_of_the_best(pool, small)].id,
        within_budget=_within(cells, budget),
    )


def reasons(recommended: Recommended, cells: Sequence[Cell]) -> tuple[Reason, ...]:
    """Return why cells are recommended, each cell once, in the order of ``ROLES``.

    Args:
        recommended: the ids.
        cells: all cells of the target.
    """
    by_id = {cell.id: cell for cell in cells}
    clauses = _clauses(recommended, by_id)
    roles: dict[str, dict[str, list[str]]] = {}  # id -> clause -> what the clause is the reason for
    for role, clause in clauses.items():
        roles.setdefault(dict(recommended)[role], {}).setdefault(clause, []).append(role)
    found = []
    for name, of_cell in roles.items():
        (lead, first), *rest = ((_said(each), clause) for clause, each in of_cell.items())
        why = "; ".join([first, *(f"{said}, since {clause}" for said, clause in rest)])
        every = tuple(itertools.chain(*of_cell.values()))
        found.append(Reason(by_id[name], every, lead, why + _losses(by_id[name], cells)))
    return tuple(found)


def _said(roles: Sequence[str]) -> str:
    return ", ".join(ROLES[role] for role in roles)


def _clauses(recommended: Recommended, cells: Mapping[str, Cell]) -> dict[str, str]:
    """Return role -> the reason for it, the end of a sentence."""
    asked = [cell for cell in cells.values() if "reference" not in cell.flags]
    found = {
        "best": "no cell of the grid is better beyond noise, and of those as good it is the "
        "cheapest",
        "balanced": "dearer cells add little quality for what they cost, cheaper ones lose much",
        "smallest": _why_smallest(cells[recommended.smallest], list(cells.values())),
    }
    if len(asked) == 1:
        found = dict.fromkeys(found, "it is the only cell of the grid")
    if recommended.within_budget is not None:
        found["within_budget"] = "it is the best within the target's budget"
    return {role: found[role] for role in ROLES if role in found}


def _losses(cell: Cell, cells: Sequence[Cell]) -> str:
    """Return on which tasks a cell is worse than the widest, deepest one, whatever its mean is.

    A mean hides a loss on one task behind a gain on another. The largest are named.
    """
    whole = max(cells, key=lambda c: (c.layers, c.dim, c.weights == "fp32", c.vectors == "float32"))
    lost = [
        (whole.quality[metric] - cell.quality[metric], metric)
        for metric in cell.replicates
        if metric in whole.quality
        and better_pairs([metric_score(whole, metric), metric_score(cell, metric)])[0, 1]
    ]
    largest = sorted(lost, reverse=True)
    named = [
        f"{points:.1f}{'' if place else ' points'} on {metric}"
        for place, (points, metric) in enumerate(largest[:_NAMED])
    ]
    if len(lost) > _NAMED:
        return f", though it loses {', '.join(named)}, and on {len(lost) - _NAMED} more"
    return f", though it loses {' and '.join(named)}" if lost else ""


def _why_smallest(cell: Cell, cells: Sequence[Cell]) -> str:
    static = [each.mean_quality for each in cells if each.layers == 0]
    size = f"in {cell.size_bytes / 1e6:.1f} MB"
    if cell.retention is None:
        return f"no file is smaller, {size} (the reference has no quality to keep)"
    if cell.retention >= KEPT_SHARE:
        return f"it keeps {cell.retention:.0%} of the reference's quality {size}"
    if cell.layers > 0 and static and cell.mean_quality > max(static):
        return f"it is better than depth 0 {size}"
    return f"it is the best, and no cell keeps {KEPT_SHARE:.0%} of the reference's quality"


def _usable(pool: Pool) -> list[int]:
    """Return the cells of the frontier that anyone may use; all of it, where there are none."""
    on = [index for index, is_on in enumerate(pool.on) if is_on]
    return [index for index in on if not needs_consent(pool.cells[index])] or on


def _is_worthwhile(pool: Pool, index: int) -> bool:
    cell = pool.cells[index]
    if "collapsed" in cell.flags:
        return False
    if cell.retention is None or cell.retention >= KEPT_SHARE:
        return True
    static = [i for i, each in enumerate(pool.cells) if each.layers == 0]
    return cell.layers > 0 and bool(static) and bool(pool.found.better[index, static].all())


def _knee(cells: Sequence[Cell], among: Sequence[int]) -> int:
    """Return the cell whose quality, scaled to 0..1, exceeds its cost, so scaled, by the most."""
    points = _scaled([cells[index].mean_quality for index in among])
    costs = _scaled([cost(cells[index])[0] for index in among])
    return among[int(np.argmax(points - costs))]


def _scaled(values: Sequence[float]) -> NDArray[np.float64]:
    found = np.array(values, dtype=np.float64)
    span = np.ptp(found)
    return (found - found.min()) / span if span > 0 else np.zeros(len(found))


def _within(cells: Sequence[Cell], budget: Budget | None) -> str | None:
    if budget is None or not budget.limits():
        return None
    if budget.metric == MEAN:
        qualities = [mean_score(cell) for cell in cells]
    elif all(budget.metric in cell.quality for cell in cells):
        qualities = [metric_score(cell, budget.metric) for cell in cells]
    else:
        return None  # the target's metric was not measured
    pool = pool_of(cells, qualities, budget)
    usable = [
        index
        for index, cell in enumerate(cells)
        if pool.found.eligible[index] and not needs_consent(cell)
    ]
    chosen = take(pool, usable)
    return None if chosen is None else cells[chosen].id
