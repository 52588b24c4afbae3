"""The figures of a profile as the page's script reads them: a column per figure, a row per cell."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from m2dexport.precisions import VECTOR_PRECISIONS, WEIGHT_PRECISIONS
from m2dexport.profile.flags import collapsed_on
from m2dexport.profile.recommend import ROLES
from m2dexport.profile.schema import MEAN, Cell, Profile
from m2dexport.report import facts
from m2dexport.report.style import COLOURS, MARKS, PARTS

_DIGITS = 5


def page_data(profile: Profile) -> dict[str, Any]:
    """Return the figures of every cell and target, for JSON.

    Replicates are left out; floats have five significant digits. A figure that was not measured is
    None.
    """
    mains = profile.mains
    return {
        "mains": mains,
        "metrics": [MEAN, *mains, *sorted(set(_metrics(profile)) - set(mains))],
        "queries": profile.query_mains,
        "targets": [
            {
                "name": target.name,
                "budget": dict(target.budget),
                "latency": facts.latency_words(profile, target),
                "reference": target.reference,
                "sizes": [cell.id for cell in size_cells(profile.of_target(target.name))],
                "picks": {
                    role: name
                    for role in ROLES
                    if (name := getattr(target.recommended, role)) is not None
                },
            }
            for target in profile.targets
        ],
        "colours": {name: COLOURS[name] for name in _used(profile, "weights", WEIGHT_PRECISIONS)},
        "parts": list(PARTS.items()),
        "marks": {name: MARKS[name][1:] for name in _used(profile, "vectors", VECTOR_PRECISIONS)},
        "cells": _columns(profile, mains),
    }


def query_points(profile: Profile, cells: Sequence[Cell]) -> list[dict[str, float]]:
    """Return each cell's points as a query encoder of the full depth's unquantized index.

    Where the grid lacks the full depth at a cell's dim, they are those of ``profile.cross_depth``.

    Args:
        profile: the profile.
        cells: those of one target.

    Returns:
        Per cell: metric -> points, with their mean; empty where it was not measured.
    """
    metrics = profile.query_mains
    by_id = {cell.id: cell for cell in cells}
    crossed = _crossed(profile)
    found: list[dict[str, float]] = []
    for cell in cells:
        index = facts.index_of(profile, cell, by_id)
        if index is not None:
            measured = cell.quality if index is cell else cell.as_query[index.id]
        else:
            alike = (cell.weights, cell.vectors) == (_weights(profile, cell), "float32")
            measured = crossed.get((cell.layers, cell.align, cell.dim), {}) if alike else {}
        points = {name: measured[name] for name in metrics if name in measured}
        if len(points) == len(metrics) > 0:
            points[MEAN] = math.fsum(points.values()) / len(metrics)
        found.append(points)
    return found


def _crossed(profile: Profile) -> dict[tuple[int, str, int], Mapping[str, float]]:
    """Return (layers, align, dim) -> what its queries find in documents of the full depth."""
    full = str(profile.checkpoint.layers)
    found: dict[tuple[int, str, int], Mapping[str, float]] = {}
    for each in profile.cross_depth:
        layers, _, aligned = each.queries.partition("-")
        if each.documents == full:
            found[int(layers), "full" if aligned else "none", each.dim] = each.quality
    return found


def _weights(profile: Profile, cell: Cell) -> str:
    return profile.reference_cell(cell.target).weights


def _metrics(profile: Profile) -> list[str]:
    return list(dict.fromkeys(name for cell in profile.cells for name in cell.quality))


def _used(profile: Profile, field: str, order: Sequence[str]) -> list[str]:
    used = {getattr(cell, field) for cell in profile.cells}
    return [name for name in order if name in used]


def _columns(profile: Profile, mains: Sequence[str]) -> dict[str, Any]:
    cells = [cell for target in profile.targets for cell in profile.of_target(target.name)]
    numbers: dict[str, Callable[[Cell], float | None]] = {
        "p50": lambda c: c.p50_ms,
        "p50_low": lambda c: c.latency[0].p50_interval.low,
        "p50_high": lambda c: c.latency[0].p50_interval.high,
        "p95": lambda c: c.p95_ms,
        "p99": lambda c: c.p99_ms,
        "text": lambda c: c.text_p50_ms,
        "ratio": lambda c: c.ratio,
        "load": lambda c: c.load_ms,
        "first": lambda c: c.first_ms,
        "size": lambda c: c.size_bytes / 1e6,
        "peak": lambda c: c.peak_memory_bytes / 1e6,
        "used": lambda c: c.used_memory_bytes / 1e6,
        "bytes": lambda c: c.bytes_per_vector,
        "loss": lambda c: c.loss,
        "loss_low": lambda c: c.loss_interval.low,
        "loss_high": lambda c: c.loss_interval.high,
    }
    words = ("id", "target", "layers", "dim", "align", "weights", "vectors", "engine")
    return {
        **{name: [getattr(cell, name) for cell in cells] for name in words},
        **{name: [_short(of(cell)) for cell in cells] for name, of in numbers.items()},
        "points": {
            name: [_short(_points(cell, name)) for cell in cells]
            for name in [MEAN, *_metrics(profile)]
        },
        "low": _bounds(cells, mains, "low"),
        "high": _bounds(cells, mains, "high"),
        "query": _queries(profile),
        "frontier": [int(cell.on_frontier) for cell in cells],
        "flags": [" ".join(cell.flags) for cell in cells],
        "device": [
            f"{c.device.provider}, {c.device.threads} thread{'s' * (c.device.threads != 1)}"
            for c in cells
        ],
        "parts": [[_short(part / 1e6) for part in size_parts(cell)] for cell in cells],
        "collapsed": _collapsed(profile),
        "build": [facts.build_command(profile, cell) for cell in cells],
        "bundle": [facts.bundle_command(profile, cell) for cell in cells],
    }


def size_cells(cells: Sequence[Cell]) -> list[Cell]:
    """Return a cell for each weights and depth, in that order: the widest that the grid asks for.

    Of cells as wide, it is one with float32 vectors, plain if there is one. A reference that the
    grid does not ask for stands where there is no other.

    Args:
        cells: those of one target; of several engines, the first that has the depth counts.
    """

    def rank(cell: Cell) -> tuple[bool, int, bool, bool]:
        return (
            "reference" in cell.flags,
            -cell.dim,
            cell.align == "full",
            cell.vectors != "float32",
        )

    found: dict[tuple[int, int], Cell] = {}
    for cell in sorted(cells, key=rank):
        found.setdefault((WEIGHT_PRECISIONS.index(cell.weights), cell.layers), cell)
    return [found[key] for key in sorted(found)]


def size_parts(cell: Cell) -> tuple[int, int, int, int]:
    """Return the bytes of token table, layers, tokenizer and the rest, none below 0."""
    parts = cell.size_parts
    found = (parts.embeddings, parts.layers, parts.tokenizer, parts.other)
    return found[0], found[1], found[2], max(found[3], 0)


def _points(cell: Cell, name: str) -> float | None:
    return cell.mean_quality if name == MEAN else cell.quality.get(name)


def _bounds(
    cells: Sequence[Cell], metrics: Sequence[str], side: str
) -> dict[str, list[float | None]]:
    found = {MEAN: [_short(getattr(cell.mean_interval, side)) for cell in cells]}
    for name in metrics:
        intervals = [cell.intervals.get(name) for cell in cells]
        found[name] = [_short(getattr(each, side)) if each else None for each in intervals]
    return found


def _queries(profile: Profile) -> dict[str, list[float | None]]:
    rows = [
        points
        for target in profile.targets
        for points in query_points(profile, profile.of_target(target.name))
    ]
    names = [MEAN, *profile.query_mains]
    return {name: [_short(points.get(name)) for points in rows] for name in names}


def _collapsed(profile: Profile) -> list[list[str]]:
    found: list[list[str]] = []
    for target in profile.targets:
        cells = profile.of_target(target.name)
        where = collapsed_on(cells, profile.mains)
        found += [list(where.get(cell.id, ())) for cell in cells]
    return found


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.{_DIGITS}g}")
