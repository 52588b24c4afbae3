"""The quality surface: the vectors of all depths from one pass, scored at every dim and precision.

A depth-n sub-model is a prefix of the full one. So one forward pass over a text that pools after
every layer gives the vectors of all depths, and cutting and encoding those gives every dim and
vector precision: the surface costs one full-depth encode of the texts per weight precision.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from m2dexport.build.mixed import close_gap, floor_texts, reaches_floor
from m2dexport.build.parity import (
    PROBES,
    Embedded,
    Parity,
    Run,
    embed_probes,
    measure_parity,
    require_parity,
)
from m2dexport.build.source import Source
from m2dexport.engines import engine_maker, engine_runner
from m2dexport.errors import M2DError, MissingExtra, UsageError
from m2dexport.precisions import WeightPrecision
from m2dexport.profile.plan import Plan
from m2dexport.profile.schema import cell_id
from m2dexport.progress import OnProgress
from m2dexport.quantize.activations import CalibrationTokens
from m2dexport.quantize.saturation import isa_of
from m2dexport.runtime.encoder import encode_tokens
from m2dexport.runtime.tokenizer import load_tokenizer
from m2dexport.vectors import codecs
from m2dexport.vectors.quality import evaluate
from m2dexport.vectors.tasks import Task

Floats = NDArray[np.float32]

_BATCH = 32


@dataclass(frozen=True)
class Corpus:
    """All texts of a sweep, each tokenized (and later encoded) once, however often it occurs."""

    ids: tuple[list[int], ...]
    probes: tuple[list[int], ...]
    calibration: tuple[int, ...]  # rows of ids
    tasks: tuple[tuple[Task, tuple[list[int], ...]], ...]  # a task, and the rows of its text sets

    def calibration_ids(self) -> list[list[int]]:
        """Return the token ids of each calibration text."""
        return [self.ids[row] for row in self.calibration]


@dataclass(frozen=True)
class Depth:
    """One depth in one weight precision, as it would be built."""

    graph: ir.Model  # float32 vectors of the full width, normalised
    vectors: Floats  # (texts, width), of the whole corpus, neither cut nor normalised
    batch_dependent: bool
    mixed: bool  # some weights stayed in float32, so that int8 keeps its floor


@dataclass(frozen=True)
class Surface:
    """All depths of one weight precision: what was computed of each, or why it failed."""

    depths: Mapping[int, Depth]
    failures: Mapping[int, str]


def corpus_of(source: Source, tasks: Sequence[Task], calibration: Sequence[str]) -> Corpus:
    """Tokenize the tasks' texts, the calibration texts and the probes, with their prompts."""
    prompts = source.checkpoint.prompts
    rows: dict[str, int] = {}

    def rows_of(texts: Iterable[str], role: str | None = None) -> list[int]:
        prompt = prompts.get(role, source.prompt) if role else source.prompt
        return [rows.setdefault(prompt + text, len(rows)) for text in texts]

    calibration_rows = rows_of(calibration)
    task_rows = tuple(
        (task, tuple(rows_of(text_set.texts, text_set.role) for text_set in task.texts()))
        for task in tasks
    )
    tokenizer = load_tokenizer(source.tokenizer_json)
    ids = tuple(encoding.ids for encoding in tokenizer.encode_batch(list(rows)))
    probes = tokenizer.encode_batch([source.prompt + text for text in PROBES])
    return Corpus(ids, tuple(e.ids for e in probes), tuple(calibration_rows), task_rows)


def compute_surface(
    source: Source, weights: WeightPrecision, corpus: Corpus, plan: Plan, on_progress: OnProgress
) -> Surface:
    """Quantize a source and run the whole corpus through it, once.

    A depth that does not reproduce the torch original fails, and the others go on. Where a text's
    vector depends on its batch at one of the depths, texts run one at a time, as they will in the
    runtime.

    Raises:
        UsageError: when the calibration texts do not do.
        MissingExtra: when the package that makes the precision is not installed.
    """
    calibration = CalibrationTokens(corpus.calibration_ids(), source.pad_id)
    try:
        graph = engine_maker(plan.engine).quantize(source.graph, weights, calibration, plan.isa)
    except (UsageError, MissingExtra):
        raise
    except M2DError as error:
        return Surface({}, dict.fromkeys(plan.layers, str(error)))
    run = _runner(graph, plan)
    parities = _parities(run, source, corpus, plan.layers)
    floor = engine_maker(plan.engine).PRECISIONS[weights].floor
    failures: dict[int, str] = {}
    for depth, parity in parities.items():
        try:
            require_parity(parity, floor, f"depth {depth} in {weights}")
        except M2DError as error:
            failures[depth] = str(error)
    if len(failures) == len(parities):
        return Surface({}, failures)
    dependent = {d for d, p in parities.items() if weights != "fp32" and not p.batch_invariant}
    batch = 1 if dependent - failures.keys() else _BATCH
    run = _counting(run, f"quality {weights}", corpus, on_progress)
    vectors = _encoded(run, corpus, source, batch)
    depths = {
        depth: Depth(source.vectors_at(depth, graph), vectors[:, i], depth in dependent, False)
        for i, depth in enumerate(plan.layers)
        if depth not in failures
    }
    if weights == "int8":
        _close_gaps(depths, failures, source, corpus, plan, on_progress)
    return Surface(depths, failures)


