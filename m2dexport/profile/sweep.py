"""The sweep: the quality surface, then latency, size and memory of every graph, as a profile."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

from m2dexport.align.texts import texts_or_shipped
from m2dexport.checkpoint.open import Checkpoint
from m2dexport.data import texts_sha256
from m2dexport.errors import ParityError
from m2dexport.measure.machine import Machine, read_machine
from m2dexport.measure.size import size_parts
from m2dexport.precisions import VectorPrecision
from m2dexport.profile import schema
from m2dexport.profile.basis import Sweep, Work
from m2dexport.profile.cells import GraphFacts, Measured, failures_of, join_cells
from m2dexport.profile.cluster import Graphs, connected, measure_graphs, measure_passes
from m2dexport.profile.costs import Costs, Texts
from m2dexport.profile.estimate import estimate
from m2dexport.profile.found import Found, read_found
from m2dexport.profile.grid import (
    Graph,
    Pass,
    Place,
    by_target,
    dealt,
    passes_of,
    places_of,
    reference_id,
)
from m2dexport.profile.maps import Maps
from m2dexport.profile.parts import Parts, passing_parts
from m2dexport.profile.passes import added_bytes, widest
from m2dexport.profile.plan import Plan, require_plan, settled
from m2dexport.profile.recommend import recommend
from m2dexport.profile.schema import Profile
from m2dexport.profile.settings import measured_on
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
    cluster: str | None = None  # address of a Ray cluster that measures; None: this process does
    say: Callable[[str], None] = lambda _: None  # called with what the user should know
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
    cluster = connected(course.cluster, list(asked)) if course.cluster else nullcontext()
    with nullcontext(course.parts) if course.parts else passing_parts() as parts, cluster:
        measured = _measure(Work(sweep, parts.deciding(sweep.decides())), course)
    return _profile(sweep, measured, asked, course)


@dataclass(frozen=True)
class _Target:
    """What was measured of one target."""

    measured: Measured
    costs: Costs
    machine: Machine


def _profile(
    sweep: Sweep,
    measured: Mapping[str, _Target],
    asked: Mapping[str, Sequence[tuple[int, int]]],
    course: Course,
) -> Profile:
    """Join what was measured of each target; ``asked`` are its shapes before they were cut."""
    checkpoint, first = sweep.checkpoint, next(iter(measured.values())).measured
    targets = {target[0].target: target for target in by_target(sweep.plans)}
    cells = {
        name: join_cells(measured[name].measured, target, sweep.tasks, checkpoint.trained)
        for name, target in targets.items()
    }
    failures = [
        each for name in targets for each in failures_of(measured[name].measured, targets[name])
    ]
    return Profile(
        format=schema.FORMAT,
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        tools=sweep.tools,
        checkpoint=_checkpoint_info(sweep, course),
        tasks=tuple(_task_info(task) for task in sweep.tasks),
        calibration_sha256=texts_sha256(sweep.calibration),
        aligned_with=_aligned_with(sweep),
        replicates=REPLICATES,
        decided_by=sweep.decided_by(),
        shard=None if course.shard is None else "{}/{}".format(*course.shard),
        seconds=first.seconds,
        targets=tuple(
            _target_info(target, cells[name], asked[name], measured[name], course)
            for name, target in targets.items()
        ),
        cells=tuple(cell for found in cells.values() for cell in found),
        cross_depth=first.cross_depth,
        failures=tuple(failures),
    )


def _target_info(
    plans: Sequence[Plan],
    cells: Sequence[schema.Cell],
    asked: Sequence[tuple[int, int]],
    found: _Target,
    course: Course,
) -> schema.TargetInfo:
    costs = found.costs
    target = course.targets.get(plans[0].target)
    limits = target.budget.limits() if target else {}
    return schema.TargetInfo(
        name=plans[0].target,
        description=target.description if target else "",
        engines=tuple(plan.engine for plan in plans),
        machine=schema.Machine(**vars(found.machine)),
        noise=schema.Noise(**vars(costs.noise)) if costs.noise else None,
        shapes=_shapes(plans[0].shapes),
        asked=_shapes(asked),
        tokenization=tuple(schema.Tokenization(**vars(each)) for each in costs.tokenization),
        budget={**limits, "metric": target.budget.metric} if target and limits else {},
        reference=reference_id(plans[0]),
        recommended=recommend(cells, target.budget if target else None),
        samples=costs.samples,
    )


def _shapes(shapes: Sequence[tuple[int, int]]) -> tuple[schema.Shape, ...]:
    return tuple(schema.Shape(batch=batch, sequence=length) for batch, length in shapes)


def _aligned_with(sweep: Sweep) -> schema.AlignedWith | None:
    if not sweep.aligned:
        return None
    count = sum(1 for _ in sweep.align_texts)
    return schema.AlignedWith(texts=count, sha256=sweep.align_sha256)


def _checkpoint_info(sweep: Sweep, course: Course) -> schema.CheckpointInfo:
    checkpoint = sweep.checkpoint
    return schema.CheckpointInfo(
        model=course.model,
        sha256=checkpoint.weights_sha256,
        model_sha256=sweep.model_sha256,
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


def _measure(work: Work, course: Course) -> dict[str, _Target]:
    """Return what was measured of every target, by its name."""
    sweep = work.sweep
    seconds: dict[str, float] = {}
    missing = [one for one in sweep.passes if not work.folder_of(one).exists()]
    if kept := work.parts.count():
        done = len(sweep.passes) - len(missing)
        course.say(
            f"Going on: {done} of {len(sweep.passes)} passes and {kept - done} other parts were "
            "measured before."
        )
    if course.cluster is not None:
        with _timed(seconds, "cluster"):
            measure_passes(work)
    elif missing:
        with _timed(seconds, "export"):
            work.sources  # noqa: B018
    with _timed(seconds, "align"):
        maps = work.maps
    if missing and course.cluster is None:
        course.say(estimate(work.basis, missing, sweep.plans))
    found, cluster = [], course.cluster is not None
    with _timed(seconds, "quality"):
        for one in sweep.passes:
            found.append(read_found(work.measured(one)))
            course.on_quality(one, found[-1].quality)
    return {
        target[0].target: _of_target(target, found, maps, work, seconds, cluster)
        for target in by_target(sweep.plans)
    }


def _of_target(
    target: Sequence[Plan],
    found: Sequence[Found],
    maps: Maps,
    work: Work,
    seconds: dict[str, float],
    cluster: bool,
) -> _Target:
    """Measure what the graphs of a target cost; return that, and all of the target."""
    sweep, places = work.sweep, places_of(target)
    written = {graph: each for one in reversed(found) for graph, each in one.graphs.items()}
    graphs = {
        place.graph: replace(each, device=place.plan.device if place.graph.layers else each.device)
        for place in places.values()
        if (each := written.get(place.graph)) is not None
    }
    asked = Graphs(
        graphs,
        {name: each for one in found for name, each in one.samples.items() if name in places},
        Texts(sweep.calibration, sweep.prompt, _text(found[0].tokenizer), maps.tokenizer_json),
        target[0],
        sweep.checkpoint.vocab_size,
    )
    if cluster:
        costs, machine = measure_graphs(asked, work.parts)
    else:
        costs = asked.cost(work.parts.remember, sweep.on_progress)
        machine = read_machine()
    for step, taken in costs.seconds.items():
        seconds[step] = seconds.get(step, 0.0) + taken
    failures = {graph: each for one in found for graph, each in one.failures.items()}
    failures |= costs.failures
    reference = reference_id(target[0])
    if (reason := failures.get(places[reference].graph)) is not None:
        raise ParityError(f"the reference cell {reference} failed: {reason}")
    facts = _facts(costs, found, maps)
    measured = Measured(
        quality={name: each for one in reversed(found) for name, each in one.quality.items()},
        as_query=_united(found),
        cross_depth=tuple(each for one in found for each in one.cross_depth),
        graphs=facts,
        added_bytes=_added(facts, places.values(), maps, sweep.checkpoint.dim),
        failures=failures,
        unaligned=maps.failures,
        seconds=seconds,
        elsewhere=sweep.wanted - {n for one in sweep.passes if one.own for n in one.wanted},
    )
    return _Target(measured, costs, machine)


def _added(
    graphs: Container[Graph], places: Iterable[Place], maps: Maps, width: int
) -> dict[tuple[Graph, int, VectorPrecision], int]:
    """Return the bytes that every dim and codec add to the files of each graph."""
    found: dict[tuple[Graph, int, VectorPrecision], int] = {}
    for place in places:
        graph, dim, vectors = place.graph, place.dim, place.vectors
        if graph in graphs:
            most = widest(maps, graph.layers)
            found[graph, dim, vectors] = added_bytes(graph, dim, vectors, width, most)
    return found


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _united(found: Sequence[Found]) -> dict[str, dict[str, Mapping[str, Score]]]:
    """Return cell -> index cell -> scores: depth 0 asks the indexes of several passes."""
    united: dict[str, dict[str, Mapping[str, Score]]] = {}
    for one in found:
        for name, indexes in one.as_query.items():
            united.setdefault(name, {}).update(indexes)
    return united


def _facts(costs: Costs, found: Sequence[Found], maps: Maps) -> dict[Graph, GraphFacts]:
    """Return what all cells of each graph share, where its latency and memory were measured."""
    flags = {graph: each for one in found for graph, each in one.flags.items()}
    static, text = len(maps.tokenizer_json.encode()), found[0].tokenizer.stat().st_size
    facts = {}
    for graph, points in costs.latency.items():
        if graph in costs.footprints:
            candidate, tokenizer = costs.graphs[graph], text if graph.layers > 0 else static
            facts[graph] = GraphFacts(
                latency=points,
                footprint=costs.footprints[graph],
                size_bytes=candidate.size_bytes + tokenizer,
                size_parts=size_parts(candidate.engine, candidate.files, tokenizer),
                flags=flags[graph],
                engine=candidate.engine,
                device=measured_on(candidate),
            )
    return facts


@contextmanager
def _timed(seconds: dict[str, float], step: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[step] = seconds.get(step, 0.0) + time.perf_counter() - start
