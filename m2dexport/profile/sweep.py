"""The sweep: every cell's quality from one pass per weight precision, its latency, size and memory.

A depth-n sub-model is a prefix of the full one. So one forward pass over a text that pools after
every layer gives the vectors of all depths, and cutting and encoding those gives every dim and
vector precision: the quality surface costs one full-depth encode of the texts per weight precision.
"""

from __future__ import annotations

import datetime
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import onnx_ir as ir
import tokenizers
from numpy.typing import NDArray

from m2dexport.build.build import default_prompt, graph_files, pad_id, tokenizer_of, tool_versions
from m2dexport.build.mixed import close_gap, floor_texts, reaches_floor
from m2dexport.build.parity import (
    PROBES,
    Embedded,
    Run,
    embed_probes,
    measure_parity,
    require_parity,
)
from m2dexport.checkpoint.open import Checkpoint, weights_sha256
from m2dexport.data import texts_sha256
from m2dexport.engines import engine_module
from m2dexport.graph.export import graph_from_checkpoint
from m2dexport.graph.fuse import fuse_for_engine
from m2dexport.graph.vector import depth_graph, tail_bytes, vector_graph
from m2dexport.precisions import VectorPrecision, WeightPrecision
from m2dexport.profile import manifest
from m2dexport.profile.latency import (
    Candidate,
    Footprint,
    LatencyPoint,
    measure_footprint,
    measure_latency,
)
from m2dexport.profile.machine import read_machine
from m2dexport.profile.manifest import Cell, Flag, Profile, cell_id
from m2dexport.profile.plan import Plan, require_plan
from m2dexport.profile.select import LATENCY_NOISE, QUALITY_NOISE, frontier
from m2dexport.progress import OnProgress
from m2dexport.quantize import CalibrationTokens, quantize_weights
from m2dexport.quantize.saturation import isa_of
from m2dexport.reference.pooler import Reference
from m2dexport.runtime.artifact import GRAPH_FILES
from m2dexport.runtime.encoder import encode_tokens, load_tokenizer
from m2dexport.slice.slicing import UntrainedWarning, slice_checkpoint
from m2dexport.vectors import codecs
from m2dexport.vectors.quality import evaluate
from m2dexport.vectors.tasks import Task

Floats = NDArray[np.float32]

_BATCH = 32


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
    """Measure every cell of a plan.

    Args:
        checkpoint: the 2D checkpoint.
        tasks: evaluation data; a cell's quality is the mean of the tasks' main metrics.
        calibration: texts that freeze the ranges of int8 and int4 vectors.
        plan: the cells, shapes, threads and repeats.
        model: how the user named the checkpoint, recorded so that a cell can be built again.
        pooling: the pooling that the user declared; recorded likewise.
        on_progress: told about every step.

    Raises:
        UsageError: when the plan lies outside the checkpoint.
        ParityError: when a depth does not reproduce the torch original in one of the precisions.
    """
    require_plan(checkpoint, plan, tasks)
    with tempfile.TemporaryDirectory(prefix="m2dexport-") as scratch:
        measured = _measure(checkpoint, tasks, calibration, plan, Path(scratch), on_progress)
    batch, sequence = plan.shapes[0]
    return Profile(
        format=manifest.FORMAT,
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        tools=tool_versions(plan.engine),
        machine=read_machine(plan.threads),
        checkpoint=manifest.CheckpointInfo(
            model=model,
            sha256=weights_sha256(checkpoint),
            model_type=checkpoint.model_type,
            layers=checkpoint.layers,
            dim=checkpoint.dim,
            trained=checkpoint.trained,
            pooling=pooling,
        ),
        tasks=tuple(
            manifest.TaskInfo(
                name=task.name,
                kind=task.kind,
                main_metric=task.main_metric,
                texts=sum(len(text_set.texts) for text_set in task.texts()),
                sha256=task.sha256,
            )
            for task in tasks
        ),
        calibration_sha256=texts_sha256(calibration),
        reference=_reference_id(plan),
        latency_shape=manifest.Shape(batch=batch, sequence=sequence),
        seconds=measured.seconds,
        cells=_cells(checkpoint, plan, tasks, measured),
    )


@dataclass(frozen=True)
class _Measured:
    """What was measured, by cell id or by the graph that cells share."""

    quality: Mapping[str, Mapping[str, float]]  # cell id -> "task/metric" -> points
    latency: Mapping[str, Sequence[LatencyPoint]]  # "depth-weights" -> a point per shape
    footprints: Mapping[str, Footprint]  # "depth-weights"
    sizes: Mapping[str, int]  # "depth-weights" -> bytes of graph and tokenizer
    tail_sizes: Mapping[tuple[int, VectorPrecision], int]  # bytes that cut and codec add
    flags: Mapping[str, Sequence[Flag]]  # "depth-weights" -> what its cells share
    seconds: Mapping[str, float]  # step -> how long it took


