"""Layers x weights x vectors x dims of a checkpoint, in one run: docs/quantization-table.md.

    python tools/bench_quantization.py --model CHECKPOINT --sts test.tsv --retrieval BEIR-FOLDER

Each depth is built in every weight precision, which encodes the texts once, in float32 and at full
width; every dim and vector precision is computed from those vectors. Speed is a ratio within the
run: the candidates of a depth take turns, and each is compared with fp32 and int8-dynamic of the
same round. Writes the page as Markdown, to --out after each depth, so that an interrupted run keeps
its results. Progress goes to stderr.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import page
from numpy.typing import NDArray

from m2dexport.batches import encode_tokens
from m2dexport.build.build import Artifact, build_artifact, quantize_artifact
from m2dexport.build.mixed import FLOOR, Fidelity
from m2dexport.build.recipe import Recipe
from m2dexport.checkpoint.open import Checkpoint, open_checkpoint
from m2dexport.data import calibration_texts, default_task_paths
from m2dexport.engines import Device
from m2dexport.errors import M2DError
from m2dexport.files import atomic_file, require_file, scratch_folder
from m2dexport.measure.machine import read_machine
from m2dexport.precisions import (
    VECTOR_PRECISIONS,
    WEIGHT_PRECISIONS,
    VectorPrecision,
    WeightPrecision,
)
from m2dexport.profile.plan import Plan, default_plan
from m2dexport.runtime.encoder import Encoder
from m2dexport.runtime.loading import load
from m2dexport.vectors import codecs
from m2dexport.vectors.pairs import StsTask
from m2dexport.vectors.quality import evaluate
from m2dexport.vectors.ranking import rank
from m2dexport.vectors.retrieval import TOP, RetrievalTask
from m2dexport.vectors.tasks import Task, load_task

Floats = NDArray[np.float32]

#: The page begins with this, then the command.
INTRODUCTION = """# Quantization, measured

[quantization.md](quantization.md) says what to use when, and how each precision works. Here is
every precision at every depth, even where it fails a gate, or the reason why it cannot be built.

