"""Search stored vectors of every precision with faiss: recall, bytes and queries per second.

    python tools/bench_search.py [--sizes 100000,1000000] [--dim 384] [--rounds 5]

The vectors are synthetic, from a seed. There is one cluster centre per 50 documents, drawn from a
normal distribution with standard deviation (1 + i) ** -0.25 in dim i, since the leading dims of a
Matryoshka model carry more. Every document and query is centre number C * u * u of C, with u
uniform in 0..1 so that clusters differ in size, plus noise of the same shape times a factor uniform
in 0.5..2, normalised. Searches use one thread and one batch of queries. The systems take turns, and
the median of the rounds is reported. Recall counts the ten nearest by exact float32, and speed is a
ratio to it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import faiss
import numpy as np
from numpy.typing import NDArray

from m2dexport.measure.machine import read_machine
from m2dexport.precisions import VectorPrecision
from m2dexport.vectors.codecs import (
    Ranges,
    bytes_per_vector,
    calibrate_ranges,
    decode_vectors,
    encode_vectors,
    normalize,
)

Floats = NDArray[np.float32]
Rows = NDArray[np.int64]

TOP = 10
QUERIES = 200
CLUSTER = 50  # documents in each, on average
CALIBRATION = 1000  # documents whose ranges are frozen
LISTS, PROBES = 1024, 32  # of the inverted file: cells, and cells visited by each query
NOISE = (0.5, 2.0)  # lowest and highest factor
MULTIPLIERS = (2, 4, 10)
BLOCK = 50_000  # vectors made or coded at a time


@dataclass(frozen=True)
class System:
    """One way to store and search."""

    name: str
    bytes_per_vector: int
    search: Callable[[], Rows]  # (queries, 10) rows of documents, best first


def main() -> None:
    """Print one table for each number of vectors."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="100000,1000000")
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    faiss.omp_set_num_threads(1)
    for size in map(int, options.sizes.split(",")):
        documents, queries = synthetic(size, options.dim)
        print(f"\n{size:,} vectors of {options.dim} dims, {QUERIES} queries\n")
        print("| stored and searched | bytes/vector | recall@10 | queries/s | ratio |")
        print("| --- | ---: | ---: | ---: | ---: |")
        report(systems(documents, queries), options.rounds)
    machine = read_machine()
    print(f"\n{machine.cpu}, 1 thread, faiss {faiss.__version__}: {faiss.get_compile_options()}")
    print(f"CPU flags: {' '.join(machine.flags)}")


