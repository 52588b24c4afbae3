"""Flags: what a cell's figures say against it, beyond noise."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import pairwise
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from m2dexport.checkpoint.trained import Grid
from m2dexport.profile.frontier import (
    Relations,
    better_pairs,
    metric_score,
    on_frontier,
    relations,
)
from m2dexport.profile.schema import Cell, Flag
from m2dexport.vectors.resample import Score

Each = NDArray[np.bool_]  # (cells,)

#: What the graph or the plan says, and no comparison of figures: these are kept.
GIVEN: tuple[Flag, ...] = ("reference", "batch_dependent", "mixed_precision")
#: As a cell names them.
ORDER: tuple[Flag, ...] = get_args(Flag)
#: A cell that has less than this share of a smaller one's points has collapsed.
COLLAPSED_SHARE = 0.5


def judged(cells: Sequence[Cell], trained: Grid | None) -> tuple[Cell, ...]:
    """Return the cells of one target with their flags, and whether they are on its frontier.

    Args:
        cells: all cells of the target; flags that say what a cell is (``GIVEN``) are kept.
        trained: the (layers, dim) pairs that training visited; None: unknown.
    """
    if not cells:
        return ()
    found = relations(cells)
    on = on_frontier(found)
    collapsed = collapsed_on(cells, tuple(cells[0].replicates))
    flags = [{flag for flag in cell.flags if flag in GIVEN} for cell in cells]
    for flag, flagged in {
        "untrained": _untrained(cells, trained),
        "collapsed": np.array([cell.id in collapsed for cell in cells]),
        "below_shallower": _below_shallower(cells, found),
        "below_static": _below_static(cells, found),
        "slower_than_fp32": _slower_than_fp32(cells, found),
        "not_significant": _not_significant(found, on),
    }.items():
        for index in np.flatnonzero(flagged):
            flags[index].add(flag)  # type: ignore[arg-type]
    return tuple(
        cell.model_copy(
            update={
                "flags": tuple(sorted(flags[index], key=ORDER.index)),
                "on_frontier": bool(on[index]),
            }
        )
        for index, cell in enumerate(cells)
    )


def _untrained(cells: Sequence[Cell], trained: Grid | None) -> Each:
    """An aligned cell is fitted at every dim."""
    return np.array(
        [
            trained is not None and cell.align == "none" and (cell.layers, cell.dim) not in trained
            for cell in cells
        ]
    )


def collapsed_on(cells: Sequence[Cell], metrics: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Return cell id -> the metrics in which it collapsed, of cells that did.

    In these, it has less than half of the points of a cell with no more layers and dims that is
    like it otherwise, beyond noise.

    Args:
        cells: those of one target.
        metrics: the main metrics of the tasks.
    """
    found: dict[str, tuple[str, ...]] = {}
    for alike in _groups(cells, lambda c: (c.weights, c.vectors, c.align, c.engine)):
        shape = np.array([(cells[index].layers, cells[index].dim) for index in alike])
        smaller = (shape[:, None] <= shape).all(axis=2)
        for metric in metrics:
            scores = [metric_score(cells[index], metric) for index in alike]
            half = [
                Score(s.points * COLLAPSED_SHARE, s.replicates * COLLAPSED_SHARE)
                if isinstance(s, Score)
                else s * COLLAPSED_SHARE
                for s in scores
            ]
            better = better_pairs([*half, *scores])[: len(alike), len(alike) :]
            for place in np.flatnonzero((better & smaller).any(axis=0)):
                name = cells[alike[place]].id
                found[name] = (*found.get(name, ()), metric)
    return found


def _below_shallower(cells: Sequence[Cell], found: Relations) -> Each:
    """The next shallower transformer is better."""
    below = np.zeros(len(cells), dtype=bool)
    for alike in _groups(cells, lambda c: (c.weights, c.vectors, c.align, c.engine, c.dim)):
        rising = sorted(
            (index for index in alike if cells[index].layers > 0), key=lambda i: cells[i].layers
        )
        for shallower, index in pairwise(rising):
            below[index] = found.better[shallower, index]
    return below


def _below_static(cells: Sequence[Cell], found: Relations) -> Each:
    """Depth 0 is better and faster, and takes no more bytes per vector."""
    static = np.array([cell.layers == 0 for cell in cells])
    stored = np.array([cell.bytes_per_vector for cell in cells])
    beaten = found.better & found.slower.T & (stored[:, None] <= stored) & static[:, None]
    below: Each = beaten.any(axis=0) & ~static
    return below


def _slower_than_fp32(cells: Sequence[Cell], found: Relations) -> Each:
    slower = np.zeros(len(cells), dtype=bool)
    for alike in _groups(cells, lambda c: (c.layers, c.dim, c.vectors, c.align, c.engine)):
        for twin in (index for index in alike if cells[index].weights == "fp32"):
            slower[alike] |= found.slower[alike, twin]
    return slower


def _not_significant(found: Relations, on: Each) -> Each:
    """A cell of the frontier is cheaper, in nothing dearer, and as good within noise."""
    as_good = ~found.better & ~found.better.T
    cheaper = ~found.dearer & found.dearer.T & found.rivals
    nothing: Each = (as_good & cheaper & on[:, None]).any(axis=0)
    return nothing


def _groups(cells: Sequence[Cell], key: Callable[[Cell], Any]) -> Iterator[list[int]]:
    """Yield the indices of the cells that have one key."""
    groups: dict[Any, list[int]] = {}
    for index, cell in enumerate(cells):
        groups.setdefault(key(cell), []).append(index)
    yield from groups.values()
