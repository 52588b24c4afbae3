"""What the examples share: the vectors to be searched, all of one model, and numpy's answer.

``m2dexport encode`` wrote the documents twice: by a bundle of int8 vectors, and by one of the same
model with one bit per dim (``--vectors ubinary``). An index finds candidates by the bits, which
take little room and are compared fast, and ranks them by the float query and the int8 codes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import m2dexport
from m2dexport.vectors.search import Codec

TOP, CANDIDATES = 10, 100


@dataclass(frozen=True)
class Collection:
    """Documents and queries in one space."""

    space_id: str  # an index keeps it, and is asked nothing of another space
    codec: Codec  # what the int8 codes stand for
    bit_codec: Codec
    codes: np.ndarray  # int8 (documents, dim): levels of each dim's own range
    bits: np.ndarray  # uint8 (documents, dim / 8, rounded up)
    queries: np.ndarray  # float32 (queries, dim), of length 1
    query_bits: np.ndarray  # uint8, as the documents' bits


def collection(description: str) -> Collection:
    """Return what the command line names, or end with the sentence that says what is wrong."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("int8", type=Path, help="bundle of int8 vectors")
    parser.add_argument("codes", type=Path, help="the documents, as it encoded them")
    parser.add_argument("bits", type=Path, help="bundle of ubinary vectors, of the same model")
    parser.add_argument("bit_codes", type=Path, help="the documents, as that encoded them")
    parser.add_argument("queries", type=Path, help="a query on each line")
    paths = parser.parse_args()
    try:
        int8, bits = m2dexport.load(paths.int8), m2dexport.load(paths.bits)
        require_one_model(int8, bits, paths)
        # Vectors of another space than the bundle's are refused here.
        codes = m2dexport.read_vectors(paths.codes, int8)
        bit_codes = m2dexport.read_vectors(paths.bit_codes, bits)
        texts = paths.queries.read_text(encoding="utf-8").splitlines()
        if not texts:
            raise SystemExit(f"Error: {paths.queries} is empty; write a query on each line.")
        queries = int8.codec.comparable(int8.encode(texts))
    except m2dexport.M2DError as error:
        raise SystemExit(f"Error: {error}") from error
    if not TOP <= len(codes.vectors) == len(bit_codes.vectors):
        raise SystemExit(f"Error: name two files of the same documents, {TOP} or more.")
    query_bits = np.packbits(queries > 0, axis=1, bitorder=bits.spec.bit_order)
    return Collection(
        int8.spec.space_id,
        int8.codec,
        bits.codec,
        codes.vectors,
        bit_codes.vectors,
        queries,
        query_bits,
    )


def require_one_model(int8: m2dexport.Encoder, bits: m2dexport.Encoder, paths: argparse.Namespace):
    """Refuse bundles of which one cannot rank what the other finds."""
    if (int8.spec.vectors, bits.spec.vectors) != ("int8", "ubinary"):
        raise SystemExit("Error: name a bundle of int8 vectors, then one of ubinary vectors.")
    first, second = (
        (each.spec.provenance["sub_model"], each.spec.layers, each.spec.dim, each.spec.weights)
        for each in (int8, bits)
    )
    if first != second:
        raise SystemExit(
            f"Error: {paths.int8} (space {int8.spec.space_id}) and {paths.bits} (space "
            f"{bits.spec.space_id}) are not of one model; build both from the same artifact."
        )


def bits_in_bytes(found: Collection) -> int:
    """Return the bits of a row, which the last byte fills up with zeros: no distance changes."""
    return 8 * found.bits.shape[1]


def exact(found: Collection) -> np.ndarray:
    """Return numpy's ten nearest documents of each query, by all int8 codes."""
    return found.codec.search(found.queries, found.codes, TOP).rows


def two_steps(found: Collection) -> np.ndarray:
    """Return numpy's ten nearest of the candidates that the bits find."""
    candidates = found.bit_codec.search(found.query_bits, found.bits, CANDIDATES).rows
    return found.codec.search(found.queries, found.codes, TOP, candidates).rows


def ranked(
    vectors_of: Callable[[np.ndarray], np.ndarray], candidates: np.ndarray, queries: np.ndarray
) -> np.ndarray:
    """Return the best candidates of each query, by the cosine of its floats with the int8 codes.

    Args:
        vectors_of: rows of an index -> what their codes stand for there, float32 (rows, dim).
        candidates: rows of the index, (queries, candidates).
        queries: float32 (queries, dim), of length 1.
    """
    best = np.empty((len(queries), TOP), dtype=np.int64)
    for number, (query, rows) in enumerate(zip(queries, candidates, strict=True)):
        vectors = vectors_of(rows)
        cosines = vectors @ query / np.linalg.norm(vectors, axis=1)
        best[number] = rows[np.argsort(-cosines, kind="stable")[:TOP]]
    return best


def report(name: str, rows: np.ndarray, found: Collection, same: np.ndarray) -> None:
    """Print how much of the exact answer was found, and how often all that numpy finds.

    Args:
        name: how the documents were searched.
        rows: the documents found, (queries, 10).
        found: what was searched.
        same: what numpy finds in the same way.
    """
    shared = [len({*a} & {*b}) for a, b in zip(exact(found), rows, strict=True)]
    recall = sum(shared) / exact(found).size
    equal = sum({*a} == {*b} for a, b in zip(same, rows, strict=True))
    print(f"{name:<42} recall@10 {recall:.3f}, the ten of numpy for {equal} of {len(rows)} queries")