def synthetic(size: int, dim: int, seed: int = 0) -> tuple[Floats, Floats]:
    """Return clustered documents and queries, normalised."""
    rng = np.random.default_rng(seed)
    spread = ((1 + np.arange(dim)) ** -0.25).astype(np.float32)
    centres = spread * rng.standard_normal((size // CLUSTER, dim), dtype=np.float32)

    def near_centres(count: int) -> Floats:
        vectors = np.empty((count, dim), dtype=np.float32)
        for start in range(0, count, BLOCK):
            block = vectors[start : start + BLOCK]
            chosen = (len(centres) * rng.random(len(block)) ** 2).astype(np.intp)
            factor = rng.uniform(*NOISE, (len(block), 1)).astype(np.float32)
            noise = rng.standard_normal(block.shape, dtype=np.float32)
            block[:] = normalize(centres[chosen] + factor * spread * noise)
        return vectors

    return near_centres(size), near_centres(QUERIES)


def systems(documents: Floats, queries: Floats) -> list[System]:
    """Return every system, its index built; exact float32 comes first."""
    dim = documents.shape[1]
    ranges = calibrate_ranges(documents[:CALIBRATION])
    bits, query_bits = (encode_vectors(rows, "ubinary") for rows in (documents, queries))
    width = 8 * bits.shape[1]
    binary = faiss.IndexBinaryFlat(width)
    binary.add(bits)
    found = [
        flat_system(documents, queries),
        int8_system(documents, queries),
        System("ubinary", bits.shape[1], lambda: binary.search(query_bits, TOP)[1]),
    ]
    for precision in ("ubinary", "int4", "int8", "float32"):
        codes = encode_vectors(documents, precision, ranges)
        extra = 0 if precision == "ubinary" else bytes_per_vector(dim, precision)
        for multiplier in MULTIPLIERS:

            def search(codes=codes, precision=precision, count=multiplier * TOP) -> Rows:
                candidates = binary.search(query_bits, count)[1]
                return rescored(queries, codes[candidates], precision, ranges, candidates)

            name = f"ubinary, x{multiplier} rescored by {precision}"
            found.append(System(name, bits.shape[1] + extra, search))
    lists = faiss.IndexBinaryIVF(faiss.IndexBinaryFlat(width), width, LISTS)
    lists.nprobe = PROBES
    lists.train(bits[: 50 * LISTS])
    lists.add(bits)
    int8 = encode_vectors(documents, "int8", ranges)

    def search_lists() -> Rows:
        candidates = lists.search(query_bits, MULTIPLIERS[-1] * TOP)[1]
        return rescored(queries, int8[candidates], "int8", ranges, candidates)

    name = f"{PROBES} of {LISTS} lists of ubinary, x{MULTIPLIERS[-1]} rescored by int8"
    return [*found, System(name, bits.shape[1] + dim, search_lists)]


def flat_system(documents: Floats, queries: Floats) -> System:
    """Return exact search of float32 vectors."""
    index = faiss.IndexFlatIP(documents.shape[1])
    index.add(documents)
    size = bytes_per_vector(documents.shape[1], "float32")
    return System("float32, exact", size, lambda: index.search(queries, TOP)[1])


def int8_system(documents: Floats, queries: Floats) -> System:
    """Return exact search of int8-symmetric codes, compared without decoding."""
    dim = documents.shape[1]
    kind = faiss.ScalarQuantizer.QT_8bit_direct_signed
    index = faiss.IndexScalarQuantizer(dim, kind, faiss.METRIC_INNER_PRODUCT)
    for start in range(0, len(documents), BLOCK):
        codes = encode_vectors(documents[start : start + BLOCK], "int8-symmetric")
        index.add(codes.astype(np.float32))
    codes = encode_vectors(queries, "int8-symmetric").astype(np.float32)
    return System("int8-symmetric", dim, lambda: index.search(codes, TOP)[1])


def rescored(
    queries: Floats,
    codes: NDArray[np.generic],
    precision: VectorPrecision,
    ranges: Ranges,
    candidates: Rows,
) -> Rows:
    """Return the ten best candidates by the dot product of float queries with decoded codes.

    Args:
        queries: float32 (queries, dim).
        codes: (queries, candidates, width), the stored codes of each candidate.
        precision: of the codes.
        ranges: of int8 and int4 codes.
        candidates: their rows, (queries, candidates).
    """
    dim = queries.shape[1]
    decoded = decode_vectors(codes.reshape(-1, codes.shape[-1]), precision, dim, ranges)
    decoded = normalize(decoded).reshape(*candidates.shape, dim)
    scores = np.einsum("qd,qcd->qc", queries, decoded, optimize=True)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :TOP]
    return np.take_along_axis(candidates, order, axis=1)


def report(found: list[System], rounds: int) -> None:
    """Time the systems in turns and print a row for each."""
    seconds = np.empty((rounds, len(found)))
    rows = [system.search() for system in found]  # this also warms up
    for turn in range(rounds):
        for column, system in enumerate(found):
            start = time.perf_counter()
            system.search()
            seconds[turn, column] = time.perf_counter() - start
    rates = QUERIES / np.median(seconds, axis=0)
    exact = rows[0]
    for system, ranking, rate in zip(found, rows, rates, strict=True):
        same = [len(np.intersect1d(a, b)) for a, b in zip(ranking, exact, strict=True)]
        print(
            f"| {system.name} | {system.bytes_per_vector} | {sum(same) / exact.size:.3f} "
            f"| {rate:.0f} | {rate / rates[0]:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
