"""Cells: what was measured per graph and per vector precision, joined, compared and flagged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from m2dexport.checkpoint.trained import Grid
from m2dexport.precisions import Align, VectorPrecision, WeightPrecision
from m2dexport.profile.latency import Footprint, LatencyPoint
from m2dexport.profile.plan import Plan
from m2dexport.profile.schema import (
    Cell,
    CrossDepth,
    Failure,
    Flag,
    Latency,
    MeasuredOn,
    cell_id,
)
from m2dexport.profile.select import LATENCY_GRAIN_MS, LATENCY_NOISE, QUALITY_NOISE, frontier
from m2dexport.vectors import codecs
from m2dexport.vectors.tasks import Task


@dataclass(frozen=True)
class Graph:
    """What latency, size and memory depend on."""

    layers: int
    weights: WeightPrecision
    align: Align = "none"
    dim: int | None = None  # of depth 0, whose table is another at every dim


@dataclass(frozen=True)
class GraphFacts:
    """What all cells of one graph share."""

    latency: tuple[LatencyPoint, ...]  # a point per shape
    footprint: Footprint
    size_bytes: int  # of graph and tokenizer
    flags: tuple[Flag, ...]
    engine: str
    device: MeasuredOn


@dataclass(frozen=True)
class Measured:
    """Everything that a sweep measured."""

    quality: Mapping[str, Mapping[str, float]]  # cell id -> "task/metric" -> points
    as_query: Mapping[str, Mapping[str, Mapping[str, float]]]  # cell id -> index cell -> the same
    cross_depth: tuple[CrossDepth, ...]
    graphs: Mapping[Graph, GraphFacts]
    #: (graph, dim, vectors) -> bytes that dim and codec add to ``GraphFacts.size_bytes``.
    added_bytes: Mapping[tuple[Graph, int, VectorPrecision], int]
    failures: Mapping[Graph, str]
    unaligned: Mapping[tuple[int, int], str]  # (layers, dim) -> why there is no map
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
    joined = [
        _cell(measured, plan, tasks, graph, dim, vectors)
        for graph in sorted(measured.graphs, key=lambda graph: _order(graph, plan))
        for dim, vectors in product(plan.dims, plan.vectors)
        if cell_id(graph.layers, dim, graph.weights, vectors, graph.align) in measured.quality
        and graph.dim in (None, dim)
    ]
    cells = {cell.id: cell for cell in joined}
    whole = cells[reference_id(plan)].mean_quality
    best = frontier(joined)
    return tuple(
        cell.model_copy(
            update={
                "retention": cell.mean_quality / whole if whole > 0 else None,
                "flags": (
                    *_flags(cell, cells, plan, trained),
                    *measured.graphs[_graph_of(cell)].flags,
                ),
                "on_frontier": cell.id in best,
                "as_query": {name: q for name, q in cell.as_query.items() if name in cells},
            }
        )
        for cell in joined
    )


def failures_of(measured: Measured, plan: Plan) -> tuple[Failure, ...]:
    """Return what could not be measured, and the cells that it would have been."""
    failed = [
        (graph, reason, plan.dims if graph.dim is None else (graph.dim,))
        for graph, reason in measured.failures.items()
    ]
    failed += [
        (Graph(layers, weights, "full"), reason, (dim,))
        for (layers, dim), reason in measured.unaligned.items()
        for weights in plan.weights
    ]
    return tuple(
        Failure(
            layers=graph.layers,
            align=graph.align,
            weights=graph.weights,
            reason=reason,
            cells=tuple(
                cell_id(graph.layers, dim, graph.weights, vectors, graph.align)
                for dim, vectors in product(dims, plan.vectors)
            ),
        )
        for graph, reason, dims in failed
    )


def _order(graph: Graph, plan: Plan) -> tuple[int, int, int]:
    return plan.layers.index(graph.layers), graph.align == "full", plan.weights.index(graph.weights)


def _graph_of(cell: Cell) -> Graph:
    dim = cell.dim if cell.layers == 0 else None
    return Graph(cell.layers, cell.weights, cell.align, dim)


def _cell(
    measured: Measured,
    plan: Plan,
    tasks: Sequence[Task],
    key: Graph,
    dim: int,
    vectors: VectorPrecision,
) -> Cell:
    name = cell_id(key.layers, dim, key.weights, vectors, key.align)
    graph, quality = measured.graphs[key], measured.quality[name]
    return Cell(
        id=name,
        layers=key.layers,
        dim=dim,
        align=key.align,
        weights=key.weights,
        vectors=vectors,
        engine=graph.engine,
        device=graph.device,
        isa=plan.isa if key.weights == "int8" and key.layers > 0 else "portable",
        quality=quality,
        as_query=measured.as_query.get(name, {}),
        mean_quality=float(np.mean([quality[f"{t.name}/{t.main_metric}"] for t in tasks])),
        retention=None,
        latency=tuple(Latency(**vars(point)) for point in graph.latency),
        p50_ms=graph.latency[0].p50_ms,
        p95_ms=graph.latency[0].p95_ms,
        load_ms=graph.footprint.load_ms,
        size_bytes=graph.size_bytes + measured.added_bytes[key, dim, vectors],
        peak_memory_bytes=graph.footprint.peak_memory_bytes,
        used_memory_bytes=graph.footprint.used_memory_bytes,
        bytes_per_vector=codecs.bytes_per_vector(dim, vectors),
        flags=(),
        on_frontier=False,
    )


def _flags(cell: Cell, cells: Mapping[str, Cell], plan: Plan, trained: Grid | None) -> list[Flag]:
    flags: list[Flag] = []
    fitted = cell.align == "full"  # by a map, at every dim
    if not fitted and trained is not None and (cell.layers, cell.dim) not in trained:
        flags.append("untrained")
    twin = cells.get(cell_id(cell.layers, cell.dim, "fp32", cell.vectors, cell.align))
    if twin is not None and cell.p50_ms > twin.p50_ms * LATENCY_NOISE + LATENCY_GRAIN_MS:
        flags.append("slower_than_fp32")
    shallower = [
        cells[name]
        for depth in sorted(plan.layers)
        if 0 < depth < cell.layers
        and (name := cell_id(depth, cell.dim, cell.weights, cell.vectors, cell.align)) in cells
    ]
    if shallower and cell.mean_quality < shallower[-1].mean_quality - QUALITY_NOISE:
        flags.append("below_shallower")
    if cell.layers > 0 and any(_beats(other, cell) for other in cells.values()):
        flags.append("below_static")
    return flags


def _beats(other: Cell, cell: Cell) -> bool:
    """Say whether depth 0 gives more, faster and in no more bytes per vector."""
    return (
        other.layers == 0
        and other.mean_quality > cell.mean_quality + QUALITY_NOISE
        and other.p50_ms < cell.p50_ms
        and other.bytes_per_vector <= cell.bytes_per_vector
    )