- Cosine to fp32: mean and minimum over the STS sentences, for float32 vectors of all dims.
- Overlap: the share of fp32's ten nearest documents of a query that are among the ten nearest here.
- [Batch invariance](quantization.md#what-an-artifact-must-pass) of the probes, each by itself
  against in a batch: the smallest cosine and the smallest share of equal codes.
- Speed relative to fp32 / to `int8-dynamic`, in batches of similar length (also of `int8-dynamic`,
  whose artifact runs one text at a time) and for single texts: the median of {rounds} rounds, in
  which the precisions take turns. ms is the median time of one text.
- STS / nDCG@10 by vectors and dims, with ranges of the 1,000 calibration texts that ship. `binary`
  has the bits of `ubinary`; [vectors.md](vectors.md#one-bit-rescored) has one-bit codes rescored.
- The floor of int8: for float32 vectors of all dims, `int8` may lose at most 0.3 points of STS and
  1 point of nDCG@10 to fp32; mean cosine at least .999, minimum at least .995.

This command measured everything below:
"""

BATCH = 32
TIMED, SINGLES = 640, 50  # approximate numbers of texts timed in batches and one by one
#: What the default int8 may lose at full dim, beside ``FLOOR``: points of STS and nDCG@10.
MAX_STS_DROP, MAX_NDCG_DROP = 0.3, 1.0
HASHES = ("checkpoint", "sub_model")  # of an artifact's provenance; the rest are versions


@dataclass(frozen=True)
class Bench:
    """What is measured, and on what."""

    checkpoint: Checkpoint
    plan: Plan  # ``repeats`` are the rounds of timing
    sts: StsTask
    retrieval: RetrievalTask


@dataclass(frozen=True)
class Vectors:
    """The float32 vectors that one artifact gives, full width, normalised."""

    sts: tuple[Floats, Floats]  # of the first and the second sentences
    retrieval: tuple[Floats, Floats]  # of the queries and the documents
    calibration: Floats


@dataclass(frozen=True)
class Row:
    """What one weight precision gives at one depth."""

    artifact: Artifact
    mean_cosine: float  # to fp32, over the STS sentences
    min_cosine: float
    overlap: float  # share of fp32's ten nearest documents that are among its own ten, 0..1
    points: Mapping[tuple[int, VectorPrecision], tuple[float, float]]  # STS and nDCG@10


@dataclass(frozen=True)
class Depth:
    """All weight precisions at one depth; one that could not be built has the reason instead."""

    layers: int
    rows: Mapping[WeightPrecision, Row | str]
    batches: Mapping[WeightPrecision, Sequence[float]]  # seconds for many texts, per round
    singles: Mapping[WeightPrecision, Sequence[float]]  # median seconds of one text, per round

    @property
    def name(self) -> str:
        """The depth in words."""
        return f"{self.layers} layer{'s' if self.layers > 1 else ''}"


def main() -> None:
    """Measure depth by depth and write the tables."""
    bench, out = _options()
    done: list[Depth] = []
    for layers in bench.plan.layers:
        done.append(_measure_depth(bench, layers))
        if out is not None:
            with atomic_file(out, force=True) as path:
                path.write_text(_report(bench, done), encoding="utf-8")
    if out is None:
        print(_report(bench, done), end="")


def _options() -> tuple[Bench, Path | None]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    stsb, limit = default_task_paths()
    add = parser.add_argument
    add("--model", help="folder or hub id; default: the checkpoint that ships")
    add("--layers", type=_numbers, help="for example 2,6; default: all")
    add("--dims", type=_numbers, help="for example 64,384; default: the trained ones")
    add("--weights", type=_names, default=WEIGHT_PRECISIONS, help="default: all; fp32 always runs")
    add("--vectors", type=_names, default=VECTOR_PRECISIONS, help="default: all")
    add("--sts", type=Path, default=stsb, help="sentence pairs; default: the shipped STS-B dev")
    add("--retrieval", type=Path, default=limit, help="BEIR folder; default: LIMIT-small")
    add("--threads", type=int, default=2)
    add("--rounds", type=int, default=7, help="rounds of timing; the median is reported")
    add("--out", type=Path, help="the Markdown file to write; default: standard output, at the end")
    options = parser.parse_args()
    if options.out is not None:
        require_file(options.out, force=True)
    checkpoint = open_checkpoint(options.model)
    sts, retrieval = load_task(options.sts), load_task(options.retrieval)
    if not isinstance(sts, StsTask) or not isinstance(retrieval, RetrievalTask):
        parser.error("--sts takes a file of sentence pairs, and --retrieval a BEIR folder")
    default = default_plan(checkpoint)
    plan = replace(
        default,
        layers=options.layers or default.depths,
        dims=options.dims or default.dims,
        weights=tuple(dict.fromkeys(("fp32", *options.weights))),
        vectors=options.vectors,
        device=Device(threads=options.threads),
        repeats=options.rounds,
    )
    for name, asked, known in (
        ("--layers", plan.layers, range(1, checkpoint.layers + 1)),
        ("--dims", plan.dims, range(1, checkpoint.dim + 1)),
        ("--weights", plan.weights, WEIGHT_PRECISIONS),
        ("--vectors", plan.vectors, VECTOR_PRECISIONS),
    ):
        if unknown := [value for value in asked if value not in known]:
            parser.error(f"{name} {unknown[0]} is not among {', '.join(map(str, known))}")
    return Bench(checkpoint, plan, sts, retrieval), options.out


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _measure_depth(bench: Bench, layers: int) -> Depth:
    plan, checkpoint = bench.plan, bench.checkpoint
    rows: dict[WeightPrecision, Row | str] = {}
    encoders: dict[WeightPrecision, Encoder] = {}
    exact: Vectors | None = None
    with scratch_folder() as scratch:
        base = build_artifact(checkpoint, layers, checkpoint.dim, scratch / "fp32")
        for weights in plan.weights:
            page.say(f"{layers} layers, {weights}")
            folder = scratch / weights
            try:
                artifact = base if weights == "fp32" else _quantized(base, folder, weights)
                encoder = load(artifact.path, plan.device)
                vectors = _encoded(bench, encoder)
                exact = exact or vectors
                rows[weights] = _row(bench, artifact, vectors, exact)
                encoders[weights] = encoder
            except M2DError as error:  # a row is never missing without its reason
                if exact is None:
                    raise  # nothing to compare with
                rows[weights] = str(error).replace(str(folder), weights)
        page.say(f"{layers} layers, timing")
        batches, singles = _times(encoders, bench.sts.sentences1, plan.repeats)
    return Depth(layers, rows, batches, singles)


def _quantized(base: Artifact, folder: Path, weights: WeightPrecision) -> Artifact:
    """Switch off the gates that have a switch: a row with bad figures is better than none."""
    recipe = Recipe(weights=weights, vectors="float32", allow_batch_dependent=True, min_coverage=0)
    return quantize_artifact(base.path, folder, recipe)


def _encoded(bench: Bench, encoder: Encoder) -> Vectors:
    prompts = encoder.spec.prompts

    def of(task: Task) -> tuple[Floats, Floats]:
        first, second = (
            encoder.encode(each.texts, prompt=each.role if each.role in prompts else None)
            for each in task.texts()
        )
        return first, second

    return Vectors(of(bench.sts), of(bench.retrieval), encoder.encode(calibration_texts()))


def _row(bench: Bench, artifact: Artifact, vectors: Vectors, exact: Vectors) -> Row:
    cosines = np.concatenate(
        [(a * b).sum(axis=1) for a, b in zip(vectors.sts, exact.sts, strict=True)]
    )
    near, near_exact = (rank(*found.retrieval, count=TOP) for found in (vectors, exact))
    shared = [len(np.intersect1d(a, b)) for a, b in zip(near, near_exact, strict=True)]
    points = {}
    for dim in {*bench.plan.dims, bench.checkpoint.dim}:
        ranges = codecs.calibrate_ranges(codecs.truncate(vectors.calibration, dim))
        for precision in {"float32", *bench.plan.vectors}:
            # Given ranges, one-bit codes would also be scored with rescoring.
            frozen = ranges if precision in codecs.LEVELS else None
            sts = evaluate(bench.sts, vectors.sts, dim, precision, frozen)
            retrieval = evaluate(bench.retrieval, vectors.retrieval, dim, precision, frozen)
            points[dim, precision] = sts[StsTask.main_metric], retrieval[RetrievalTask.main_metric]
    overlap = sum(shared) / near.size
    return Row(artifact, float(cosines.mean()), float(cosines.min()), overlap, points)


def _times(
    encoders: Mapping[WeightPrecision, Encoder], texts: Sequence[str], rounds: int
) -> tuple[dict[WeightPrecision, list[float]], dict[WeightPrecision, list[float]]]:
    """Return seconds for some of the texts in batches, and median seconds of one, per round.

    Batches run as batches even where the artifact says one text at a time, since that is what its
    users call its speed.
    """
    batches: dict[WeightPrecision, list[float]] = {weights: [] for weights in encoders}
    singles: dict[WeightPrecision, list[float]] = {weights: [] for weights in encoders}
    ids = encoders["fp32"].tokenize(texts[:: max(1, len(texts) // TIMED)])
    some = sorted(ids, key=len)[:: max(1, len(ids) // SINGLES)]
    for turn in range(rounds + 1):  # the first warms up
        for weights, encoder in encoders.items():
            together = _seconds(encoder, ids)
            single = float(np.median([_seconds(encoder, [row]) for row in some]))
            if turn:
                batches[weights].append(together)
                singles[weights].append(single)
    return batches, singles


def _seconds(encoder: Encoder, ids: Sequence[Sequence[int]]) -> float:
    start = time.perf_counter()
    encode_tokens(encoder.run, ids, encoder.spec.pad_id, BATCH)
    return time.perf_counter() - start


def _report(bench: Bench, done: Sequence[Depth]) -> str:
    sections = (
        _setting(bench, done),
        _weights_table(done),
        _surface(bench.plan, done),
        _bytes_table(bench.plan),
        _floor(bench.checkpoint.dim, done),
    )
    return "\n".join(line for section in sections for line in section)


def _setting(bench: Bench, done: Sequence[Depth]) -> Iterator[str]:
    sts, retrieval, plan = bench.sts, bench.retrieval, bench.plan
    built = [row.artifact for depth in done for row in depth.rows.values() if isinstance(row, Row)]
    made_by = {name: value for each in built for name, value in each.spec.provenance.items()}
    versions = ", ".join(f"{name} {v}" for name, v in made_by.items() if name not in HASHES)
    machine = read_machine()
    yield INTRODUCTION.format(rounds=plan.repeats)
    yield "<!-- not run: takes minutes, on a checkpoint that does not ship -->"
    yield from ("```sh", f"python {shlex.join(sys.argv)}", "```", "")
    yield f"{machine.cpu}, {plan.device.threads} threads ({' '.join(machine.flags)});\n{versions}."
    texts = f"{len(retrieval.queries):,} queries, {len(retrieval.documents):,} documents"
    yield f"STS: Spearman's correlation on {sts.name} ({len(sts.scores):,} pairs)."
    yield from (f"nDCG@{TOP}: on {retrieval.name} ({texts}).", "")


def _weights_table(done: Sequence[Depth]) -> Iterator[str]:
    yield from ("## By layers and weights", "")
    head = (
        *("layers", "weights", "mean / min cosine", f"top-{TOP} overlap", "single = batched"),
        *("equal codes", "MB", "coverage", f"speed, batches of {BATCH}", "speed, one text", "ms"),
    )
    yield from _table(head, (_weights_row(depth, name) for depth in done for name in depth.rows))


def _weights_row(depth: Depth, weights: WeightPrecision) -> tuple[str, ...]:
    row = depth.rows[weights]
    if isinstance(row, str):
        return str(depth.layers), weights, row
    spec = row.artifact.spec
    return (
        str(depth.layers),
        weights,
        f"{row.mean_cosine:.4f} / {row.min_cosine:.4f}",
        f"{row.overlap:.1%}",
        f"{spec.parity['batch_cosine']:.6f}",
        f"{spec.parity['batch_codes']:.2%}",
        f"{row.artifact.size_bytes / 1e6:.1f}",
        f"{spec.coverage:.1%}",
        _ratios(depth.batches, weights),
        _ratios(depth.singles, weights),
        f"{1000 * np.median(depth.singles[weights]):.2f}",
    )


def _ratios(seconds: Mapping[WeightPrecision, Sequence[float]], weights: WeightPrecision) -> str:
    """Return the median speed against fp32 and, if it ran, against int8-dynamic."""
    peers = [seconds[peer] for peer in ("fp32", "int8-dynamic") if peer in seconds]
    ratios = [np.median(np.divide(peer, seconds[weights])) for peer in peers]
    return " / ".join(f"{ratio:.2f}x" for ratio in ratios)


def _surface(plan: Plan, done: Sequence[Depth]) -> Iterator[str]:
    yield from ("## By layers, weights, vectors and dims", "")
    head = ("weights", "vectors", *(f"{dim} dims" for dim in plan.dims))
    for depth in done:
        yield from (f"### {depth.name}", "")
        rows: list[tuple[str, ...]] = []
        for weights, row in depth.rows.items():
            if isinstance(row, str):
                rows.append((weights, "all", "not built: see above"))
                continue
            for vectors in plan.vectors:
                points = [row.points[dim, vectors] for dim in plan.dims]
                rows.append((weights, vectors, *(f"{s:.2f} / {n:.2f}" for s, n in points)))
        yield from _table(head, rows)


def _bytes_table(plan: Plan) -> Iterator[str]:
    yield from ("## Bytes per vector", "")
    sizes = [
        (v, *(str(codecs.bytes_per_vector(dim, v)) for dim in plan.dims)) for v in plan.vectors
    ]
    yield from _table(("vectors", *(f"{dim} dims" for dim in plan.dims)), sizes)


def _floor(dim: int, done: Sequence[Depth]) -> Iterator[str]:
    """Yield one line per depth: whether the default int8 stays close enough to fp32."""
    yield from ("## The floor of int8", "")
    for depth in done:
        exact, row = depth.rows["fp32"], depth.rows.get("int8", "not asked for")
        if isinstance(row, str) or isinstance(exact, str):
            yield f"- {depth.name}: {row}"
            continue
        (sts, ndcg), (sts0, ndcg0) = row.points[dim, "float32"], exact.points[dim, "float32"]
        kept = (
            *(sts >= sts0 - MAX_STS_DROP, ndcg >= ndcg0 - MAX_NDCG_DROP),
            Fidelity(row.mean_cosine, row.min_cosine).reaches(FLOOR),
        )
        yield (
            f"- {depth.name}: {'pass' if all(kept) else 'miss'}; STS {sts0:.2f} to {sts:.2f}, "
            f"nDCG@{TOP} {ndcg0:.2f} to {ndcg:.2f}, cosine {row.mean_cosine:.4f} / "
            f"{row.min_cosine:.4f}, top-{TOP} overlap {row.overlap:.1%}"
        )
    yield ""


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield from (*page.table(head, rows), "")


if __name__ == "__main__":
    main()
