"""The quality surface: the vectors of all depths from one pass.

A depth-n sub-model is a prefix of the full one. So one forward pass over a text that pools after
every layer gives the vectors of all depths, and cutting and encoding those (``views``) gives every
dim and vector precision: the surface costs one full-depth encode of the texts per weight precision,
and the scoring.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from m2dexport.batches import encode_tokens
from m2dexport.build.mixed import BATCH, close_gap, floor_texts, reaches_floor
from m2dexport.build.parity import (
    PROBES,
    Embedded,
    Parity,
    Run,
    embed_probes,
    measure_parity,
    require_finite,
    require_parity,
)
from m2dexport.build.recipe import MIN_COVERAGE
from m2dexport.build.source import Source
from m2dexport.cores import usable_cores
from m2dexport.engines import engine_maker, engine_runner
from m2dexport.errors import M2DError, MissingExtra, UsageError
from m2dexport.precisions import WeightPrecision
from m2dexport.profile.grid import pass_name
from m2dexport.profile.plan import Plan
from m2dexport.profile.settings import batches_at_once
from m2dexport.progress import OnProgress
from m2dexport.quantize.activations import CalibrationTokens
from m2dexport.quantize.coverage import coverage, require_coverage
from m2dexport.quantize.recipes import Requirement
from m2dexport.quantize.saturation import isa_of
from m2dexport.runtime.tokenizer import load_tokenizer, tokenize
from m2dexport.vectors import codecs
from m2dexport.vectors.ranking import Rows
from m2dexport.vectors.tasks import Task

Floats = NDArray[np.float32]

_BATCH = 32
#: Vectors that take more bytes than this are kept on disk while a pass is scored.
_IN_MEMORY = 64 << 20


@dataclass(frozen=True)
class Corpus:
    """All texts of a sweep, each tokenized (and later encoded) once, however often it occurs."""

    texts: tuple[str, ...]  # with their prompts
    ids: tuple[list[int], ...]
    probes: tuple[list[int], ...]
    calibration: tuple[int, ...]  # rows of ids
    tasks: tuple[tuple[Task, tuple[Rows, ...]], ...]  # a task, and the rows of its text sets

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
        (task, tuple(np.array(rows_of(each.texts, each.role)) for each in task.texts()))
        for task in tasks
    )
    tokenizer = load_tokenizer(source.tokenizer_json)
    ids = tuple(tokens.ids for tokens in tokenize(tokenizer, list(rows), ""))
    probes = tuple(tokens.ids for tokens in tokenize(tokenizer, PROBES, source.prompt))
    return Corpus(tuple(rows), ids, probes, tuple(calibration_rows), task_rows)


def compute_surface(
    source: Source,
    weights: WeightPrecision,
    corpus: Corpus,
    plan: Plan,
    on_progress: OnProgress,
    folder: Path | None = None,
) -> Surface:
    """Quantize a source and run the whole corpus through it, once.

    A depth that would not be built fails, and the others go on: it does not reproduce the torch
    original, too little of it was quantized, or it does not run. Where a text's vector depends on
    its batch, texts run one at a time, as they will in the runtime.

    Args:
        source: the exported checkpoint, with the plan's depths at least.
        weights: the precision.
        corpus: the texts.
        plan: the depths, engine and device.
        on_progress: called as texts are done.
        folder: for vectors that are too many for the memory; None: they stay there.

    Raises:
        UsageError: when the calibration texts do not do.
        MissingExtra: when the package that makes the precision is not installed.
    """
    source = source.at_depths(plan.depths)  # it may have the full depth for the maps alone
    plan = in_batches(plan, source, max(map(len, corpus.ids)))
    one_pass = _Pass(source, weights, corpus, plan, on_progress, folder)
    calibration = CalibrationTokens(corpus.calibration_ids(), source.pad_id)
    try:
        graph = engine_maker(plan.engine).quantize(source.graph, weights, calibration, plan.isa)
        candidates = one_pass.candidates(graph)
    except (UsageError, MissingExtra):
        raise
    except M2DError as error:  # of the graph that all depths share
        return Surface({}, dict.fromkeys(plan.depths, str(error)))
    failures: dict[int, str] = {}
    depths: dict[int, Depth] = {}
    for layers, candidate in candidates.items():
        try:
            depths[layers] = one_pass.checked(layers, candidate)
        except M2DError as error:
            failures[layers] = str(error)
    return Surface(depths, failures)


@dataclass(frozen=True)
class _Candidate:
    """One depth, not yet checked. All arrays hold pooled vectors of (texts, width)."""

    graph: ir.Model
    probes: Embedded
    vectors: Floats
    exact: Floats  # those of ``floor_texts`` in fp32; empty where the precision needs none


@dataclass(frozen=True)
class _Pass:
    """One weight precision of a sweep: what its steps share."""

    source: Source
    weights: WeightPrecision
    corpus: Corpus
    plan: Plan
    on_progress: OnProgress
    folder: Path | None

    @property
    def requirement(self) -> Requirement:
        known: Mapping[str, Requirement] = engine_maker(self.plan.engine).PRECISIONS
        return known[self.weights]

    def candidates(self, graph: ir.Model) -> dict[int, _Candidate]:
        """Run probes and corpus through a graph of all depths; return each depth's part."""
        run = loaded_runner(graph, self.plan)
        probes = self._probes(run)
        places = {depth: place for place, depth in enumerate(self.source.probes)}
        measured = {layers: places[layers] for layers in self.plan.depths}
        dependent = any(self._depends_on_batch(_at(probes, at)) for at in measured.values())
        step = f"quality {pass_name(self.weights, self.plan.engine)}"
        run = _counting(run, step, self.corpus, self.on_progress)
        vectors = self._encoded(run, self.corpus.ids, 1 if dependent else _BATCH)
        exact = vectors[:0]
        if self.requirement.faithful:
            ids = floor_texts(self.corpus.calibration_ids())
            exact = self._decisive(self.source.graph, ids, usable_cores())
        return {
            layers: _Candidate(
                self.source.vectors_at(layers, graph),
                _at(probes, place),
                vectors[:, place],
                exact[:, place],
            )
            for layers, place in measured.items()
        }

    def checked(self, layers: int, candidate: _Candidate) -> Depth:
        """Return a depth that passes the checks of ``build``, mixed where its precision asks that.

        Raises:
            M2DError: when it fails one, naming which.
        """
        name = f"depth {layers} in {self.weights}"
        kept: frozenset[str] = frozenset()
        if self.requirement.faithful:
            candidate, kept = self._closed(layers, candidate)
        require_finite(candidate.vectors, name)
        parity = self._parity(layers, candidate.probes)
        require_parity(parity, self.requirement.floor, name)
        require_coverage(coverage(candidate.graph, self.weights, kept), MIN_COVERAGE, name)
        dependent = self.requirement.floor is not None and not parity.batch_invariant
        return Depth(candidate.graph, candidate.vectors, dependent, bool(kept))

    def _closed(self, layers: int, candidate: _Candidate) -> tuple[_Candidate, frozenset[str]]:
        """Put units back into float32 until the floor is reached, and run what came of it."""
        rows = list(floor_texts(self.corpus.calibration))
        found = codecs.normalize(candidate.vectors[rows])
        if reaches_floor(codecs.normalize(candidate.exact), found):
            return candidate, frozenset()
        graph, mixture = close_gap(
            self.source.vectors_at(layers),
            candidate.graph,
            lambda graph, ids, workers: self._decisive(graph, ids, workers)[:, 0],
            self.corpus.calibration_ids(),
            self.on_progress,
        )
        run = loaded_runner(graph, self.plan)
        vectors = self._encoded(run, self.corpus.ids, _BATCH)[:, 0]
        kept = mixture.kept if mixture else frozenset()
        return replace(
            candidate, graph=graph, probes=_at(self._probes(run), 0), vectors=vectors
        ), kept

    def _decisive(self, graph: ir.Model, ids: Sequence[Sequence[int]], workers: int) -> Floats:
        """Encode each batch in one thread, as ``build`` does where vectors decide what is kept."""
        plan = replace(self.plan, device=replace(self.plan.device, threads=1))
        return self._encoded(loaded_runner(graph, plan), ids, BATCH, workers)

    def _probes(self, run: Run) -> Embedded:
        longest = self.source.checkpoint.max_length
        return embed_probes(
            run, self.corpus.probes, self.source.pad_id, longest, self.plan.device.workers or 1
        )

    def _encoded(
        self, run: Run, ids: Sequence[Sequence[int]], batch_size: int, workers: int | None = None
    ) -> Floats:
        """Return float32 (texts, outputs, width)."""
        empty, workers = partial(empty_in, self.folder), workers or self.plan.device.workers or 1
        vectors = encode_tokens(run, ids, self.source.pad_id, batch_size, workers, empty)
        assert vectors is not None
        return vectors

    def _parity(self, layers: int, probes: Embedded) -> Parity:
        company = (probes.batched, probes.alone, probes.padded)
        found = Embedded(*(codecs.normalize(vectors) for vectors in company))
        return measure_parity(codecs.normalize(self.source.probes[layers]), found)

    def _depends_on_batch(self, probes: Embedded) -> bool:
        """Say whether a quantized depth's vectors depend on the texts beside them."""
        found = Embedded(*(codecs.normalize(v) for v in vars(probes).values()))
        finite = np.isfinite(found.alone).all()  # what is not fails its checks
        invariant = not finite or measure_parity(found.alone, found).batch_invariant
        return self.requirement.floor is not None and not invariant


