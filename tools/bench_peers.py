"""Our encoders against other ways to run the same sub-model, from text to vector.

    python tools/bench_peers.py --sts test.tsv --model CHECKPOINT --env FOLDER

Peers of a depth run the sub-model that ``slice`` writes: sentence-transformers in torch, in ONNX
(float32, O3, int8) and in OpenVINO (float32, int8), fastembed, and Optimum's ORTModel. Those that
pin an older transformers run in virtual environments which this script makes in --env, and reuses
when they are there; without a GPU, PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu spares
the CUDA libraries.

Each candidate is a process of its own, which loads, warms up and then answers one request at a
time. In each round all candidates do the same work in a shuffled order: some texts one by one, and
all texts in batches of 32. Ratios are medians of the rounds' ratios. "Start" is from the start of a
fresh process to its first vector. Depth 0 is our aligned static model, against torch at full depth.
A candidate that cannot run has the reason in its row. Writes Markdown; progress goes to stderr.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import page
from numpy.typing import NDArray
from peers.processes import Candidate, PeerError, Worker, environment, export

from m2dexport import (
    Checkpoint,
    Recipe,
    build_aligned,
    build_artifact,
    load_task,
    open_checkpoint,
    quantize_artifact,
    slice_checkpoint,
)
from m2dexport.data import calibration_texts, default_task_paths
from m2dexport.files import require_file, scratch_folder
from m2dexport.measure.machine import read_machine
from m2dexport.vectors.codecs import cosines
from m2dexport.vectors.pairs import StsTask

TEXTS, SINGLES = 640, 40  # approximate numbers of texts: in batches, and one by one
WARM_UPS = 2  # rounds that do not count
CALIBRATION = 300  # texts for OpenVINO's int8
TORCH, OURS, OURS_FP32 = "sentence-transformers torch", "m2dexport int8", "m2dexport fp32"

WORKS = {"one": "one text", "batches": "batches", "start": "process start to first vector"}

Floats = NDArray[np.float32]
Item = TypeVar("Item")


@dataclass(frozen=True)
class Peer:
    """A peer other than torch."""

    name: str
    environment: str  # a key of peers.processes.ENVIRONMENTS
    loader: str  # of peers/worker.py
    format: str  # of peers/export.py
    file: str  # in the folder that is exported


ST, ONNX, OPENVINO = "sentence-transformers", "onnx/model", "openvino/openvino_model"
PEERS = {
    "onnx": Peer(f"{ST} ONNX fp32", "onnx", ST, "onnx", f"{ONNX}.onnx"),
    "onnx-o3": Peer(f"{ST} ONNX O3", "onnx", ST, "onnx-o3", f"{ONNX}_o3.onnx"),
    "onnx-int8": Peer(f"{ST} ONNX qint8", "onnx", ST, "onnx-int8", f"{ONNX}_int8.onnx"),
    "openvino": Peer(f"{ST} OpenVINO fp32", "openvino", ST, "openvino", f"{OPENVINO}.xml"),
    "openvino-int8": Peer(
        f"{ST} OpenVINO int8", "openvino", ST, "openvino-int8", f"{OPENVINO}_int8.xml"
    ),
    "fastembed": Peer("fastembed fp32", "onnx", "fastembed", "onnx", f"{ONNX}.onnx"),
    "ortmodel": Peer("Optimum ORTModel fp32", "onnx", "ortmodel", "onnx", f"{ONNX}.onnx"),
}


@dataclass(frozen=True)
class Bench:
    """What is measured, and on what."""

    checkpoint: Checkpoint
    layers: Sequence[int]
    texts: Sequence[str]
    singles: Sequence[int]  # numbers of the texts that are also encoded one by one
    peers: Sequence[str]  # keys of ``PEERS``, beside torch
    environments: Path
    threads: int
    rounds: int

    @property
    def starts(self) -> int:
        """How many fresh processes of each candidate are timed."""
        return max(1, self.rounds // 3)


@dataclass(frozen=True)
class Result:
    """What one candidate gave."""

    seconds: Mapping[str, Sequence[float]]  # by work: one, batches or start; one figure per round
    together: Floats  # (texts, dim), in batches
    alone: Floats  # (singles, dim), one by one
    versions: str


Candidates = Mapping[str, Candidate | PeerError]
Results = Mapping[str, Result | PeerError]


def main() -> None:
    """Measure depth by depth and write the tables."""
    bench, out = _options()
    sections: dict[int, Results] = {}
    for layers in bench.layers:
        with scratch_folder() as scratch:
            sections[layers] = _measured(bench, _candidates(bench, layers, scratch), scratch)
        if out is not None:  # after each depth, so that an interrupted run keeps its results
            page.write(_report(bench, sections), out)
    if out is None:
        page.write(_report(bench, sections), None)


def _options() -> tuple[Bench, Path | None]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    add = parser.add_argument
    add("--model", help="folder or hub id; default: the checkpoint that ships")
    add("--sts", type=Path, help="sentence pairs; default: the shipped STS-B dev")
    add("--layers", type=page.numbers, help="for example 6,2,0; default: all, 2 and 0 layers")
    add("--peers", type=_peers, default=tuple(PEERS), help=f"default: {','.join(PEERS)}; or none")
    add("--env", type=Path, default=Path("peers-env"), help="of peers; default: peers-env")
    add("--texts", type=int, default=TEXTS, help=f"how many, about; default: {TEXTS}")
    add("--threads", type=int, default=2)
    add("--rounds", type=int, default=15, help="of timing; the median is reported; default: 15")
    add("--out", type=Path, help="the Markdown file to write; default: standard output")
    options = parser.parse_args()
    if options.out is not None:
        require_file(options.out, force=True)
    checkpoint = open_checkpoint(options.model)
    task = load_task(options.sts or default_task_paths()[0])
    if not isinstance(task, StsTask):
        parser.error("--sts takes a file of sentence pairs")
    every = list(dict.fromkeys((*task.sentences1, *task.sentences2)))
    texts = every[:: max(1, len(every) // options.texts)]
    singles = range(0, len(texts), max(1, len(texts) // SINGLES))
    layers = options.layers or tuple(dict.fromkeys((checkpoint.layers, 2, 0)))
    given = (options.peers, options.env.resolve(), options.threads, options.rounds)
    return Bench(checkpoint, layers, texts, singles, *given), options.out


def _peers(text: str) -> tuple[str, ...]:
    names = () if text == "none" else tuple(text.split(","))
    if unknown := [name for name in names if name not in PEERS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]} is not among {', '.join(PEERS)}")
    return names


def _candidates(bench: Bench, layers: int, scratch: Path) -> Candidates:
    """Build and export all that is compared at a depth; torch comes first."""
    page.say(f"depth {layers}: building")
    checkpoint, full = bench.checkpoint, layers or bench.checkpoint.layers
    sub_model = slice_checkpoint(checkpoint, full, checkpoint.dim, scratch / "sub-model")
    torch = {"loader": ST, "backend": "torch", "path": str(sub_model.path)}
    found: dict[str, Candidate | PeerError] = {TORCH: _here(bench, torch)}
    for name, path in _built(checkpoint, layers, scratch).items():
        found[name] = _here(bench, {"loader": "m2dexport", "path": str(path)})
    for key in bench.peers if layers else ():
        peer = PEERS[key]
        page.say(f"depth {layers}: exporting for {peer.name}")
        try:
            found[peer.name] = _exported(bench, peer, sub_model, scratch)
        except PeerError as error:
            found[peer.name] = error
    return found


def _here(bench: Bench, asked: Mapping[str, Any]) -> Candidate:
    return Candidate(Path(sys.executable), {**asked, "threads": bench.threads})


def _built(checkpoint: Checkpoint, layers: int, scratch: Path) -> dict[str, Path]:
    """Return our own artifacts of a depth, by name; of depth 0, the aligned one in int8."""
    recipe = Recipe(weights="int8", vectors="float32", min_coverage=0)
    if layers == 0:
        recipe = replace(recipe, engine="static")
        return {OURS: build_aligned(checkpoint, 0, checkpoint.dim, scratch / "int8", recipe).path}
    base = build_artifact(checkpoint, layers, checkpoint.dim, scratch / "fp32")
    return {
        OURS: quantize_artifact(base.path, scratch / "int8", recipe).path,
        OURS_FP32: base.path,
    }


def _exported(bench: Bench, peer: Peer, sub_model: Checkpoint, scratch: Path) -> Candidate:
    """Export for a peer what was not exported for another one."""
    python = environment(bench.environments, peer.environment)
    folder = scratch / peer.environment
    texts = scratch / "calibration" / "train.jsonl"
    texts.parent.mkdir(exist_ok=True)
    lines = [json.dumps({"text": text}) for text in calibration_texts()[:CALIBRATION]]
    texts.write_text("\n".join(lines), encoding="utf-8")
    isa = "avx512_vnni" if "avx512_vnni" in read_machine().flags else "avx2"
    backend = peer.format.partition("-")[0]
    for wanted in dict.fromkeys((backend, peer.format)):  # int8 is made from float32
        made = scratch / f"{wanted}.made"
        if not made.exists():
            paths = (sub_model.path, folder)
            export(python, (wanted, *paths, "--isa", isa, "--texts", texts), bench.threads)
            made.touch()
    asked = {"loader": peer.loader, "backend": backend, "path": str(folder), "file": peer.file}
    facts = {"pooling": "+".join(sub_model.pooling.modes), "dim": sub_model.dim}
    return Candidate(python, {**asked, **facts, "threads": bench.threads})


def _measured(bench: Bench, candidates: Candidates, scratch: Path) -> Results:
    """Let all candidates work in turns, each in its process, then time fresh processes."""
    workers: dict[str, Worker] = {}
    found: dict[str, Result | PeerError] = {}
    vectors: dict[str, tuple[Floats, Floats]] = {}
    for name, candidate in candidates.items():
        page.say(f"loading {name}")
        try:
            if isinstance(candidate, PeerError):
                raise candidate
            worker = Worker(candidate, scratch / f"{name}.log")
            vectors[name] = _vectors(bench, worker, scratch)
            workers[name] = worker
        except PeerError as error:
            found[name] = error
    seconds = _timed(bench, workers)
    seconds["start"] = _started(bench, workers, scratch / "start.log")
    for name, worker in workers.items():
        taken = {work: each[name] for work, each in seconds.items()}
        found[name] = Result(taken, *vectors[name], worker.ask("versions"))
        worker.close()
    return {name: found[name] for name in candidates}


def _vectors(bench: Bench, worker: Worker, scratch: Path) -> tuple[Floats, Floats]:
    """Return the vectors of all texts together, and of the singles one by one."""
    paths = {name: str(scratch / f"{name}.npy") for name in ("together", "alone")}
    worker.ask("vectors", texts=bench.texts, rows=list(bench.singles), **paths)
    together, alone = (np.load(path) for path in paths.values())
    return together, alone


def _timed(bench: Bench, workers: Mapping[str, Worker]) -> dict[str, dict[str, list[float]]]:
    """Return the seconds of one text and of all, by work and candidate, one per round."""
    works = {"one": [bench.texts[row] for row in bench.singles], "batches": bench.texts}
    found = {}
    for work, texts in works.items():
        page.say(f"timing {len(workers)} candidates, {work}")
        ask = partial(Worker.ask, work=work, texts=texts)
        taken = _in_turns(workers, WARM_UPS + bench.rounds, ask)
        found[work] = {name: each[WARM_UPS:] for name, each in taken.items()}
    return found


def _started(bench: Bench, workers: Mapping[str, Worker], log: Path) -> dict[str, list[float]]:
    """Return the seconds from the start of fresh processes to their first vector."""
    page.say("timing fresh processes")

    def start(worker: Worker) -> float:
        fresh = Worker(worker.candidate, log)
        fresh.close()
        return fresh.start_seconds

    return _in_turns(workers, bench.starts, start)


def _in_turns(
    items: Mapping[str, Item], rounds: int, seconds: Callable[[Item], float]
) -> dict[str, list[float]]:
    """Return the seconds that each item takes in each round, which has an order of its own."""
    names, order = list(items), np.random.default_rng(0)
    taken: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for index in order.permutation(len(names)):
            taken[names[index]].append(seconds(items[names[index]]))
    return taken


def _report(bench: Bench, sections: Mapping[int, Results]) -> Iterator[str]:
    threads = f"{bench.threads} thread{'s' if bench.threads > 1 else ''} each"
    yield from page.heading(threads, ("m2dexport", "numpy"))
    lengths = [len(text.split()) for text in bench.texts]
    yield (
        f"{len(bench.texts)} sentences of {np.mean(lengths):.1f} words (standard deviation "
        f"{np.std(lengths):.1f}) in batches, {len(bench.singles)} of them one by one; "
        f"{bench.rounds} rounds, {bench.starts} fresh processes."
    )
    for layers, results in sections.items():
        yield from ("", f"### {_depth(layers)}", "")
        yield from _depth_table(bench, results)
        yield from ("", *_best_peers(results))
    yield from ("", "### Versions", "")
    versions = {
        name: result.versions
        for results in sections.values()
        for name, result in results.items()
        if isinstance(result, Result)
    }
    yield from page.table(("candidate", "packages"), versions.items())


def _depth(layers: int) -> str:
    if layers == 0:
        return "Depth 0, aligned, against torch at full depth"
    return f"{layers} layer{'s' if layers > 1 else ''}"


def _depth_table(bench: Bench, results: Results) -> Iterator[str]:
    head = (
        *("candidate", "one text, ms", "to torch", "texts/s in batches", "to torch"),
        *("start, s", "to torch", "cosine to torch, mean / min", "alone = in a batch, min"),
    )
    yield from page.table(head, (_row(bench, name, results) for name in results))


def _row(bench: Bench, name: str, results: Results) -> tuple[str, ...]:
    result, torch = results[name], results[TORCH]
    if isinstance(result, PeerError) or isinstance(torch, PeerError):
        return name, str(result)
    shown = {
        "one": lambda seconds: f"{1e3 * seconds:.2f}",
        "batches": lambda seconds: f"{len(bench.texts) / seconds:.0f}",
        "start": lambda seconds: f"{seconds:.2f}",
    }
    cells = []
    for work, show in shown.items():
        cells += [show(np.median(result.seconds[work])), f"{_ratio(torch, result, work):.2f}x"]
    near = cosines(result.together, torch.together)
    same = cosines(result.alone, result.together[bench.singles])
    return name, *cells, f"{near.mean():.4f} / {near.min():.4f}", f"{same.min():.6f}"


def _ratio(other: Result, result: Result, work: str) -> float:
    """Return how many times as fast as the other one a candidate is, the median of rounds."""
    return float(np.median(np.divide(other.seconds[work], result.seconds[work])))


def _best_peers(results: Results) -> Iterator[str]:
    """Yield our default against the peer that comes closest to it, for each work."""
    ours = results[OURS]
    peers = {
        name: result
        for name, result in results.items()
        if isinstance(result, Result) and name not in (OURS, OURS_FP32)
    }
    if isinstance(ours, PeerError) or not peers:
        return
    found = []
    for work, words in WORKS.items():
        ratio, name = min((_ratio(peer, ours, work), name) for name, peer in peers.items())
        found.append(f"{words} {ratio:.2f}x ({name})")
    yield f"{OURS} against the best peer: {'; '.join(found)}."


if __name__ == "__main__":
    main()
