"""The sweep: the quality surface, then latency, size and memory of every graph, as a profile."""

from __future__ import annotations

import datetime
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import onnx_ir as ir

from m2dexport.build.source import Source, export_source, tool_versions
from m2dexport.checkpoint.open import Checkpoint
from m2dexport.cores import threads_for
from m2dexport.data import texts_sha256
from m2dexport.engines import ENGINES, engine_maker
from m2dexport.errors import M2DError, ParityError
from m2dexport.files import scratch_folder
from m2dexport.graph.vector import tail_bytes
from m2dexport.precisions import WeightPrecision
from m2dexport.profile import schema
from m2dexport.profile.cells import (
    GraphFacts,
    Measured,
    failures_of,
    join_cells,
    reference_id,
)
from m2dexport.profile.latency import (
    Candidate,
    Conditions,
    Footprint,
    LatencyPoint,
    measure_footprint,
    measure_latency,
)
from m2dexport.profile.machine import read_machine
from m2dexport.profile.plan import Plan, require_plan, within_length
from m2dexport.profile.schema import Flag, MeasuredOn, Profile
from m2dexport.profile.surface import Depth, compute_surface, corpus_of, qualities
from m2dexport.progress import OnProgress
from m2dexport.quantize.saturation import isa_of
from m2dexport.slice.slicing import UntrainedWarning
from m2dexport.vectors.tasks import Task

Graph = tuple[int, WeightPrecision]  # depth and weights: what latency, size and memory depend on


def profile_checkpoint(
    checkpoint: Checkpoint,
    tasks: Sequence[Task],
    calibration: Sequence[str],
    plan: Plan,
    *,
    model: str | None = None,
    pooling: str | None = None,
    on_progress: OnProgress = lambda *_: None,
) -> Profile:
    """Measure every cell of a plan; cells whose graph fails its checks are recorded as failed.

    Args:
        checkpoint: the 2D checkpoint.
        tasks: evaluation data; a cell's quality is the mean of the tasks' main metrics.
        calibration: texts that freeze the ranges of int8 and int4 vectors.
        plan: the cells, shapes, device and repeats.
        model: how the user named the checkpoint, recorded so that a cell can be built again.
        pooling: the pooling that the user declared; recorded likewise.
        on_progress: called at every step.

    Raises:
        UsageError: when the plan lies outside the checkpoint.
        ParityError: when the reference, the deepest graph in the plan's first weights, fails.
    """
    require_plan(checkpoint, plan, tasks)
    plan = within_length(plan, checkpoint.max_length)
    with scratch_folder() as scratch:
        source, measured = _measure(checkpoint, tasks, calibration, plan, scratch, on_progress)
    batch, sequence = plan.shapes[0]
    return Profile(
        format=schema.FORMAT,
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        tools=tool_versions(plan.engine),
        machine=read_machine(),
        checkpoint=_checkpoint_info(checkpoint, source, model, pooling),
        tasks=tuple(_task_info(task) for task in tasks),
        calibration_sha256=texts_sha256(calibration),
        reference=reference_id(plan),
        latency_shape=schema.Shape(batch=batch, sequence=sequence),
        seconds=measured.seconds,
        cells=join_cells(measured, plan, tasks, checkpoint.trained),
        failures=failures_of(measured, plan),
    )


def _checkpoint_info(
    checkpoint: Checkpoint, source: Source, model: str | None, pooling: str | None
) -> schema.CheckpointInfo:
    return schema.CheckpointInfo(
        model=model,
        sha256=source.sha256,
        model_type=checkpoint.model_type,
        layers=checkpoint.layers,
        dim=checkpoint.dim,
        trained=checkpoint.trained,
        pooling=pooling,
    )


def _task_info(task: Task) -> schema.TaskInfo:
    return schema.TaskInfo(
        name=task.name,
        kind=task.kind,
        main_metric=task.main_metric,
        texts=sum(len(text_set.texts) for text_set in task.texts()),
        sha256=task.sha256,
    )