def _measure(
    checkpoint: Checkpoint,
    tasks: Sequence[Task],
    calibration: Sequence[str],
    plan: Plan,
    folder: Path,
    on_progress: OnProgress,
) -> _Measured:
    seconds: dict[str, float] = {}
    with _timed(seconds, "export"):
        on_progress("export", 0, 1)
        source = _export(checkpoint, folder / "full", plan)
        on_progress("export", 1, 1)
    corpus = _corpus(source, tasks, calibration)
    quality: dict[str, dict[str, float]] = {}
    graphs: dict[str, Candidate] = {}
    flags: dict[str, list[Flag]] = {}
    with _timed(seconds, "quality"):
        for weights in plan.weights:
            tokens = corpus.calibration_tokens(source.pad_id)
            graph = quantize_weights(source.graph, weights, tokens, engine=plan.engine)
            surface, dependent = _one_pass(graph, weights, source, corpus, plan, on_progress)
            depths = {depth: _one_depth(graph, depth, source) for depth in plan.layers}
            mixed = []
            if weights == "int8":
                mixed = _close_gaps(depths, surface, source, corpus, plan, on_progress)
            quality.update(_qualities(surface, weights, corpus, plan))
            for depth, one_depth in depths.items():
                name = f"{depth}-{weights}"
                graphs[name] = _write(one_depth, plan.engine, folder / name)
                flags[name] = ["batch_dependent"] * (depth in dependent)
                flags[name] += ["mixed_precision"] * (depth in mixed)
    with _timed(seconds, "latency"):
        latency = _latencies(graphs, checkpoint, plan, on_progress)
    with _timed(seconds, "memory"):
        footprints = _footprints(graphs, checkpoint, plan, on_progress)
    return _Measured(
        quality=quality,
        latency=latency,
        footprints=footprints,
        sizes={n: graph.size_bytes + source.tokenizer_bytes for n, graph in graphs.items()},
        tail_sizes={
            (dim, vectors): tail_bytes(checkpoint.dim, dim, vectors)
            for dim, vectors in product(plan.dims, plan.vectors)
        },
        flags=flags,
        seconds=seconds,
    )


@dataclass(frozen=True)
class _Source:
    """The exported checkpoint: fp32, one output per depth of the plan."""

    graph: ir.Model
    width: int
    tokenizer: tokenizers.Tokenizer
    tokenizer_bytes: int
    pad_id: int
    max_length: int
    default_prompt: str
    prompts: Mapping[str, str]
    probes: Mapping[int, Floats]  # depth -> the torch original's vectors of the probes


@dataclass(frozen=True)
class _Corpus:
    """All texts of a sweep, each tokenized (and later encoded) once, however often it occurs."""

    ids: tuple[list[int], ...]
    calibration: list[int]  # rows of ids
    tasks: tuple[tuple[Task, tuple[list[int], ...]], ...]  # a task, and the rows of its text sets

    def calibration_tokens(self, pad_id: int) -> CalibrationTokens:
        return CalibrationTokens([self.ids[row] for row in self.calibration], pad_id)


def _export(checkpoint: Checkpoint, folder: Path, plan: Plan) -> _Source:
    with warnings.catch_warnings():
        # The profile flags every untrained cell; this one slice stands for all of them.
        warnings.simplefilter("ignore", UntrainedWarning)
        full = slice_checkpoint(checkpoint, checkpoint.layers, checkpoint.dim, folder)
    graph = graph_from_checkpoint(full, plan.layers)
    fuse_for_engine(graph, plan.engine)
    tokenizer_json = tokenizer_of(full)
    prompt = default_prompt(full)
    return _Source(
        graph=graph,
        width=full.dim,
        tokenizer=load_tokenizer(tokenizer_json),
        tokenizer_bytes=len(tokenizer_json.encode()),
        pad_id=pad_id(full),
        max_length=full.max_length,
        default_prompt=prompt,
        prompts=full.prompts,
        probes=Reference(full, plan.layers).encode(PROBES, prompt=prompt),
    )


def _corpus(source: _Source, tasks: Sequence[Task], calibration: Sequence[str]) -> _Corpus:
    rows: dict[str, int] = {}

    def rows_of(texts: Sequence[str], role: str | None) -> list[int]:
        prompt = source.prompts.get(role, source.default_prompt) if role else source.default_prompt
        return [rows.setdefault(prompt + text, len(rows)) for text in texts]

    calibration_rows = rows_of(calibration, None)
    task_rows = tuple(
        (task, tuple(rows_of(text_set.texts, text_set.role) for text_set in task.texts()))
        for task in tasks
    )
    ids = tuple(encoding.ids for encoding in source.tokenizer.encode_batch(list(rows)))
    return _Corpus(ids, calibration_rows, task_rows)


