"""Aligned depths against plain ones and the full model: the tables of docs/aligned.md.

    python tools/bench_aligned.py --model CHECKPOINT --sts test.tsv --retrieval BEIR-FOLDER

The torch original encodes every text once, at all depths. Maps are fitted as ``slice --align`` fits
them, to texts without labels; depth 0 is scored by the table that would ship. Intervals resample
the test set: pairs of sentences, or queries. The tables of codes and of fitting texts unlike the
encoded ones take the first retrieval set. Writes Markdown; progress goes to stderr when that is a
terminal.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import chain, product
from pathlib import Path

import numpy as np
import page
from numpy.typing import NDArray
from scipy import stats

from m2dexport.align.fit import MIN_TEXTS, Fit, Fitting
from m2dexport.align.static import TokenTable
from m2dexport.align.texts import align_texts, prompted, prompts_of
from m2dexport.checkpoint.open import Checkpoint, open_checkpoint
from m2dexport.cores import one_torch_thread
from m2dexport.data import calibration_texts, default_task_paths
from m2dexport.files import require_file
from m2dexport.measure.machine import read_machine
from m2dexport.precisions import VectorPrecision
from m2dexport.profile.plan import default_plan
from m2dexport.reference.pooler import Reference
from m2dexport.vectors.codecs import calibrate_ranges, cosines, normalize, truncate
from m2dexport.vectors.pairs import StsTask
from m2dexport.vectors.quality import evaluate, score_ranking
from m2dexport.vectors.ranking import rank
from m2dexport.vectors.retrieval import TOP, RetrievalTask
from m2dexport.vectors.tasks import Task, load_task

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

COUNTS = (500, 1000)  # of fitting texts, the first ones of the file; then all of them
SOME_DEPTHS = (0, 1, 2, 5)
CODES: tuple[VectorPrecision, ...] = ("float32", "int8", "ubinary")
RESAMPLES, SEED = 1000, 0
CHUNK = 512  # texts between two reports of progress


@dataclass(frozen=True)
class Bench:
    """What is measured, on what, and the vectors of every text."""

    checkpoint: Checkpoint
    sts: StsTask
    retrieval: Sequence[RetrievalTask]
    fitting: Sequence[str]  # the texts that maps are fitted to
    row_of: Mapping[str, int]  # of each text, behind its prompt
    #: depth -> of the whole width, without a map; of depth 0, token vectors weighted by rarity.
    vectors: Mapping[int, Floats]

    @property
    def full(self) -> int:
        """The full depth."""
        return self.checkpoint.layers

    @property
    def some_depths(self) -> tuple[int, ...]:
        """The depths of the tables that do not have all."""
        return tuple(depth for depth in SOME_DEPTHS if depth < self.full)

    def some_dims(self, *others: int) -> tuple[int, ...]:
        """Return the whole width and those of the others that are below it."""
        return self.checkpoint.dim, *(dim for dim in others if dim < self.checkpoint.dim)

    def rows(self, texts: Iterable[str]) -> NDArray[np.intp]:
        """Return where the vectors of texts are, which stand behind their prompts."""
        return np.array([self.row_of[text] for text in texts], dtype=np.intp)

    def pair(self, task: Task, first: Floats, second: Floats) -> tuple[Floats, Floats]:
        """Return the vectors of a task's two sets, out of those of all texts."""
        one, other = (self.rows(texts) for texts in behind_prompts(self.checkpoint, task))
        return first[one], second[other]

    def points(
        self, task: Task, first: Floats, second: Floats, dim: int, code: VectorPrecision = CODES[0]
    ) -> str:
        """Return the main metric of two sets of vectors; int8 takes the full depth's ranges."""
        ranges = None
        if code == "int8":
            texts = list(prompted(calibration_texts(), prompts_of(self.checkpoint)))
            ranges = calibrate_ranges(truncate(self.vectors[self.full][self.rows(texts)], dim))
        found = evaluate(task, self.pair(task, first, second), dim, code, ranges)
        return f"{found[task.main_metric]:.2f}"


@dataclass(frozen=True)
class Space:
    """What the maps that were fitted to some texts make of every text."""

    fits: Mapping[tuple[int, int], Fit]  # depth and dim -> the map, and how it was found
    aligned: Mapping[tuple[int, int], Floats]  # depth and dim -> vectors with the map


def main() -> None:
    """Encode, fit and write the tables."""
    bench, out = _options()
    page.write(_report(bench), out)


