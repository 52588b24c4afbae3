"""Measure what the quality surface costs: a whole pass, as a ratio to one full-depth encode.

A pass gives every depth and dim, plain and aligned, in every vector precision, queries of each
depth against documents of each (in the first weights), intervals of all figures, and the files of
every graph. The encode is what a user of the full depth alone would run: the same texts, batches
and device. Three parts that a build has, too, and that do not grow with texts are measured apart:
making the weights (calibration, rounding); checks, which are the probes in all company, for int8
256 texts in fp32 that its floor is held against, and sessions for both; and writing graphs. The
surface is the rest: forward passes over the texts, depth 0 (measured apart, since a pass does that
while other steps leave cores idle), scores, intervals, and queries of cells against documents of
others.

    python tools/bench_sweep.py                                # the checkpoint and tasks that ship
    python tools/bench_sweep.py --texts 100000 --weights fp32  # memory, on made-up retrieval
    OMP_NUM_THREADS=1 python tools/bench_sweep.py --cpu --threads 1  # where other work goes on

Prints a Markdown table. The memory is the most that the process had up to then.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import page

from m2dexport.align.texts import align_texts
from m2dexport.batches import encode_tokens
from m2dexport.build.mixed import BATCH, floor_texts
from m2dexport.build.parity import embed_probes
from m2dexport.checkpoint.open import open_checkpoint
from m2dexport.cores import threads_for
from m2dexport.data import calibration_texts
from m2dexport.engines import Device, engine_maker
from m2dexport.files import scratch_folder
from m2dexport.profile.basis import Sweep, Work
from m2dexport.profile.floor import floor_of
from m2dexport.profile.grid import Pass, passes_of
from m2dexport.profile.parts import passing_parts
from m2dexport.profile.plan import default_plan, settled
from m2dexport.profile.surface import in_batches, loaded_runner
from m2dexport.quantize.activations import CalibrationTokens
from m2dexport.vectors.retrieval import RetrievalTask
from m2dexport.vectors.tasks import Task, default_tasks, load_task

_BATCH = 32
_QUERIES = 1000
_HEAD = (
    *("weights", "engine", "encode, s", "make, s", "checks, s", "graphs, s", "surface, s"),
    *("pass, s", "surface / encode", "(pass - make) / encode", "cells", "peak MB"),
)
Clock = Callable[[], float]


def made_up(texts: int) -> RetrievalTask:
    """Return a retrieval task of texts of 3 to 30 words, whose queries are parts of documents."""
    words = sorted({word for text in calibration_texts() for word in text.split()})
    chance = np.random.default_rng(0)
    documents = tuple(
        f"{number} {' '.join(chance.choice(words, chance.integers(3, 30)))}"
        for number in range(texts)
    )
    queries = tuple(" ".join(text.split()[:4]) for text in documents[:_QUERIES])
    relevance = tuple({number: 1.0} for number in range(len(queries)))
    return RetrievalTask("made-up", queries, documents, relevance, "0" * 64)


def apart(work: Work, one: Pass, clock: Clock) -> tuple[float, float, float, Callable[[], float]]:
    """Return the seconds of making weights, checks, and depth 0, and what times one encode.

    An encode is that of the full depth alone.
    """
    source, corpus, plan = work.sources[one.plan.engine], work.basis.corpus, one.plan
    plan = in_batches(plan, source, max(map(len, corpus.ids)))
    workers = plan.device.workers or 1
    maker, pad_id = engine_maker(plan.engine), source.pad_id
    calibration = CalibrationTokens(corpus.calibration_ids(), pad_id)
    start = clock()
    graph = maker.quantize(source.graph, one.weights, calibration, plan.isa)
    made = clock()
    every = loaded_runner(graph, plan)
    embed_probes(every, corpus.probes, pad_id, source.checkpoint.max_length, workers)
    if maker.PRECISIONS[one.weights].faithful:
        exact = loaded_runner(source.graph, replace(plan, device=replace(plan.device, threads=1)))
        encode_tokens(exact, floor_texts(corpus.calibration_ids()), pad_id, BATCH, workers)
    checked = clock()
    with scratch_folder() as folder:
        maps = work.maps.stored_in(one.weights)
        list(floor_of(maps, one.weights, work.basis.token_ids, source.prompt, folder))
    static = clock() - checked
    full = source.vectors_at(plan.compared_with[0], graph)

    def encode() -> float:
        run = loaded_runner(full, plan)
        encode_tokens(run, corpus.ids[:_BATCH], pad_id, _BATCH)
        begun = clock()
        encode_tokens(run, corpus.ids, pad_id, _BATCH, workers)
        return clock() - begun

    return made - start, checked - made, static, encode


@dataclass(frozen=True)
class Steps:
    """When each step of a sweep began and, so far, ended."""

    clock: Clock
    begun: dict[str, float] = field(default_factory=dict)
    ended: dict[str, float] = field(default_factory=dict)

    def __call__(self, step: str, done: int, total: int) -> None:
        """Note that a step goes on."""
        self.ended[step] = self.clock()
        self.begun.setdefault(step, self.ended[step])

    def took(self, step: str) -> float:
        """Return how long a step took."""
        return self.ended[step] - self.begun[step]


def row(work: Work, steps: Steps, one: Pass) -> list[str]:
    """Return a row of the table."""
    page.say(f"{one.name}: {len(one.wanted)} cells")
    made, checks, static, encoded = apart(work, one, steps.clock)
    before = encoded()
    start = steps.clock()
    work.measured(one)
    end = steps.clock()
    encode = (before + encoded()) / 2  # a machine's clock is not steady
    whole, graphs = end - start, steps.took(f"writing {one.name}")
    encoding, scoring = f"quality {one.name}", f"scoring {one.name}"
    scored = steps.begun[f"writing {one.name}"] - steps.begun[scoring]
    surface = steps.took(encoding) + static + scored
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 10)
    seconds = [f"{each:.1f}" for each in (encode, made, checks, graphs, surface, whole)]
    ratios = [f"{each / encode:.2f}" for each in (surface, whole - made)]
    return [one.weights, one.plan.engine, *seconds, *ratios, str(len(one.wanted)), f"{peak:.0f}"]


def lines(given: argparse.Namespace) -> Iterator[str]:
    """Yield the page."""
    checkpoint = open_checkpoint(given.model)
    tasks: tuple[Task, ...] = tuple(map(load_task, given.eval or ())) or default_tasks()
    if given.texts:
        tasks = (made_up(given.texts),)
    device = Device(threads=given.threads)
    base = replace(
        settled(default_plan(checkpoint), checkpoint), weights=given.weights, device=device
    )
    plans = tuple(replace(base, engine=engine) for engine in given.engine)
    passes = passes_of(plans)
    wanted = frozenset(name for each in passes for name in each.wanted)
    texts = align_texts(None)
    steps = Steps(time.process_time if given.cpu else time.perf_counter)
    sweep = Sweep(checkpoint, tasks, calibration_texts(), texts, plans, passes, wanted, steps)
    threads = f"{threads_for(given.threads)} threads" + (", CPU seconds" if given.cpu else "")
    yield from page.heading(threads, ("onnxruntime", "torch", "numpy"))
    with passing_parts() as parts:
        work = Work(sweep, parts)
        yield from ("", f"{len(work.basis.corpus.ids):,} texts, {len(wanted)} cells:", "")
        yield from page.table(_HEAD, (row(work, steps, one) for one in passes))


def names(text: str) -> tuple[str, ...]:
    """Return what an option such as "fp32,int8" says."""
    return tuple(text.split(","))


def main() -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", type=Path, help="default: the checkpoint that ships")
    parser.add_argument("--eval", type=Path, action="append", help="default: the tasks that ship")
    parser.add_argument("--texts", type=int, help="so many made-up documents in place of tasks")
    parser.add_argument("--weights", type=names, default="fp32,fp16,int8")
    parser.add_argument("--engine", type=names, default="onnx,openvino")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--cpu", action="store_true", help="CPU seconds of all threads")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    page.write(lines(given), given.out)


if __name__ == "__main__":
    main()
