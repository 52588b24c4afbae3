"""Measure the quality of each way to store vectors: the tables of docs/vectors.md.

    python tools/bench_vectors.py --model CHECKPOINT --layers 6,2 --dims 64,128,256,384 \
        --eval stsb/test.tsv --eval wang-qa --eval limit-small

Vectors are those of the torch original, encoded once at all depths. Ranges, product quantization,
centres and rotations are fitted only to the calibration texts, by default those that ship. Nothing
is fitted to the evaluation data or chosen by it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import faiss
import numpy as np
from numpy.typing import NDArray

from m2dexport.checkpoint.open import open_checkpoint
from m2dexport.data import calibration_texts, read_texts
from m2dexport.measure.machine import read_machine
from m2dexport.precisions import VectorPrecision
from m2dexport.reference.pooler import Reference
from m2dexport.vectors.codecs import (
    Ranges,
    bytes_per_vector,
    calibrate_ranges,
    clipping_rate,
    encode_vectors,
    normalize,
    truncate,
)
from m2dexport.vectors.pairs import StsTask
from m2dexport.vectors.quality import comparable, score_pairs, score_ranking
from m2dexport.vectors.ranking import rank, rescore
from m2dexport.vectors.retrieval import TOP
from m2dexport.vectors.tasks import Task, load_task

Floats = NDArray[np.float32]

PRECISIONS: tuple[VectorPrecision, ...] = ("float32", "int8", "int8-symmetric", "int4", "ubinary")
MULTIPLIERS = (2, 4, 10)
ITERATIONS = 50  # of iterative quantization
SEED = 0


@dataclass(frozen=True)
class Cell:
    """The normalised vectors of one depth and dim."""

    layers: int
    dim: int
    calibration: Floats
    tasks: tuple[tuple[Task, Floats, Floats], ...]  # with the vectors of its two text sets

    @property
    def ranges(self) -> Ranges:
        """The ranges of the calibration texts."""
        return calibrate_ranges(self.calibration)


def main() -> None:
    """Encode the texts and print three tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder or hub id; default: the checkpoint that ships")
    parser.add_argument("--layers", default="6,2")
    parser.add_argument("--dims", default="64,128,256,384")
    parser.add_argument("--eval", type=Path, action="append", required=True)
    parser.add_argument("--calibration", type=Path)
    options = parser.parse_args()
    layers, dims = (tuple(map(int, text.split(","))) for text in (options.layers, options.dims))
    tasks = [load_task(path) for path in options.eval]
    texts = read_texts(options.calibration) if options.calibration else calibration_texts()
    cells = list(cells_of(options.model, layers, dims, tasks, texts))
    for table in (precision_table, rescoring_table, rotation_table):
        print("\n".join(table(cells)), end="\n\n")
    machine = read_machine()
    print(f"{len(texts)} calibration texts; {machine.cpu} ({' '.join(machine.flags)})")


def cells_of(
    model: str | None,
    layers: Sequence[int],
    dims: Sequence[int],
    tasks: Sequence[Task],
    texts: Sequence[str],
) -> Iterator[Cell]:
    """Yield every (layers, dim); each text is encoded once."""
    checkpoint = open_checkpoint(model)
    reference = Reference(checkpoint, layers)
    default = checkpoint.prompts.get(checkpoint.default_prompt or "", "")

    def encode(batch: Sequence[str], role: str | None) -> dict[int, Floats]:
        order = np.argsort([len(text) for text in batch])  # little padding in each batch
        prompt = checkpoint.prompts.get(role or "", default)
        found = reference.encode([batch[i] for i in order], prompt=prompt)
        return {depth: rows[np.argsort(order)] for depth, rows in found.items()}

    calibration = encode(texts, None)
    encoded = [(task, *(encode(each.texts, each.role) for each in task.texts())) for task in tasks]
    for depth in layers:
        for dim in dims:
            pairs = tuple(
                (task, truncate(first[depth], dim), truncate(second[depth], dim))
                for task, first, second in encoded
            )
            yield Cell(depth, dim, truncate(calibration[depth], dim), pairs)


def precision_table(cells: Sequence[Cell]) -> Iterator[str]:
    """Yield a row for each cell and way to store its vectors."""
    names = [
        f"{task.name} {metric}"
        for task, *_ in cells[0].tasks
        for metric in (
            ("spearman",) if isinstance(task, StsTask) else (f"ndcg@{TOP}", f"recall@{TOP}")
        )
    ]
    yield f"| layers x dim | vectors | bytes | {' | '.join(names)} | clipped |"
    yield "| --- | --- | ---: |" + " ---: |" * (len(names) + 1)
    for cell in cells:
        for name, size, scores, clipped in ways_to_store(cell):
            points = " | ".join(f"{scores[key]:.2f}" for key in names)
            yield f"| {cell.layers}x{cell.dim} | {name} | {size} | {points} | {clipped} |"