def _options() -> tuple[Bench, Path | None]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    stsb, limit = default_task_paths()
    add = parser.add_argument
    add("--model", help="folder or hub id; default: the checkpoint that ships")
    add("--sts", type=Path, default=stsb, help="sentence pairs; default: the shipped STS-B dev")
    add("--retrieval", type=Path, action="append", help="BEIR folder; default: LIMIT-small")
    add("--align-texts", type=Path, help="as of slice; default: the texts that ship")
    add("--out", type=Path, help="the Markdown file to write; default: standard output")
    options = parser.parse_args()
    if options.out is not None:
        require_file(options.out, force=True)
    checkpoint = open_checkpoint(options.model)
    sts, retrieval = load_task(options.sts), [load_task(p) for p in options.retrieval or [limit]]
    folders = tuple(task for task in retrieval if isinstance(task, RetrievalTask))
    if not isinstance(sts, StsTask) or len(folders) < len(retrieval):
        parser.error("--sts takes a file of sentence pairs, and --retrieval a BEIR folder")
    return _encoded(checkpoint, sts, folders, tuple(align_texts(options.align_texts))), options.out


def behind_prompts(checkpoint: Checkpoint, task: Task) -> list[list[str]]:
    """Return a task's two sets of texts, each text behind its prompt."""
    default = checkpoint.prompts.get(checkpoint.default_prompt or "", "")
    found = []
    for each in task.texts():
        prompt = checkpoint.prompts.get(each.role or "", default)
        found.append([prompt + text for text in each.texts])
    return found


def _encoded(
    checkpoint: Checkpoint, sts: StsTask, retrieval: Sequence[RetrievalTask], fitting: Sequence[str]
) -> Bench:
    """Encode every text once, those of similar length together."""
    prompts = prompts_of(checkpoint)
    sets = [fitting, calibration_texts(), *(task.documents for task in retrieval)]
    texts = [text for each in sets for text in prompted(each, prompts)]
    tasks: list[Task] = [sts, *retrieval]
    for task in tasks:
        texts += [text for each in behind_prompts(checkpoint, task) for text in each]
    ordered = sorted(dict.fromkeys(texts), key=len)
    reference = Reference(checkpoint)
    found: dict[int, list[Floats]] = {depth: [] for depth in reference.depths}
    with one_torch_thread():  # figures must not depend on how many cores there are
        for start in range(0, len(ordered), CHUNK):
            _say(f"encoding text {start} of {len(ordered)}")
            for depth, rows in reference.encode(ordered[start : start + CHUNK]).items():
                found[depth].append(normalize(rows))
    vectors = {depth: np.concatenate(parts) for depth, parts in found.items()}
    table = TokenTable(checkpoint, prompted(fitting, prompts))
    vectors[0] = table.inputs(ordered)[:, :-1]
    row_of = {text: row for row, text in enumerate(ordered)}
    return Bench(checkpoint, sts, retrieval, fitting, row_of, vectors)


def _say(step: str) -> None:
    if sys.stderr.isatty():
        print(f"{time.strftime('%H:%M:%S')} {step}", file=sys.stderr, flush=True)


def fitted(bench: Bench, texts: Sequence[str], depths: Sequence[int], dims: Sequence[int]) -> Space:
    """Fit the maps of some depths and dims, and map every text."""
    _say(f"fitting depths {[*depths]} to {len(texts)} texts")
    behind = list(prompted(texts, prompts_of(bench.checkpoint)))
    rows, everything = bench.rows(behind), list(bench.row_of)
    table = TokenTable(bench.checkpoint, behind)
    ids, inputs = table.ids(everything), {**bench.vectors, 0: table.inputs(everything)}
    fitting = Fitting({n: inputs[n].shape[1] for n in depths}, dims, without_intercept=(0,))
    fitting.add(texts, {n: inputs[n][rows] for n in depths}, bench.vectors[bench.full][rows])
    fits, aligned = {}, {}
    for depth, dim in product(depths, dims):
        fit = fits[depth, dim] = fitting.fit(depth, dim)
        if depth:
            aligned[depth, dim] = fit.map(inputs[depth])
        else:
            folded = table.folded(fit.map)
            aligned[depth, dim] = np.stack([folded[each].sum(axis=0) for each in ids])
    return Space(fits, aligned)


def _report(bench: Bench) -> Iterator[str]:
    machine = read_machine()
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "numpy"))
    yield from ("```sh", f"python {shlex.join(sys.argv)}", "```", "")
    yield f"{machine.cpu} ({' '.join(machine.flags)});"
    yield from (f"Python {machine.python}, {versions}.", "")
    tasks: list[Task] = [bench.sts, *bench.retrieval]
    for each in tasks:
        first, second = (f"{len(part.texts):,}" for part in each.texts())
        yield f"- {each.name}: {first} and {second} texts"
    dims = default_plan(bench.checkpoint).dims
    every = tuple(dict.fromkeys((*dims, *bench.some_dims(128, 64, 32))))
    space = fitted(bench, bench.fitting, range(bench.full), every)
    yield from _fits_table(bench, space)
    yield from _sts_table(bench, space, dims)
    for task, dim in product(bench.retrieval, bench.some_dims(256, 128, 64, 32)):
        yield from _retrieval_table(bench, space, task, dim)
    for each in tasks:
        yield from _counts_table(bench, each)
    yield from _codes_table(bench, space)
    yield from _domains_table(bench)


