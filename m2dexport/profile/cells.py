"""Cells: what was measured per graph and per vector precision, joined, compared and flagged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from m2dexport.checkpoint.trained import Grid
from m2dexport.precisions import VectorPrecision, WeightPrecision
from m2dexport.profile.latency import Footprint, LatencyPoint
from m2dexport.profile.plan import Plan
from m2dexport.profile.schema import Cell, Failure, Flag, Latency, MeasuredOn, cell_id
from m2dexport.profile.select import LATENCY_NOISE, QUALITY_NOISE, frontier
from m2dexport.vectors import codecs
from m2dexport.vectors.tasks import Task


@dataclass(frozen=True)
class GraphFacts:
    """What all cells of one depth and weight precision share: dims do not change it."""

    latency: tuple[LatencyPoint, ...]  # a point per shape
    footprint: Footprint
    size_bytes: int  # of graph and tokenizer
    flags: tuple[Flag, ...]


@dataclass(frozen=True)
class Measured:
    """Everything that a sweep measured."""

    quality: Mapping[str, Mapping[str, float]]  # cell id -> "task/metric" -> points
    graphs: Mapping[tuple[int, WeightPrecision], GraphFacts]
    tail_sizes: Mapping[tuple[int, VectorPrecision], int]  # bytes that cut and codec add
    failures: Mapping[tuple[int, WeightPrecision], str]
    device: MeasuredOn
    seconds: Mapping[str, float]  # step -> how long it took


def reference_id(plan: Plan) -> str:
    """Return the id of the cell that the others are compared with: the deepest and widest."""
    return cell_id(max(plan.layers), max(plan.dims), plan.weights[0], plan.vectors[0])


def join_cells(
    measured: Measured, plan: Plan, tasks: Sequence[Task], trained: Grid | None
) -> tuple[Cell, ...]:
    """Return the cells of a plan that did not fail.

    Args:
        measured: what the sweep measured; the reference cell is among it.
        plan: the plan of the sweep.
        tasks: the evaluation data; a cell's quality is the mean of their main metrics.
        trained: the (layers, dim) pairs that training visited; None: unknown.
    """
    grid = product(plan.layers, plan.dims, plan.weights, plan.vectors)
    joined = [_cell(measured, plan, tasks, *at) for at in grid if (at[0], at[2]) in measured.graphs]
    cells = {cell.id: cell for cell in joined}
    whole = cells[reference_id(plan)].mean_quality
    best = frontier(joined)
    return tuple(
        cell.model_copy(
            update={
                "retention": cell.mean_quality / whole if whole > 0 else None,
                "flags": (
                    *_flags(cell, cells, plan, trained),
                    *measured.graphs[cell.layers, cell.weights].flags,
                ),
                "on_frontier": cell.id in best,
            }
        )
        for cell in joined
    )


def failures_of(measured: Measured, plan: Plan) -> tuple[Failure, ...]:
    """Return what could not be measured, and the cells that it would have been."""
    return tuple(
        Failure(
            layers=layers,
            weights=weights,
            reason=reason,
            cells=tuple(
                cell_id(layers, dim, weights, vectors)
                for dim, vectors in product(plan.dims, plan.vectors)
            ),
        )
        for (layers, weights), reason in measured.failures.items()
    )


def _cell(
    measured: Measured,
    plan: Plan,
    tasks: Sequence[Task],
    layers: int,
    dim: int,
    weights: WeightPrecision,
    vectors: VectorPrecision,
) -> Cell:
    name = cell_id(layers, dim, weights, vectors)
    graph, quality = measured.graphs[layers, weights], measured.quality[name]
    return Cell(
        id=name,
        layers=layers,
        dim=dim,
        weights=weights,
        vectors=vectors,
        engine=plan.engine,
        device=measured.device,
        isa=plan.isa if weights == "int8" else "portable",
        quality=quality,
        mean_quality=float(np.mean([quality[f"{t.name}/{t.main_metric}"] for t in tasks])),
        retention=None,
        latency=tuple(Latency(**vars(point)) for point in graph.latency),
        p50_ms=graph.latency[0].p50_ms,
        p95_ms=graph.latency[0].p95_ms,
        load_ms=graph.footprint.load_ms,
        size_bytes=graph.size_bytes + measured.tail_sizes[dim, vectors],
        peak_memory_bytes=graph.footprint.peak_memory_bytes,
        bytes_per_vector=codecs.bytes_per_vector(dim, vectors),
        flags=(),
        on_frontier=False,
    )


def _flags(cell: Cell, cells: Mapping[str, Cell], plan: Plan, trained: Grid | None) -> list[Flag]:
    flags: list[Flag] = []
    if trained is not None and (cell.layers, cell.dim) not in trained:
        flags.append("untrained")
    twin = cells.get(cell_id(cell.layers, cell.dim, "fp32", cell.vectors))
    if twin is not None and cell.p50_ms > twin.p50_ms * LATENCY_NOISE:
        flags.append("slower_than_fp32")
    shallower = [
        cells[name]
        for depth in sorted(plan.layers)
        if depth < cell.layers
        and (name := cell_id(depth, cell.dim, cell.weights, cell.vectors)) in cells
    ]
    if shallower and cell.mean_quality < shallower[-1].mean_quality - QUALITY_NOISE:
        flags.append("below_shallower")
    return flags