def _one_pass(
    graph: ir.Model,
    weights: WeightPrecision,
    source: _Source,
    corpus: _Corpus,
    plan: Plan,
    on_progress: OnProgress,
) -> tuple[dict[int, Floats], list[int]]:
    """Return the pooled vectors of the whole corpus, and where they depend on the batch.

    The first result is depth -> float32 (texts, width), from one pass; the second names the depths
    at which a text's vector depends on its batch. If there are any, texts run one at a time, as
    they will in the runtime.

    Raises:
        ParityError: when a depth of the graph does not reproduce the torch original.
    """
    quiet = _runner(graph, plan)
    done = 0

    def run(input_ids: NDArray[np.int64], mask: NDArray[np.int64]) -> Floats:
        nonlocal done
        stacked = quiet(input_ids, mask)
        done += len(input_ids)
        on_progress(f"quality {weights}", min(done, len(corpus.ids)), len(corpus.ids))
        return stacked

    encodings = source.tokenizer.encode_batch([source.default_prompt + text for text in PROBES])
    probes = [encoding.ids for encoding in encodings]
    found = embed_probes(run, probes, source.pad_id, source.max_length)
    dependent = []
    for index, depth in enumerate(plan.layers):
        company = (found.batched, found.alone, found.padded)
        one_depth = Embedded(*(codecs.normalize(vectors[:, index]) for vectors in company))
        parity = measure_parity(codecs.normalize(source.probes[depth]), one_depth)
        require_parity(parity, weights, f"depth {depth} in {weights}")
        if weights != "fp32" and not parity.batch_invariant:
            dependent.append(depth)
    done = 0
    vectors = encode_tokens(run, corpus.ids, source.pad_id, 1 if dependent else _BATCH)
    assert vectors is not None
    return {depth: vectors[:, index] for index, depth in enumerate(plan.layers)}, dependent


def _runner(graph: ir.Model, plan: Plan) -> Run:
    """Load a graph; return what runs it: its outputs become float32 (batch, outputs, width)."""
    engine = engine_module(plan.engine)
    files, isa = graph_files(graph, plan.engine), isa_of(graph.graph)
    session = engine.load(*files, threads=plan.threads, provider=plan.provider, isa=isa)
    return lambda input_ids, mask: np.stack(engine.run(session, input_ids, mask), axis=1)


def _one_depth(all_depths: ir.Model, depth: int, source: _Source) -> ir.Model:
    return vector_graph(depth_graph(all_depths, depth), source.width)


def _close_gaps(
    depths: dict[int, ir.Model],
    surface: dict[int, Floats],
    source: _Source,
    corpus: _Corpus,
    plan: Plan,
    on_progress: OnProgress,
) -> list[int]:
    """Put units of the depths back that miss the floor of int8; returns these depths.

    What a depth needs is decided as ``build`` decides it; its vectors are then computed anew.
    """

    def encode(graph: ir.Model, ids: Sequence[Sequence[int]]) -> Floats:
        vectors = encode_tokens(_runner(graph, plan), ids, source.pad_id, _BATCH)
        assert vectors is not None
        return vectors

    texts = [corpus.ids[row] for row in corpus.calibration]
    exact = encode(source.graph, floor_texts(texts))
    missed = []
    for index, depth in enumerate(plan.layers):
        found = codecs.normalize(surface[depth][floor_texts(corpus.calibration)])
        if reaches_floor(codecs.normalize(exact[:, index]), found):
            continue
        depths[depth], _ = close_gap(
            _one_depth(source.graph, depth, source),
            depths[depth],
            lambda graph, ids: encode(graph, ids)[:, 0],
            texts,
            on_progress,
        )
        surface[depth] = encode(depths[depth], corpus.ids)[:, 0]
        missed.append(depth)
    return missed


def _write(graph: ir.Model, engine: str, stem: Path) -> Candidate:
    """Write the engine's files of a graph, to be measured."""
    paths = [stem.with_suffix(Path(name).suffix) for name in GRAPH_FILES[engine]]
    for path, content in zip(paths, graph_files(graph, engine), strict=True):
        path.write_bytes(content)
    return Candidate(paths[0], isa_of(graph.graph))


def _qualities(
    surface: Mapping[int, Floats],
    weights: WeightPrecision,
    corpus: _Corpus,
    plan: Plan,
) -> dict[str, dict[str, float]]:
    """Return cell id -> "task/metric" -> points, from the vectors of one weight precision."""
    qualities: dict[str, dict[str, float]] = {}
    for depth, dim in product(plan.layers, plan.dims):
        vectors = surface[depth]
        ranges = codecs.calibrate_ranges(codecs.truncate(vectors[corpus.calibration], dim))
        for precision in plan.vectors:
            qualities[cell_id(depth, dim, weights, precision)] = {
                f"{task.name}/{metric}": value
                for task, rows in corpus.tasks
                for metric, value in evaluate(
                    task, tuple(vectors[row] for row in rows), dim, precision, ranges
                ).items()
            }
    return qualities


