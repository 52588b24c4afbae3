"""Cells: what was measured per graph and per vector precision, joined, compared and flagged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from m2dexport.checkpoint.trained import Grid
from m2dexport.engines import STATIC_ENGINE
from m2dexport.measure.footprint import Footprint
from m2dexport.measure.latency import LatencyPoint
from m2dexport.measure.quantiles import Ratio
from m2dexport.measure.size import SizeParts
from m2dexport.precisions import VectorPrecision
from m2dexport.profile import schema
from m2dexport.profile.flags import judged
from m2dexport.profile.grid import Graph, Place, places_of, reference_id
from m2dexport.profile.intervals import Interval, Replicates, interval_of, replicates_of
from m2dexport.profile.plan import Plan
from m2dexport.profile.schema import (
    Cell,
    CrossDepth,
    Failure,
    Flag,
    Latency,
    MeasuredOn,
)
from m2dexport.vectors import codecs
from m2dexport.vectors.resample import Score, difference, mean_of
from m2dexport.vectors.tasks import Task, main_of

Scores = Mapping[str, Score]  # by "task/metric"


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
    elsewhere: frozenset[str] = frozenset()  # ids of cells that other shards measure


def join_cells(
    measured: Measured, plans: Plan | Sequence[Plan], tasks: Sequence[Task], trained: Grid | None
) -> tuple[Cell, ...]:
    """Return the cells of one target that did not fail.

    Args:
        measured: what the sweep measured; the reference cell is among it.
        plans: the plans of the target, one for each engine.
        tasks: the evaluation data; a cell's quality is the mean of their main metrics.
        trained: the (layers, dim) pairs that training visited; None: unknown.
    """
    plans = [plans] if isinstance(plans, Plan) else plans
    places = {
        name: place
        for name, place in places_of(plans).items()
        if name in measured.quality and place.graph in measured.graphs
    }
    joined = [_cell(measured, place, tasks) for place in places.values()]
    cells = {cell.id: cell for cell in joined}
    known = {*cells, *measured.elsewhere}
    reference = cells[reference_id(plans[0])]
    whole = reference.mean_quality
    compared = [
        cell.model_copy(
            update={
                "retention": cell.mean_quality / whole if whole > 0 else None,
                **_compared(cell, reference, measured, tasks),
                "flags": (
                    *(
                        ["reference"]
                        if places[cell.id].only_reference or cell.id in measured.elsewhere
                        else []
                    ),
                    *cell.flags,
                ),
                "as_query": {name: q for name, q in cell.as_query.items() if name in known},
                "query_replicates": {
                    name: q for name, q in cell.query_replicates.items() if name in known
                },
            }
        )
        for cell in joined
    ]
    return judged(compared, trained)


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
    return mean_of([quality[main_of(task)] for task in tasks])


def failures_of(measured: Measured, plans: Plan | Sequence[Plan]) -> tuple[Failure, ...]:
    """Return what could not be measured, and the cells of a target that it would have been."""
    plans = [plans] if isinstance(plans, Plan) else plans
    cells: dict[tuple[Graph, str], list[str]] = {}
    for name, place in places_of(plans).items():
        graph = place.graph
        reason = measured.failures.get(graph)
        if reason is None and graph.align == "full":
            reason = measured.unaligned.get((graph.layers, place.dim))
            graph = replace(graph, dim=place.dim)  # the other dims may be there
        if reason is not None:
            cells.setdefault((graph, reason), []).append(name)
    return tuple(
        Failure(
            target=plans[0].target,
            engine=graph.engine if graph.layers > 0 else STATIC_ENGINE,
            layers=graph.layers,
            align=graph.align,
            weights=graph.weights,
            reason=reason,
            cells=tuple(names),
        )
        for (graph, reason), names in cells.items()
    )


def _cell(measured: Measured, place: Place, tasks: Sequence[Task]) -> Cell:
    key, dim, vectors = place.graph, place.dim, place.vectors
    name = key.cell(dim, vectors)
    return Cell(
        id=name,
        target=place.plan.target,
        layers=key.layers,
        dim=dim,
        align=key.align,
        weights=key.weights,
        vectors=vectors,
        isa=place.plan.isa if key.weights == "int8" and key.layers > 0 else "portable",
        bytes_per_vector=codecs.bytes_per_vector(dim, vectors),
        flags=measured.graphs[key].flags,
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
    """Return the fields of a cell that say what it takes."""
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
    mains = [main_of(task) for task in tasks]
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
