"""Search with usearch: bits by Hamming distance, then int8 codes by the float query.

usearch compares int8 with int8, all dims on one scale, where m2dexport's int8 codes have a range
for each dim. So the vectors are decoded before they are inserted, and usearch codes them again as
127 times the value. Vectors that were built with ``--vectors int8-symmetric`` are such codes.

    pip install m2dexport usearch
    python usearch_index.py int8.m2d int8.npy bits.m2d bits.npy queries.txt
"""

from __future__ import annotations

import tempfile
from pathlib import Path

# Loads onnxruntime, which crashes when it is loaded after usearch 2.26.
import m2dexport.engines.onnxruntime.run  # noqa: F401

# isort: split
import numpy as np
import usearch
from space import (
    CANDIDATES,
    TOP,
    Collection,
    bits_in_bytes,
    collection,
    exact,
    ranked,
    report,
    two_steps,
)
from usearch.index import Index, MetricKind


def int8_index(documents: Collection) -> Index:
    """Return the vectors as an index of int8 codes of usearch's own."""
    index = Index(ndim=documents.codec.dim, metric=MetricKind.Cos, dtype="i8")
    index.add(np.arange(len(documents.codes)), documents.codec.comparable(documents.codes))
    return index


def bit_index(documents: Collection) -> Index:
    """Return the bits as an index; zero bits at the end of a row change no distance."""
    index = Index(ndim=bits_in_bytes(documents), metric=MetricKind.Hamming, dtype="b1")
    index.add(np.arange(len(documents.bits)), np.ascontiguousarray(documents.bits))
    return index


def main() -> None:
    """Index, write, read again, search, compare with numpy."""
    documents = collection(__doc__.splitlines()[0])
    print(f"usearch {usearch.__version__}, {len(documents.codes)} documents")
    with tempfile.TemporaryDirectory() as folder:
        # usearch keeps no notes: the names of the files say of which space they are.
        codes_path = Path(folder, f"int8-{documents.space_id}.usearch")
        bits_path = Path(folder, f"bits-{documents.space_id}.usearch")
        int8_index(documents).save(codes_path)
        bit_index(documents).save(bits_path)
        codes, bits = Index.restore(codes_path), Index.restore(bits_path)
        for kind, path in (("int8", codes_path), ("bits", bits_path)):
            print(f"{kind}: {path.stat().st_size / len(documents.codes):.1f} bytes per vector")

    def vectors_of(rows: np.ndarray) -> np.ndarray:
        return np.asarray(codes.get(rows, dtype="f32"))

    count = min(CANDIDATES, len(documents.codes))
    for name, all_of_it in (("all", True), ("by its graph", False)):  # which is the faster way
        found = codes.search(documents.queries, TOP, exact=all_of_it).keys
        report(f"int8 codes, {name}", found, documents, exact(documents))
        candidates = bits.search(documents.query_bits, count, exact=all_of_it).keys
        found = ranked(vectors_of, candidates, documents.queries)
        report(f"bits, {name}, {CANDIDATES} rescored", found, documents, two_steps(documents))


if __name__ == "__main__":
    main()