def _fits_table(bench: Bench, space: Space) -> Iterator[str]:
    dims = bench.some_dims(128)
    head = [f"{dim} dims: {name}" for dim in dims for name in ("before", "after", "strength")]
    cells = [[_fit_cells(space.fits[n, dim]) for dim in dims] for n in range(bench.full)]
    rows = [(str(depth), *chain.from_iterable(row)) for depth, row in enumerate(cells)]
    yield from _table("Held-out texts", ("depth", *head), rows)


def _fit_cells(fit: Fit) -> tuple[str, str, str]:
    return f"{fit.cosine_before:.4f}", f"{fit.cosine_after:.4f}", f"{fit.strength:.3g}"


def _sts_table(bench: Bench, space: Space, dims: Sequence[int]) -> Iterator[str]:
    """Yield plain / aligned, and the interval of the difference."""
    task = bench.sts
    picked = _resamples(len(task.scores))
    people = _standard_ranks(np.array(task.scores)[picked])
    rows: list[tuple[str, ...]] = []
    for depth in range(bench.full + 1):
        _say(f"{task.name}, depth {depth}")
        cells, plain = [], bench.vectors[depth]
        for dim in dims:
            cell = bench.points(task, plain, plain, dim)
            if depth < bench.full:
                aligned = space.aligned[depth, dim]
                pairs = (bench.pair(task, vectors, vectors) for vectors in (plain, aligned))
                similar = [cosines(*(truncate(rows, dim) for rows in pair)) for pair in pairs]
                before, after = (_standard_ranks(each[picked]) for each in similar)
                gain = 100 * ((after - before) * people).mean(axis=1)
                cell += f" / {bench.points(task, aligned, aligned, dim)} ({_interval(gain)})"
            cells.append(cell)
        rows.append((str(depth), *cells))
    head = ("depth", *(f"{dim} dims" for dim in dims))
    yield from _table(f"{task.name}, Spearman x 100", head, rows)


def _retrieval_table(bench: Bench, space: Space, task: RetrievalTask, dim: int) -> Iterator[str]:
    """Yield every way to put queries to an index, and the intervals of three differences."""
    head = ["depth", "plain, own index", "aligned, own index", "aligned - plain, own index"]
    head += ["plain query, full index", "aligned query, full index", "aligned - plain query"]
    picked, full = _resamples(len(task.queries)), bench.vectors[bench.full]
    exact = _per_query(task, *bench.pair(task, full, full), dim)
    rows: list[tuple[str, ...]] = []
    for depth in range(bench.full):
        _say(f"{task.name}, {dim} dims, depth {depth}")
        plain, aligned = bench.vectors[depth], space.aligned[depth, dim]
        own, own_aligned, query, query_aligned = (
            _per_query(task, *bench.pair(task, *two), dim)
            for two in ((plain, plain), (aligned, aligned), (plain, full), (aligned, full))
        )
        cells = [str(depth), *(f"{each.mean():.2f}" for each in (own, own_aligned))]
        cells.append(_difference(own_aligned - own, picked))
        cells += [f"{each.mean():.2f}" for each in (query, query_aligned)]
        cells += [_difference(query_aligned - each, picked) for each in (query, exact)]
        rows.append(tuple(cells))
    rows.append((f"{bench.full} (full)", f"{exact.mean():.2f}"))
    title = f"{task.name}, nDCG@{TOP}, {dim} dims"
    yield from _table(title, (*head, "aligned query - full model"), rows)