def ways_to_store(cell: Cell) -> Iterator[tuple[str, int, dict[str, float], str]]:
    """Yield name, bytes per vector, "task metric" -> points, and the share of values clipped."""
    ranges = cell.ranges
    documents = np.concatenate([second for _, _, second in cell.tasks])
    for precision in PRECISIONS:
        coded = [
            (task, *(comparable(rows, precision, ranges) for rows in pair))
            for task, *pair in cell.tasks
        ]
        clipped = f"{clipping_rate(documents, ranges):.2%}" if precision in ("int8", "int4") else ""
        yield precision, bytes_per_vector(cell.dim, precision), scored(coded), clipped
    codes = [
        (
            task,
            *(normalize(encode_vectors(rows, "int8", ranges).astype(np.float32)) for rows in pair),
        )
        for task, *pair in cell.tasks
    ]
    yield "int8, codes compared undecoded", cell.dim, scored(codes), ""
    for divisor in (4, 8):
        quantizer = faiss.ProductQuantizer(cell.dim, cell.dim // divisor, 8)
        quantizer.train(cell.calibration)
        coded = [
            # As in a PQ index, the query of a retrieval task is not quantized.
            (
                task,
                quantized(quantizer, first) if isinstance(task, StsTask) else first,
                quantized(quantizer, second),
            )
            for task, first, second in cell.tasks
        ]
        yield "PQ", cell.dim // divisor, scored(coded), ""


def quantized(quantizer: faiss.ProductQuantizer, vectors: Floats) -> Floats:
    """Return the vectors after product quantization."""
    return normalize(quantizer.decode(quantizer.compute_codes(np.ascontiguousarray(vectors))))


def scored(pairs: Sequence[tuple[Task, Floats, Floats]]) -> dict[str, float]:
    """Return "task metric" -> points."""
    return {
        f"{task.name} {metric}": value
        for task, first, second in pairs
        for metric, value in (
            score_pairs(task, first, second)
            if isinstance(task, StsTask)
            else score_ranking(task, rank(first, second, TOP))
        ).items()
    }


def rescoring_table(cells: Sequence[Cell]) -> Iterator[str]:
    """Yield nDCG@10 / recall@10 of one-bit search, rescored by the codes stored beside the bits."""
    retrieval = [task.name for task, *_ in cells[0].tasks if not isinstance(task, StsTask)]
    columns = [f"{name} x{m}" for name in retrieval for m in MULTIPLIERS]
    yield f"| layers x dim | ubinary rescored by | bytes | {' | '.join(columns)} |"
    yield "| --- | --- | ---: |" + " ---: |" * len(columns)
    for cell in cells:
        for precision in ("ubinary", "int4", "int8", "float32"):
            size = bytes_per_vector(cell.dim, "ubinary")
            size += bytes_per_vector(cell.dim, precision) if precision != "ubinary" else 0
            points = []
            for task, queries, documents in cell.tasks:
                if isinstance(task, StsTask):
                    continue
                signs = [comparable(rows, "ubinary", None) for rows in (queries, documents)]
                stored = comparable(documents, precision, cell.ranges)
                for multiplier in MULTIPLIERS:
                    candidates = rank(*signs, multiplier * TOP)
                    found = score_ranking(task, rescore(queries, stored, candidates, TOP))
                    points.append(f"{found[f'ndcg@{TOP}']:.2f} / {found[f'recall@{TOP}']:.2f}")
            yield f"| {cell.layers}x{cell.dim} | {precision} | {size} | {' | '.join(points)} |"


def rotation_table(cells: Sequence[Cell]) -> Iterator[str]:
    """Yield the main metrics of one-bit codes after centring and rotations."""
    names = [task.name for task, *_ in cells[0].tasks]
    yield f"| layers x dim | before the sign | {' | '.join(names)} |"
    yield "| --- | --- |" + " ---: |" * len(names)
    for cell in cells:
        identity, nothing = np.eye(cell.dim, dtype=np.float32), np.zeros(cell.dim, np.float32)
        centre = cell.calibration.mean(axis=0)
        turn = random_rotation(cell.dim)
        for name, mean, rotation in (
            ("nothing", nothing, identity),
            ("centred", centre, identity),
            ("random rotation", nothing, turn),
            ("centred, random rotation", centre, turn),
            ("ITQ", nothing, itq(cell.calibration)),
            ("centred, ITQ", centre, itq(cell.calibration - centre)),
        ):
            pairs = [
                (task, *(comparable((rows - mean) @ rotation, "ubinary", None) for rows in pair))
                for task, *pair in cell.tasks
            ]
            scores = scored(pairs)
            points = [f"{scores[f'{task.name} {task.main_metric}']:.2f}" for task, *_ in cell.tasks]
            yield f"| {cell.layers}x{cell.dim} | {name} | {' | '.join(points)} |"


def random_rotation(dim: int) -> Floats:
    """Return an orthogonal float32 (dim, dim) matrix."""
    matrix = np.random.default_rng(SEED).standard_normal((dim, dim))
    return np.linalg.qr(matrix)[0].astype(np.float32)


def itq(vectors: Floats) -> Floats:
    """Return the rotation of iterative quantization, float32 (dim, dim).

    It rotates the vectors towards their signs: min ||sign(V R) - V R|| over orthogonal R, solved
    alternately for the signs and, as a Procrustes problem, for R, from a random rotation (Gong and
    Lazebnik, "Iterative quantization: a Procrustean approach to learning binary codes", CVPR 2011).
    """
    rotation = random_rotation(vectors.shape[1])
    for _ in range(ITERATIONS):
        signs = np.where(vectors @ rotation > 0, 1, -1).astype(np.float32)
        left, _, right = np.linalg.svd(vectors.T @ signs)
        rotation = left @ right
    return rotation


if __name__ == "__main__":
    main()
