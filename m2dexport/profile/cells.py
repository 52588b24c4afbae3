"""Cells: what was measured per graph and per vector precision, joined, compared and flagged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from m2dexport.checkpoint.trained import Grid
from m2dexport.engines import STATIC_ENGINE
from m2dexport.measure.footprint import Footprint
from m2dexport.measure.latency import LatencyPoint
from m2dexport.measure.quantiles import Ratio
from m2dexport.measure.size import SizeParts
from m2dexport.precisions import Align, VectorPrecision, WeightPrecision
from m2dexport.profile import schema
from m2dexport.profile.intervals import Interval, Replicates, interval_of, replicates_of
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
from m2dexport.vectors.resample import Score, difference, mean_of
from m2dexport.vectors.tasks import Task

Scores = Mapping[str, Score]  # by "task/metric"


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
    size_parts: SizeParts  # of the same
    flags: tuple[Flag, ...]
    engine: str
    device: MeasuredOn


@dataclass(frozen=True)
class Measured:
    """Everything that a sweep measured."""

    quality: Mapping[str, Scores]  # by cell id
    as_query: Mapping[str, Mapping[str, Scores]]  # cell id -> index cell
    cross_depth: tuple[CrossDepth, ...]
    graphs: Mapping[Graph, GraphFacts]
    #: (graph, dim, vectors) -> bytes that dim and codec add to ``GraphFacts.size_bytes``.
    added_bytes: Mapping[tuple[Graph, int, VectorPrecision], int]
    failures: Mapping[Graph, str]
    unaligned: Mapping[tuple[int, int], str]  # (layers, dim) -> why there is no map
    seconds: Mapping[str, float]  # step -> how long it took


def reference_id(plan: Plan) -> str:
    """Return the id of the cell that the others are compared with: the deepest and widest."""
    layers, dim = max(plan.layers), max(plan.dims)
    return cell_id(layers, dim, plan.weights[0], plan.vectors[0], engine=plan.engine)


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
        if _name(graph, dim, vectors, plan) in measured.quality and graph.dim in (None, dim)
    ]
    cells = {cell.id: cell for cell in joined}
    reference = cells[reference_id(plan)]
    whole = reference.mean_quality
    best = frontier(joined)
    return tuple(
        cell.model_copy(
            update={
                "retention": cell.mean_quality / whole if whole > 0 else None,
                **_compared(cell, reference, measured, tasks),
                "flags": (
                    *_flags(cell, cells, plan, trained),
                    *measured.graphs[_graph_of(cell)].flags,
                ),
                "on_frontier": cell.id in best,
                "as_query": {name: q for name, q in cell.as_query.items() if name in cells},
                "query_replicates": {
                    name: q for name, q in cell.query_replicates.items() if name in cells
                },
            }
        )
        for cell in joined
    )


def _compared(
    cell: Cell, reference: Cell, measured: Measured, tasks: Sequence[Task]
) -> dict[str, Any]:
    """Return what a cell loses against the reference."""
    means = [_mean(measured.quality[each.id], tasks) for each in (reference, cell)]
    loss = difference(*means)
    return {
        "loss": loss.points,
        "loss_interval": interval_of(loss),
    }


def _mean(quality: Scores, tasks: Sequence[Task]) -> Score:
    return mean_of([quality[f"{task.name}/{task.main_metric}"] for task in tasks])


def _name(graph: Graph, dim: int, vectors: VectorPrecision, plan: Plan) -> str:
    return cell_id(graph.layers, dim, graph.weights, vectors, graph.align, plan.engine)


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
            engine=plan.engine if graph.layers > 0 else STATIC_ENGINE,
            layers=graph.layers,
            align=graph.align,
            weights=graph.weights,
            reason=reason,
            cells=tuple(
                _name(graph, dim, vectors, plan) for dim, vectors in product(dims, plan.vectors)
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
    name = _name(key, dim, vectors, plan)
    return Cell(
        id=name,
        target=plan.target,
        layers=key.layers,
        dim=dim,
        align=key.align,
        weights=key.weights,
        vectors=vectors,
        isa=plan.isa if key.weights == "int8" and key.layers > 0 else "portable",
        bytes_per_vector=codecs.bytes_per_vector(dim, vectors),
        flags=(),
        on_frontier=False,
        **_gives(measured.quality[name], measured.as_query.get(name, {}), tasks),
        **_costs(measured.graphs[key], measured.added_bytes[key, dim, vectors]),
    )


def _gives(
    quality: Scores, as_query: Mapping[str, Scores], tasks: Sequence[Task]
) -> dict[str, Any]:
    """Return the fields of a cell that say how good it is; ``_compared`` knows the rest."""
    mean = _mean(quality, tasks)
    retrieval = [task for task in tasks if task.kind == "retrieval"]
    return {
        "quality": _points(quality),
        "intervals": {metric: interval_of(score) for metric, score in quality.items()},
        "replicates": _replicates(quality, tasks),
        "as_query": {index: _points(found) for index, found in as_query.items()},
        "query_replicates": {
            index: _replicates(found, retrieval) for index, found in as_query.items()
        },
        "mean_quality": mean.points,
        "mean_interval": interval_of(mean),
        "retention": None,
        "loss": 0.0,
        "loss_interval": Interval(low=0, high=0),
    }


def _costs(graph: GraphFacts, added: int) -> dict[str, Any]:
    """Return the fields of a cell that say what it takes; ``_compared`` knows the rest."""
    first, parts = graph.latency[0], graph.size_parts
    ratio = first.ratio or Ratio(1, 1, 1)  # of a reference that is compared with nothing else
    return {
        "engine": graph.engine,
        "device": graph.device,
        "latency": tuple(_latency(point) for point in graph.latency),
        "p50_ms": first.p50_ms,
        "p95_ms": first.p95_ms,
        "p99_ms": first.p99_ms,
        "text_p50_ms": first.text_p50_ms,
        "ratio": ratio.value,
        "ratio_interval": Interval(low=ratio.low, high=ratio.high),
        "load_ms": graph.footprint.load_ms,
        "first_ms": graph.footprint.first_ms,
        "size_bytes": graph.size_bytes + added,
        "size_parts": schema.SizeParts(**vars(replace(parts, other=parts.other + added))),
        "peak_memory_bytes": graph.footprint.peak_memory_bytes,
        "used_memory_bytes": graph.footprint.used_memory_bytes,
    }


def _points(scores: Scores) -> dict[str, float]:
    return {metric: score.points for metric, score in scores.items()}


def _replicates(scores: Scores, tasks: Sequence[Task]) -> dict[str, Replicates]:
    """Return the replicates of the tasks' main metrics, where they were measured."""
    mains = [f"{task.name}/{task.main_metric}" for task in tasks]
    return {main: replicates_of(scores[main]) for main in mains if main in scores}