def _counts_table(bench: Bench, task: Task) -> Iterator[str]:
    """Yield what more fitting texts give: STS of aligned pairs, or aligned queries, full index."""
    depths, dims, full = bench.some_depths, bench.some_dims(128, 64), bench.vectors[bench.full]
    counts = [*(n for n in COUNTS if n < len(bench.fitting)), len(bench.fitting)]
    texts = {f"{n:,} texts": bench.fitting[:n] for n in counts}
    if isinstance(task, RetrievalTask):
        name = f"{counts[-1]:,} texts and the corpus ({len(task.documents):,} documents)"
        texts[name] = (*bench.fitting, *task.documents)
    spaces = {name: fitted(bench, some, depths, dims) for name, some in texts.items()}
    rows: list[tuple[str, ...]] = []
    for dim in dims:
        plain = (bench.vectors[depth] for depth in (*depths, bench.full))
        points = [bench.points(task, vectors, vectors, dim) for vectors in plain]
        rows.append((str(dim), "none: plain, own index", *points))
        for name, space in spaces.items():
            aligned = [space.aligned[depth, dim] for depth in depths]
            others = aligned if isinstance(task, StsTask) else [full] * len(depths)
            points = [bench.points(task, *two, dim) for two in zip(aligned, others, strict=True)]
            rows.append((str(dim), name, *points))
    title = f"Number of fitting texts, {task.name}"
    yield from _table(title, ("dims", "fitted to", *_depth_names(bench)), rows)


def _codes_table(bench: Bench, space: Space) -> Iterator[str]:
    """Yield aligned queries against the full index, both stored in some precision."""
    task, full = bench.retrieval[0], bench.vectors[bench.full]
    rows: list[tuple[str, ...]] = []
    for dim, precision in product(bench.some_dims(128, 32), CODES):
        queries = [*(space.aligned[depth, dim] for depth in bench.some_depths), full]
        points = [bench.points(task, vectors, full, dim, precision) for vectors in queries]
        rows.append((str(dim), precision, *points))
    head = ("dims", "vectors", *_depth_names(bench))
    yield from _table(f"Vector codes, {task.name}", head, rows)


def _domains_table(bench: Bench) -> Iterator[str]:
    """Yield fits to texts like and unlike those that are encoded; a small corpus is left out."""
    task, full, dim = bench.retrieval[0], bench.vectors[bench.full], bench.checkpoint.dim
    depths = [depth for depth in bench.some_depths if depth]
    domains = {
        f"the {len(bench.fitting):,} sentences": bench.fitting,
        f"{task.name}'s corpus": task.documents,
        f"the {len(calibration_texts()):,} template texts": calibration_texts(),
    }
    spaces = {
        name: fitted(bench, texts, depths, [dim])
        for name, texts in domains.items()
        if len(texts) >= MIN_TEXTS
    }
    rows: list[tuple[str, ...]] = []
    for depth in depths:
        for name, space in (("none", None), *spaces.items()):
            vectors = space.aligned[depth, dim] if space else bench.vectors[depth]
            pairs = ((bench.sts, vectors), (task, full), (task, vectors))
            points = [bench.points(each, vectors, other, dim) for each, other in pairs]
            cells = _fit_cells(space.fits[depth, dim]) if space else ("", "", "")
            rows.append((str(depth), name, *cells, *points))
    head = ["depth", "fitted to", "before", "after", "strength", bench.sts.name]
    head += [f"{task.name}, {index} index" for index in ("full", "own")]
    yield from _table("Other fitting texts", head, rows)


def _depth_names(bench: Bench) -> list[str]:
    return [*(f"depth {depth}" for depth in bench.some_depths), "full model"]


def _per_query(task: RetrievalTask, queries: Floats, documents: Floats, dim: int) -> Doubles:
    """Return the nDCG@10 of each query, in points."""
    own = np.array(task.own, dtype=np.intp) if task.own else None
    ranking = rank(truncate(queries, dim), truncate(documents, dim), TOP, own)
    alone = (replace(task, relevance=(one,)) for one in task.relevance)
    scores = [score_ranking(each, row[None]) for each, row in zip(alone, ranking, strict=True)]
    return np.array([each[task.main_metric] for each in scores])


def _resamples(count: int) -> NDArray[np.intp]:
    """Return rows drawn with replacement, the same for everything that is compared."""
    return np.random.default_rng(SEED).integers(0, count, (RESAMPLES, count))


def _standard_ranks(values: Doubles) -> Doubles:
    """Return the ranks in each row, of mean 0 and variance 1: their mean product is Spearman's."""
    ranks: Doubles = stats.rankdata(values, axis=1)
    ranks -= ranks.mean(axis=1, keepdims=True)
    spread = ranks.std(axis=1, keepdims=True)
    return ranks / np.where(spread > 0, spread, 1)


def _difference(values: Doubles, picked: NDArray[np.intp]) -> str:
    return f"{values.mean():+.2f} ({_interval(values[picked].mean(axis=1))})"


def _interval(resampled: Doubles) -> str:
    """Return the middle 95% of resampled differences."""
    low, high = np.percentile(resampled, [2.5, 97.5])
    return f"{low:+.2f} to {high:+.2f}"


def _table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield from ("", f"### {title}", "", *page.table(head, rows))


if __name__ == "__main__":
    main()
