"""The sweep: the quality surface, then latency, size and memory of every graph, as a profile."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial

from m2dexport.align.texts import sha256_of_texts, texts_or_shipped
from m2dexport.build.source import tool_versions
from m2dexport.checkpoint.open import Checkpoint
from m2dexport.data import texts_sha256
from m2dexport.errors import M2DError, ParityError
from m2dexport.precisions import VectorPrecision
from m2dexport.profile import schema
from m2dexport.profile.basis import Sweep, Work
from m2dexport.profile.cells import GraphFacts, Measured, failures_of, join_cells
from m2dexport.profile.grid import (
    Graph,
    Pass,
    by_target,
    dealt,
    passes_of,
    places_of,
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
from m2dexport.profile.maps import Maps
from m2dexport.profile.parts import Parts, passing_parts
from m2dexport.profile.passes import Found, added_bytes, read_pass, widest
from m2dexport.profile.plan import Plan, require_plan, settled
from m2dexport.profile.recommend import recommend
from m2dexport.profile.schema import Profile, SizeParts
from m2dexport.profile.settings import choose_settings, measured_on
from m2dexport.profile.target import Target
from m2dexport.progress import OnProgress
from m2dexport.vectors.resample import REPLICATES, Score
from m2dexport.vectors.tasks import Task


@dataclass(frozen=True)
class Course:
    """How a sweep is recorded and carried out; none of it changes a figure."""

    model: str | None = None  # how the user named the checkpoint, so that a cell can be built again
    pooling: str | None = None  # that the user declared; recorded likewise
    targets: Mapping[str, Target] = field(default_factory=dict)  # of the plans, by name
    parts: Parts | None = None  # what was measured before; None: nothing is kept
    shard: tuple[int, int] | None = None  # (number, parts): measure one part of the passes
    #: Called with every pass and the quality of its cells, as soon as that is there.
    on_quality: Callable[[Pass, Mapping[str, Mapping[str, Score]]], None] = lambda *_: None


def profile_checkpoint(
    checkpoint: Checkpoint,
    tasks: Sequence[Task],
    calibration: Sequence[str],
    plans: Plan | Sequence[Plan],
    course: Course = Course(),
    on_progress: OnProgress = lambda *_: None,
) -> Profile:
    """Measure every cell of some plans; cells whose graph fails its checks are recorded as failed.

    The reference is measured with them: all layers and dims, not quantized, on the first engine of
    each target.

    Args:
        checkpoint: the 2D checkpoint.
        tasks: evaluation data; a cell's quality is the mean of the tasks' main metrics.
        calibration: texts that freeze the ranges of int8 and int4 vectors.
        plans: cells, shapes, device and repeats, one for each target and engine.
        course: what is recorded, and where to go on.
        on_progress: called at every step.

    Raises:
        UsageError: when a plan lies outside the checkpoint.
        ParityError: when a reference fails.
    """
    plans = (plans,) if isinstance(plans, Plan) else tuple(plans)
    for plan in plans:
        require_plan(checkpoint, plan, tasks)
    asked = {target[0].target: target[0].shapes for target in by_target(plans)}
    plans = tuple(settled(plan, checkpoint) for plan in plans)
    passes = whole = passes_of(plans)
    if course.shard is not None:
        passes = dealt(whole, course.shard)
    wanted = frozenset(name for each in whole for name in each.wanted)
    texts = texts_or_shipped(plans[0].align_texts)
    sweep = Sweep(checkpoint, tuple(tasks), calibration, texts, plans, passes, wanted, on_progress)
    with nullcontext(course.parts) if course.parts else passing_parts() as parts:
        measured = _measure(Work(sweep, parts.deciding(sweep.decides())), course)
    return _profile(sweep, measured, asked, course)


def _profile(
    sweep: Sweep,
    measured: Mapping[str, Measured],
    asked: Mapping[str, Sequence[tuple[int, int]]],
    course: Course,
) -> Profile:
    """Join what was measured of each target; ``asked`` are its shapes before they were cut."""
    checkpoint, first = sweep.checkpoint, next(iter(measured.values()))
    targets = {target[0].target: target for target in by_target(sweep.plans)}
    cells = {
        name: join_cells(measured[name], target, sweep.tasks, checkpoint.trained)
        for name, target in targets.items()
    }
    failures = [each for name in targets for each in failures_of(measured[name], targets[name])]
    tools = {name: v for plan in sweep.plans for name, v in tool_versions(plan.engine).items()}
    return Profile(
        format=schema.FORMAT,
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        tools=tools,
        checkpoint=_checkpoint_info(checkpoint, course),
        tasks=tuple(_task_info(task) for task in sweep.tasks),
        calibration_sha256=texts_sha256(sweep.calibration),
        aligned_with=_aligned_with(sweep),
        replicates=REPLICATES,
        shard=None if course.shard is None else "{}/{}".format(*course.shard),
        seconds=first.seconds,
        targets=tuple(
            _target_info(target, cells[name], asked[name], course)
            for name, target in targets.items()
        ),
        cells=tuple(cell for found in cells.values() for cell in found),
        cross_depth=first.cross_depth,
        failures=tuple(dict.fromkeys(failures)),
    )


def _target_info(
    plans: Sequence[Plan],
    cells: Sequence[schema.Cell],
    asked: Sequence[tuple[int, int]],
    course: Course,
) -> schema.TargetInfo:
    target = course.targets.get(plans[0].target)
    limits = target.budget.limits() if target else {}
    return schema.TargetInfo(
        name=plans[0].target,
        description=target.description if target else "",
        engines=tuple(plan.engine for plan in plans),
        machine=read_machine(),
        noise=None,
        shapes=_shapes(plans[0].shapes),
        asked=_shapes(asked),
        tokenization=(),
        budget={**limits, "metric": target.budget.metric} if target and limits else {},
        reference=reference_id(plans[0]),
        recommended=recommend(cells, target.budget if target else None),
        samples=(),
    )


def _shapes(shapes: Sequence[tuple[int, int]]) -> tuple[schema.Shape, ...]:
    return tuple(schema.Shape(batch=batch, sequence=length) for batch, length in shapes)


def _aligned_with(sweep: Sweep) -> schema.AlignedWith | None:
    if not sweep.aligned:
        return None
    count = sum(1 for _ in sweep.align_texts)
    return schema.AlignedWith(texts=count, sha256=sha256_of_texts(sweep.align_texts))


def _checkpoint_info(checkpoint: Checkpoint, course: Course) -> schema.CheckpointInfo:
    return schema.CheckpointInfo(
        model=course.model,
        sha256=checkpoint.weights_sha256,
        model_type=checkpoint.model_type,
        layers=checkpoint.layers,
        dim=checkpoint.dim,
        trained=checkpoint.trained,
        pooling=course.pooling,
    )


def _task_info(task: Task) -> schema.TaskInfo:
    return schema.TaskInfo(
        name=task.name,
        kind=task.kind,
        main_metric=task.main_metric,
        texts=sum(len(text_set.texts) for text_set in task.texts()),
        sha256=task.sha256,
    )


def _measure(work: Work, course: Course) -> dict[str, Measured]:
    """Return what was measured of every target, by its name."""
    sweep = work.sweep
    seconds: dict[str, float] = {}
    missing = [one for one in sweep.passes if not work.folder_of(one).exists()]
    if missing:
        with _timed(seconds, "export"):
            work.sources  # noqa: B018
    with _timed(seconds, "align"):
        maps = work.maps
    found = []
    with _timed(seconds, "quality"):
        for one in sweep.passes:
            found.append(read_pass(work.measured(one)))
            course.on_quality(one, found[-1].quality)
    return {
        target[0].target: _of_target(target, found, maps, work, seconds)
        for target in by_target(sweep.plans)
    }


def _of_target(
    target: Sequence[Plan],
    found: Sequence[Found],
    maps: Maps,
    work: Work,
    seconds: dict[str, float],
) -> Measured:
    """Measure what the graphs of a target cost; return that with their quality."""
    sweep, places = work.sweep, places_of(target)
    written = {graph: each for one in reversed(found) for graph, each in one.graphs.items()}
    graphs = {
        place.graph: replace(each, device=place.plan.device if place.graph.layers else each.device)
        for place in places.values()
        if (each := written.get(place.graph)) is not None
    }
    flags = {graph: each for one in found for graph, each in one.flags.items()}
    failures = {graph: each for one in found for graph, each in one.failures.items()}
    reference = places[reference_id(target[0])].graph
    graphs, costs = _costs(graphs, target[0], sweep, failures, seconds)
    if reference in failures:
        raise ParityError(
            f"the reference cell {reference_id(target[0])} failed: {failures[reference]}"
        )
    texts = (len(maps.tokenizer_json.encode()), found[0].tokenizer.stat().st_size)
    facts = {
        graph: _facts(graphs[graph], *each, texts[graph.layers > 0], flags[graph])
        for graph, each in costs.items()
    }
    added: dict[tuple[Graph, int, VectorPrecision], int] = {
        (graph, place.dim, place.vectors): added_bytes(
            graph, place.dim, place.vectors, sweep.checkpoint.dim, widest(maps, graph.layers)
        )
        for place in places.values()
        if (graph := place.graph) in facts
    }
    return Measured(
        quality={name: each for one in reversed(found) for name, each in one.quality.items()},
        as_query=_united(found),
        cross_depth=tuple(each for one in found for each in one.cross_depth),
        graphs=facts,
        added_bytes=added,
        failures=failures,
        unaligned=maps.failures,
        seconds=seconds,
        elsewhere=sweep.wanted - {n for one in sweep.passes if one.own for n in one.wanted},
    )


def _united(found: Sequence[Found]) -> dict[str, dict[str, Mapping[str, Score]]]:
    """Return cell -> index cell -> scores: depth 0 asks the indexes of several passes."""
    united: dict[str, dict[str, Mapping[str, Score]]] = {}
    for one in found:
        for name, indexes in one.as_query.items():
            united.setdefault(name, {}).update(indexes)
    return united


def _facts(
    candidate: Candidate,
    latency: tuple[LatencyPoint, ...],
    footprint: Footprint,
    text: int,
    flags: tuple[schema.Flag, ...],
) -> GraphFacts:
    """Return what all cells of a graph share.

    Args:
        candidate: the graph, on the device that suits it.
        latency: a point per shape.
        footprint: its memory.
        text: bytes of its tokenizer.
        flags: those that the graph has.
    """
    size = candidate.size_bytes
    return GraphFacts(
        latency=latency,
        footprint=footprint,
        size_bytes=size + text,
        size_parts=SizeParts(embeddings=0, layers=size, tokenizer=text, other=0),
        flags=flags,
        engine=candidate.engine,
        device=measured_on(candidate),
    )


def _costs(
    graphs: Mapping[Graph, Candidate],
    plan: Plan,
    sweep: Sweep,
    failures: dict[Graph, str],
    seconds: dict[str, float],
) -> tuple[dict[Graph, Candidate], dict[Graph, tuple[tuple[LatencyPoint, ...], Footprint]]]:
    vocab_size, on_progress = sweep.checkpoint.vocab_size, sweep.on_progress
    conditions = Conditions(vocab_size, plan.repeats)
    with _timed(seconds, "settings"):
        graphs = _with_settings(graphs, plan, vocab_size, on_progress)
    with _timed(seconds, "latency"):
        latency = _latencies(graphs, plan.shapes, conditions, failures, on_progress)
    with _timed(seconds, "memory"):
        footprints = _footprints(graphs, plan.shapes, conditions, failures, on_progress)
    both = [graph for graph in latency if graph in footprints]
    return dict(graphs), {graph: (latency[graph], footprints[graph]) for graph in both}


def _with_settings(
    graphs: Mapping[Graph, Candidate], plan: Plan, vocab_size: int, on_progress: OnProgress
) -> dict[Graph, Candidate]:
    """Return every graph on the device that suits it best.

    An aligned graph takes what suits its plain one, to which it adds a single product.
    """
    plain = {each: replace(each, align="none") if each.layers else each for each in graphs}
    measured = {graph: graphs[graph] for graph in plain.values()}
    step = partial(on_progress, "settings")
    best = choose_settings(measured, plan.optimize, plan.shapes[0], vocab_size, step)
    return {graph: replace(graphs[graph], device=best[plain[graph]]) for graph in graphs}


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
    seconds[step] = seconds.get(step, 0.0) + time.perf_counter() - start