def empty_in(folder: Path | None, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
    """Return a new array: in memory, or where it would be large, in a file of a folder.

    The file has no name, and is gone with the array.

    Raises:
        OSError: when the disk has no room for it; a file with holes would kill the process later.
    """
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if folder is None or size <= _IN_MEMORY or sys.platform == "win32":
        return np.empty(shape, dtype)
    with tempfile.TemporaryFile(dir=folder) as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            file.truncate(size)
        return np.memmap(file, dtype, "r+", shape=shape)


def _at(probes: Embedded, index: int) -> Embedded:
    """Return one output of probes of (texts, outputs, width)."""
    return Embedded(*(vectors[:, index] for vectors in vars(probes).values()))


def in_batches(plan: Plan, source: Source, longest: int) -> Plan:
    """Return a plan whose device runs several batches at once, of texts of so many tokens."""
    device = batches_at_once(plan.device, plan.engine, longest, source.checkpoint.hidden)
    return replace(plan, device=device)


def loaded_runner(graph: ir.Model, plan: Plan) -> Run:
    """Load a graph; return what runs it: its outputs become float32 (batch, outputs, width)."""
    engine = engine_runner(plan.engine)
    files = engine_maker(plan.engine).files(graph, plan.compilation)
    session = engine.load(files, plan.device, isa_of(graph.graph))
    return lambda input_ids, mask: np.stack(engine.run(session, input_ids, mask), axis=1)


def _counting(run: Run, step: str, corpus: Corpus, on_progress: OnProgress) -> Run:
    done, total, one_at_a_time = 0, len(corpus.ids), Lock()
    on_progress(step, 0, total)

    def counted(input_ids: NDArray[np.int64], mask: NDArray[np.int64]) -> Floats:
        nonlocal done
        stacked: Floats = run(input_ids, mask)
        with one_at_a_time:
            done += len(input_ids)
            on_progress(step, done, total)
        return stacked

    return counted