def _latency(point: LatencyPoint) -> Latency:
    low, high = point.p50_range
    p95_low, p95_high = point.p95_range
    return Latency(
        batch=point.batch,
        sequence=point.sequence,
        p50_ms=point.p50_ms,
        p95_ms=point.p95_ms,
        p99_ms=point.p99_ms,
        p50_interval=Interval(low=low, high=high),
        p95_interval=Interval(low=p95_low, high=p95_high),
        runs=point.runs,
    )


def _flags(cell: Cell, cells: Mapping[str, Cell], plan: Plan, trained: Grid | None) -> list[Flag]:
    flags: list[Flag] = []
    fitted = cell.align == "full"  # by a map, at every dim
    if not fitted and trained is not None and (cell.layers, cell.dim) not in trained:
        flags.append("untrained")
    graph = _graph_of(cell)
    twin = cells.get(_name(replace(graph, weights="fp32"), cell.dim, cell.vectors, plan))
    if twin is not None and cell.p50_ms > twin.p50_ms * LATENCY_NOISE + LATENCY_GRAIN_MS:
        flags.append("slower_than_fp32")
    shallower = [
        cells[name]
        for depth in sorted(plan.layers)
        if 0 < depth < cell.layers
        and (name := _name(replace(graph, layers=depth), cell.dim, cell.vectors, plan)) in cells
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