def qualities(
    surface: Surface, weights: WeightPrecision, corpus: Corpus, plan: Plan
) -> dict[str, dict[str, float]]:
    """Return cell id -> "task/metric" -> points, of every depth that did not fail."""
    found: dict[str, dict[str, float]] = {}
    for (layers, depth), dim in product(surface.depths.items(), plan.dims):
        vectors = depth.vectors
        calibration = vectors[list(corpus.calibration)]
        ranges = codecs.calibrate_ranges(codecs.truncate(calibration, dim))
        for precision in plan.vectors:
            found[cell_id(layers, dim, weights, precision)] = {
                f"{task.name}/{metric}": value
                for task, rows in corpus.tasks
                for metric, value in evaluate(
                    task, tuple(vectors[row] for row in rows), dim, precision, ranges
                ).items()
            }
    return found


def _parities(run: Run, source: Source, corpus: Corpus, layers: Sequence[int]) -> dict[int, Parity]:
    """Return depth -> how its vectors of the probes compare with torch's, in any batch."""
    found = embed_probes(run, corpus.probes, source.pad_id, source.checkpoint.max_length)
    parities = {}
    for index, depth in enumerate(layers):
        company = (found.batched, found.alone, found.padded)
        one_depth = Embedded(*(codecs.normalize(vectors[:, index]) for vectors in company))
        parities[depth] = measure_parity(codecs.normalize(source.probes[depth]), one_depth)
    return parities


def _close_gaps(
    depths: dict[int, Depth],
    failures: dict[int, str],
    source: Source,
    corpus: Corpus,
    plan: Plan,
    on_progress: OnProgress,
) -> None:
    """Put units of the depths back into float32 that miss the floor of int8, in place.

    What a depth needs is decided as ``build`` decides it; its vectors are then computed anew.
    """

    def encode(graph: ir.Model, ids: Sequence[Sequence[int]]) -> Floats:
        vectors = encode_tokens(_runner(graph, plan), ids, source.pad_id, _BATCH)
        assert vectors is not None
        return vectors

    texts = corpus.calibration_ids()
    exact = encode(source.graph, floor_texts(texts))
    rows = list(floor_texts(corpus.calibration))
    for index, layers in enumerate(plan.layers):
        if layers not in depths or reaches_floor(
            codecs.normalize(exact[:, index]), codecs.normalize(depths[layers].vectors[rows])
        ):
            continue
        try:
            graph, _ = close_gap(
                source.vectors_at(layers),
                depths[layers].graph,
                lambda graph, ids: encode(graph, ids)[:, 0],
                texts,
                on_progress,
            )
        except M2DError as error:
            failures[layers] = str(error)
            del depths[layers]
            continue
        vectors = encode(graph, corpus.ids)[:, 0]
        depths[layers] = Depth(graph, vectors, depths[layers].batch_dependent, True)


def _runner(graph: ir.Model, plan: Plan) -> Run:
    """Load a graph; return what runs it: its outputs become float32 (batch, outputs, width)."""
    engine, files = engine_runner(plan.engine), engine_maker(plan.engine).files(graph)
    session = engine.load(files, plan.device, isa_of(graph.graph))
    return lambda input_ids, mask: np.stack(engine.run(session, input_ids, mask), axis=1)


def _counting(run: Run, step: str, corpus: Corpus, on_progress: OnProgress) -> Run:
    done, total = 0, len(corpus.ids)

    def counted(input_ids: NDArray[np.int64], mask: NDArray[np.int64]) -> Floats:
        nonlocal done
        stacked: Floats = run(input_ids, mask)
        done += len(input_ids)
        on_progress(step, done, total)
        return stacked

    return counted


def _encoded(run: Run, corpus: Corpus, source: Source, batch_size: int) -> Floats:
    vectors = encode_tokens(run, corpus.ids, source.pad_id, batch_size)
    assert vectors is not None
    return vectors