def _latencies(
    graphs: Mapping[str, Candidate], checkpoint: Checkpoint, plan: Plan, on_progress: OnProgress
) -> dict[str, tuple[LatencyPoint, ...]]:
    total = len(graphs) * len(plan.shapes)
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        on_progress("latency", done, total)

    return measure_latency(
        graphs,
        [(batch, min(length, checkpoint.max_length)) for batch, length in plan.shapes],
        vocab_size=checkpoint.vocab_size,
        threads=plan.threads,
        engine=plan.engine,
        provider=plan.provider,
        repeats=plan.repeats,
        on_step=step,
    )


def _footprints(
    graphs: Mapping[str, Candidate], checkpoint: Checkpoint, plan: Plan, on_progress: OnProgress
) -> dict[str, Footprint]:
    largest = max(plan.shapes, key=lambda shape: shape[0] * shape[1])
    footprints = {}
    for done, (name, graph) in enumerate(graphs.items(), start=1):
        footprints[name] = measure_footprint(
            graph,
            (largest[0], min(largest[1], checkpoint.max_length)),
            vocab_size=checkpoint.vocab_size,
            threads=plan.threads,
            engine=plan.engine,
            provider=plan.provider,
        )
        on_progress("memory", done, len(graphs))
    return footprints


def _cells(
    checkpoint: Checkpoint,
    plan: Plan,
    tasks: Sequence[Task],
    measured: _Measured,
) -> tuple[Cell, ...]:
    """Join what was measured per cell with what cells share: latency does not depend on the dim."""
    cells: dict[str, Cell] = {}
    for depth, dim, weights, vectors in product(plan.layers, plan.dims, plan.weights, plan.vectors):
        name = cell_id(depth, dim, weights, vectors)
        graph = f"{depth}-{weights}"
        points = measured.latency[graph]
        quality = measured.quality[name]
        cells[name] = Cell(
            id=name,
            layers=depth,
            dim=dim,
            weights=weights,
            vectors=vectors,
            engine=plan.engine,
            provider=plan.provider,
            quality=quality,
            mean_quality=float(
                np.mean([quality[f"{task.name}/{task.main_metric}"] for task in tasks])
            ),
            retention=1.0,
            latency=tuple(manifest.Latency(**vars(point)) for point in points),
            p50_ms=points[0].p50_ms,
            p95_ms=points[0].p95_ms,
            load_ms=measured.footprints[graph].load_ms,
            size_bytes=measured.sizes[graph] + measured.tail_sizes[dim, vectors],
            peak_memory_bytes=measured.footprints[graph].peak_memory_bytes,
            bytes_per_vector=codecs.bytes_per_vector(dim, vectors),
            flags=(),
            on_frontier=False,
        )
    reference = cells[_reference_id(plan)]
    best = frontier(list(cells.values()))
    return tuple(
        cell.model_copy(
            update={
                "retention": cell.mean_quality / reference.mean_quality,
                "flags": _flags(cell, cells, checkpoint, plan, measured.flags),
                "on_frontier": cell.id in best,
            }
        )
        for cell in cells.values()
    )


def _reference_id(plan: Plan) -> str:
    return cell_id(max(plan.layers), max(plan.dims), plan.weights[0], plan.vectors[0])


def _flags(
    cell: Cell,
    cells: Mapping[str, Cell],
    checkpoint: Checkpoint,
    plan: Plan,
    shared: Mapping[str, Sequence[Flag]],
) -> tuple[Flag, ...]:
    flags: list[Flag] = []
    if checkpoint.trained is not None and (cell.layers, cell.dim) not in checkpoint.trained:
        flags.append("untrained")
    twin = cells.get(cell_id(cell.layers, cell.dim, "fp32", cell.vectors))
    if twin is not None and cell.p50_ms > twin.p50_ms * LATENCY_NOISE:
        flags.append("slower_than_fp32")
    shallower = [depth for depth in plan.layers if depth < cell.layers]
    if shallower:
        below = cells[cell_id(max(shallower), cell.dim, cell.weights, cell.vectors)]
        if cell.mean_quality < below.mean_quality - QUALITY_NOISE:
            flags.append("below_shallower")
    return (*flags, *shared[f"{cell.layers}-{cell.weights}"])


@contextmanager
def _timed(seconds: dict[str, float], step: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[step] = time.perf_counter() - start