def _measure(
    checkpoint: Checkpoint,
    tasks: Sequence[Task],
    calibration: Sequence[str],
    plan: Plan,
    folder: Path,
    on_progress: OnProgress,
) -> tuple[Source, Measured]:
    seconds: dict[str, float] = {}
    with _timed(seconds, "export"), warnings.catch_warnings():
        # The profile flags every untrained cell; this one slice stands for all of them.
        warnings.simplefilter("ignore", UntrainedWarning)
        on_progress("export", 0, 1)
        source = export_source(checkpoint, plan.layers, checkpoint.dim, plan.engine)
        on_progress("export", 1, 1)
    corpus = corpus_of(source, tasks, calibration)
    quality: dict[str, Mapping[str, float]] = {}
    graphs: dict[Graph, Candidate] = {}
    flags: dict[Graph, tuple[Flag, ...]] = {}
    failures: dict[Graph, str] = {}
    with _timed(seconds, "quality"):
        for weights in plan.weights:
            surface = compute_surface(source, weights, corpus, plan, on_progress)
            quality.update(qualities(surface, weights, corpus, plan))
            failures.update({(n, weights): reason for n, reason in surface.failures.items()})
            _require_reference(plan, failures)
            for layers, depth in surface.depths.items():
                graphs[layers, weights] = _write(depth.graph, plan, folder / f"{layers}-{weights}")
                flags[layers, weights] = _flags_of(depth)
    conditions = Conditions(plan.engine, plan.device, checkpoint.vocab_size, plan.repeats)
    with _timed(seconds, "latency"):
        latency = _latencies(graphs, plan.shapes, conditions, failures, on_progress)
    with _timed(seconds, "memory"):
        footprints = _footprints(graphs, plan.shapes, conditions, failures, on_progress)
    _require_reference(plan, failures)
    tokenizer_bytes = len(source.tokenizer_json.encode())
    facts = {
        graph: GraphFacts(
            points, footprints[graph], graphs[graph].size_bytes + tokenizer_bytes, flags[graph]
        )
        for graph, points in latency.items()
        if graph in footprints
    }
    tail_sizes = {
        (dim, vectors): tail_bytes(checkpoint.dim, dim, vectors)
        for dim, vectors in product(plan.dims, plan.vectors)
    }
    device = _measured_on(plan)
    return source, Measured(quality, facts, tail_sizes, failures, device, seconds)


def _measured_on(plan: Plan) -> MeasuredOn:
    """Return what sessions of this plan really run on here."""
    provider = plan.device.provider or ENGINES[plan.engine].provider
    threads = threads_for(plan.device.threads)
    return MeasuredOn(provider=provider, threads=threads, spin=bool(plan.device.spin))


def _flags_of(depth: Depth) -> tuple[Flag, ...]:
    flags: dict[Flag, bool] = {
        "batch_dependent": depth.batch_dependent,
        "mixed_precision": depth.mixed,
    }
    return tuple(flag for flag, holds in flags.items() if holds)


def _write(graph: ir.Model, plan: Plan, folder: Path) -> Candidate:
    """Write the engine's files of a graph into a new folder, to be measured."""
    folder.mkdir()
    contents: dict[str, bytes] = engine_maker(plan.engine).files(graph)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return Candidate({name: folder / name for name in contents}, isa_of(graph.graph))


def _require_reference(plan: Plan, failures: Mapping[Graph, str]) -> None:
    reason = failures.get((max(plan.layers), plan.weights[0]))
    if reason is not None:
        raise ParityError(f"the reference cell {reference_id(plan)} failed: {reason}")


def _latencies(
    graphs: Mapping[Graph, Candidate],
    shapes: Sequence[tuple[int, int]],
    conditions: Conditions,
    failures: dict[Graph, str],
    on_progress: OnProgress,
) -> dict[Graph, tuple[LatencyPoint, ...]]:
    """Return the points of every graph that loads; the others are added to the failures."""
    total = len(graphs) * len(shapes)
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        on_progress("latency", done, total)

    results = measure_latency(graphs, shapes, conditions, step)
    failures |= {name: str(found) for name, found in results.items() if isinstance(found, M2DError)}
    return {name: found for name, found in results.items() if not isinstance(found, M2DError)}


def _footprints(
    graphs: Mapping[Graph, Candidate],
    shapes: Sequence[tuple[int, int]],
    conditions: Conditions,
    failures: dict[Graph, str],
    on_progress: OnProgress,
) -> dict[Graph, Footprint]:
    largest = max(shapes, key=lambda shape: shape[0] * shape[1])
    footprints = {}
    for done, (name, graph) in enumerate(graphs.items(), start=1):
        try:
            footprints[name] = measure_footprint(graph, largest, conditions)
        except M2DError as error:
            failures[name] = str(error)
        on_progress("memory", done, len(graphs))
    return footprints


@contextmanager
def _timed(seconds: dict[str, float], step: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[step] = time.perf_counter() - start
