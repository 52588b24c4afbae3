"""The sweep: the quality surface, then latency, size and memory of every graph, as a profile."""

from __future__ import annotations

import datetime
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path

from m2dexport.align.static import TokenTable
from m2dexport.align.texts import prompted, prompts_of, sha256_of_texts, texts_or_shipped
from m2dexport.build.source import Source, export_source, tool_versions
from m2dexport.checkpoint.open import Checkpoint
from m2dexport.data import texts_sha256
from m2dexport.files import scratch_folder
from m2dexport.measure.machine import read_machine
from m2dexport.precisions import VectorPrecision
from m2dexport.profile import schema
from m2dexport.profile.cells import Graph, Measured, failures_of, join_cells, reference_id
from m2dexport.profile.costs import Costs, Texts, measure_costs
from m2dexport.profile.maps import NO_MAPS, Maps, fit_maps
from m2dexport.profile.parts import measure_anew
from m2dexport.profile.passes import Passes, Sweep, added_bytes, require_reference
from m2dexport.profile.plan import Plan, require_plan, within_length
from m2dexport.profile.schema import Profile
from m2dexport.profile.select import recommend
from m2dexport.profile.surface import corpus_of, loaded_runner
from m2dexport.progress import OnProgress
from m2dexport.slice.slicing import slice_checkpoint
from m2dexport.slice.write import UntrainedWarning
from m2dexport.vectors.resample import REPLICATES
from m2dexport.vectors.tasks import Task


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
    texts = texts_or_shipped(plan.align_texts)
    sweep = Sweep(checkpoint, tuple(tasks), calibration, texts, plan, on_progress)
    with scratch_folder() as scratch:
        source, measured, costs = _measure(sweep, scratch)
    cells = join_cells(measured, plan, tasks, checkpoint.trained)
    return Profile(
        format=schema.FORMAT,
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        tools=tool_versions(plan.engine),
        checkpoint=_checkpoint_info(checkpoint, source, model, pooling),
        tasks=tuple(_task_info(task) for task in tasks),
        calibration_sha256=texts_sha256(calibration),
        aligned_with=_aligned_with(sweep),
        replicates=REPLICATES,
        shard=None,
        seconds=measured.seconds,
        targets=(_target_info(plan, cells, costs),),
        cells=cells,
        cross_depth=measured.cross_depth,
        failures=failures_of(measured, plan),
    )


def _target_info(plan: Plan, cells: Sequence[schema.Cell], costs: Costs) -> schema.TargetInfo:
    shapes = tuple(schema.Shape(batch=batch, sequence=length) for batch, length in plan.shapes)
    return schema.TargetInfo(
        name=plan.target,
        description="",
        engines=(plan.engine,),
        machine=schema.Machine(**vars(read_machine())),
        noise=schema.Noise(**vars(costs.noise)) if costs.noise else None,
        shapes=shapes,
        asked=shapes,
        tokenization=tuple(schema.Tokenization(**vars(each)) for each in costs.tokenization),
        budget={},
        reference=reference_id(plan),
        recommended=recommend(cells),
        samples=costs.samples,
    )


def _aligned_with(sweep: Sweep) -> schema.AlignedWith | None:
    if not sweep.plan.aligned(sweep.checkpoint.layers):
        return None
    count = sum(1 for _ in sweep.align_texts)
    return schema.AlignedWith(texts=count, sha256=sha256_of_texts(sweep.align_texts))


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


def _measure(sweep: Sweep, folder: Path) -> tuple[Source, Measured, Costs]:
    checkpoint, plan, on_progress = sweep.checkpoint, sweep.plan, sweep.on_progress
    seconds: dict[str, float] = {}
    with _timed(seconds, "export"), warnings.catch_warnings():
        # The profile flags every untrained cell; this one slice stands for all of them.
        warnings.simplefilter("ignore", UntrainedWarning)
        on_progress("export", 0, 1)
        aligned = plan.aligned(checkpoint.layers)
        depths = sorted({*plan.depths, *([checkpoint.layers] if aligned else [])})
        source = export_source(checkpoint, depths, checkpoint.dim, plan.engine)
        on_progress("export", 1, 1)
    corpus = corpus_of(source, sweep.tasks, sweep.calibration)
    maps = NO_MAPS
    if aligned:
        with _timed(seconds, "align"):
            maps = _fit(sweep, source, folder)
    passes = Passes(sweep, source, corpus, maps, folder)
    with _timed(seconds, "quality"):
        for weights in plan.weights:
            passes.add(weights)
        crossing = passes.crossing()
        as_query, cross_depth = crossing.as_queries(), crossing.cross_depth()
    graphs, failures = passes.graphs, passes.failures
    texts = Texts(sweep.calibration, source.prompt, source.tokenizer_json, maps.tokenizer_json)
    costs = measure_costs(
        graphs, passes.samples, texts, plan, checkpoint.vocab_size, measure_anew, on_progress
    )
    graphs |= costs.graphs
    failures |= costs.failures
    seconds |= costs.seconds
    require_reference(plan, failures)
    facts = {
        graph: passes.facts(graph, points, costs.footprints[graph])
        for graph, points in costs.latency.items()
        if graph in costs.footprints
    }
    measured = Measured(
        quality=passes.quality,
        as_query=as_query,
        cross_depth=cross_depth,
        graphs=facts,
        added_bytes=_added(facts, passes, plan, checkpoint.dim),
        failures=failures,
        unaligned=maps.failures,
        seconds=seconds,
    )
    return source, measured, costs


def _added(
    graphs: Iterable[Graph], passes: Passes, plan: Plan, width: int
) -> dict[tuple[Graph, int, VectorPrecision], int]:
    """Return the bytes that every dim and codec add to the files of each graph."""
    return {
        (graph, dim, vectors): added_bytes(graph, dim, vectors, width, passes.widest(graph.layers))
        for graph in graphs
        for dim, vectors in product(plan.dims, plan.vectors)
    }


def _fit(sweep: Sweep, source: Source, folder: Path) -> Maps:
    """Fit the maps, and count how rare each token is, where depth 0 is measured."""
    checkpoint, plan = sweep.checkpoint, sweep.plan
    table = None
    if 0 in plan.aligned(checkpoint.layers):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UntrainedWarning)
            shallow = slice_checkpoint(checkpoint, 1, checkpoint.dim, folder / "tokens")
        texts = prompted(sweep.align_texts, prompts_of(checkpoint))
        table = TokenTable(shallow, texts)
    run = loaded_runner(source.graph, plan)
    return fit_maps(
        source, run, table, sweep.align_texts, sweep.calibration, plan, sweep.on_progress
    )


@contextmanager
def _timed(seconds: dict[str, float], step: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[step] = time.perf_counter() - start
