"""Weight precisions of one checkpoint side by side: fidelity, quality, size and speed, in one run.

python tools/bench_weights.py --model my-checkpoint --sts test.tsv --retrieval beir-folder

Prints a Markdown table. Speed is a ratio within the run: the candidates of a depth take turns, and
each turn is compared with fp32's and with int8-dynamic's of the same round.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from m2dexport.build import Artifact, build_artifact, quantize_artifact
from m2dexport.checkpoint import open_checkpoint
from m2dexport.codecs import truncate
from m2dexport.data import default_task_paths
from m2dexport.errors import M2DError
from m2dexport.machine import read_machine
from m2dexport.quality import evaluate, load_task
from m2dexport.runtime import Encoder, load
from m2dexport.weights import WEIGHT_PRECISIONS

HEADER = (
    *("layers", "weights", "mean / min cosine", "alone = batched", "equal codes"),
    *("STS", "nDCG@10", "MB", "coverage", "batch of 32", "single p50", "single ms"),
)


@dataclass(frozen=True)
class Row:
    """What one precision gives and costs at one depth."""

    layers: int
    weights: str
    artifact: Artifact
    mean_cosine: float
    min_cosine: float
    sts: float
    ndcg: float


def main() -> None:
    """Build, measure and print."""
    options = _options()
    checkpoint = open_checkpoint(options.model)
    sts, retrieval = load_task(options.sts), load_task(options.retrieval)
    depths = options.layers or list(range(1, checkpoint.layers + 1))
    machine = read_machine(options.threads)
    print(f"{machine.cpu}, {options.threads} threads, {' '.join(machine.flags)}\n")
    print(f"| {' | '.join(HEADER)} |\n|{' --- |' * len(HEADER)}", flush=True)
    for layers in depths:
        with tempfile.TemporaryDirectory(prefix="m2dexport-") as scratch:
            rows, encoders = {}, {}
            folder = Path(scratch)
            exact: list[NDArray[np.float32]] = []
            base = build_artifact(checkpoint, layers, checkpoint.dim, folder / "fp32")
            for weights in dict.fromkeys(["fp32", *options.weights]):
                try:
                    artifact = base if weights == "fp32" else _quantized(base, folder, weights)
                except M2DError as error:  # a row is never missing without its reason
                    print(f"| {layers} | {weights} | {error} |{' |' * (len(HEADER) - 3)}")
                    continue
                encoder = load(artifact.path, threads=options.threads)
                found = [encoder.encode(t.texts) for t in (*sts.texts(), *retrieval.texts())]
                exact = exact or found
                cosines = np.concatenate(
                    [_cosines(a, b) for a, b in zip(exact[:2], found[:2], strict=True)]
                )
                rows[weights] = Row(
                    layers,
                    weights,
                    artifact,
                    float(cosines.mean()),
                    float(cosines.min()),
                    evaluate(sts, found[:2], checkpoint.dim, "float32")["spearman"],
                    evaluate(retrieval, found[2:], checkpoint.dim, "float32")["ndcg@10"],
                )
                encoders[weights] = encoder
            texts = [text for text_set in sts.texts() for text in text_set.texts]
            batches, singles = _times(encoders, texts, options)
            for weights, row in rows.items():
                print(_line(row, weights, batches, singles), flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    stsb, limit = default_task_paths()
    add = parser.add_argument
    add("--model", help="folder or hub id; default: the checkpoint that ships")
    add("--layers", type=_numbers, help="such as 2,6; default: all")
    add("--weights", type=lambda s: s.split(","), default=list(WEIGHT_PRECISIONS))
    add("--sts", type=Path, default=stsb, help="sentence pairs; default: the shipped STS-B dev")
    add("--retrieval", type=Path, default=limit, help="BEIR folder; default: LIMIT-small")
    add("--threads", type=int, default=2)
    add("--rounds", type=int, default=7, help="turns of each candidate; the median counts")
    options = parser.parse_args()
    unknown = [w for w in options.weights if w not in WEIGHT_PRECISIONS]
    if unknown:
        parser.error(f"{unknown[0]} is no precision; choose from {', '.join(WEIGHT_PRECISIONS)}")
    return options


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _quantized(base: Artifact, folder: Path, weights: str) -> Artifact:
    return quantize_artifact(
        base.path,
        folder / weights,
        weights=weights,  # type: ignore[arg-type]
        vectors="float32",
        allow_batch_dependent=True,
        min_coverage=0.0,
    )


def _cosines(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
    width = a.shape[1]
    cosines: NDArray[np.float32] = (truncate(a, width) * truncate(b, width)).sum(axis=1)
    return cosines


def _times(
    encoders: dict[str, Encoder], texts: list[str], options: argparse.Namespace
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Return seconds for all texts in batches of 32, and median seconds of one text, per round.

    Batches run as batches whatever the artifact says of them: a recipe that should run one text at
    a time is timed at what its users call its speed.
    """
    batches: dict[str, list[float]] = {weights: [] for weights in encoders}
    singles: dict[str, list[float]] = {weights: [] for weights in encoders}
    tokens = {
        weights: sorted(encoder.tokenize(texts), key=len) for weights, encoder in encoders.items()
    }
    for turn in range(options.rounds + 1):  # the first warms up
        for weights, encoder in encoders.items():
            ids = tokens[weights]
            start = time.perf_counter()
            for first in range(0, len(ids), 32):
                _run(encoder, ids[first : first + 32])
            spent = time.perf_counter() - start
            one_by_one = []
            for row in ids[:: max(1, len(ids) // 50)]:
                start = time.perf_counter()
                _run(encoder, [row])
                one_by_one.append(time.perf_counter() - start)
            if turn:
                batches[weights].append(spent)
                singles[weights].append(float(np.median(one_by_one)))
    return batches, singles


def _run(encoder: Encoder, rows: list[list[int]]) -> None:
    width = max(1, *(len(row) for row in rows))
    ids = np.full((len(rows), width), encoder.spec.pad_id, dtype=np.int64)
    mask = np.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = row
        mask[index, : max(1, len(row))] = 1
    encoder.run(ids, mask)


def _line(
    row: Row, weights: str, batches: dict[str, list[float]], singles: dict[str, list[float]]
) -> str:
    spec = row.artifact.spec
    cells = (
        str(row.layers),
        weights,
        f"{row.mean_cosine:.4f} / {row.min_cosine:.4f}",
        f"{spec.parity['batch_cosine']:.6f}",
        f"{spec.parity['batch_codes']:.2%}",
        f"{row.sts:.2f}",
        f"{row.ndcg:.2f}",
        f"{row.artifact.size_bytes / 1e6:.1f}",
        f"{spec.coverage:.1%}",
        _ratios(batches, weights),
        _ratios(singles, weights),
        f"{1000 * np.median(singles[weights]):.2f}",
    )
    return f"| {' | '.join(cells)} |"


def _ratios(seconds: dict[str, list[float]], weights: str) -> str:
    """Return the median speed against fp32 and, if it ran, against int8-dynamic."""
    peers = [peer for peer in ("fp32", "int8-dynamic") if peer in seconds]
    return " / ".join(
        f"{np.median(np.divide(seconds[peer], seconds[weights])):.2f}x" for peer in peers
    )


if __name__ == "__main__":
    main()
