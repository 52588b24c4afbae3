"""Search with faiss: bits by Hamming distance, then int8 codes by the float query.

faiss's 8-bit scalar quantizer decodes as m2dexport does, ``low + (level + 0.5) * step`` of each
dim. So it is given the bundle's ranges instead of being trained, and takes the codes as they are.

    pip install m2dexport faiss-cpu
    python faiss_index.py int8.m2d int8.npy bits.m2d bits.npy queries.txt
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import faiss
import numpy as np
from space import (
    CANDIDATES,
    Collection,
    bits_in_bytes,
    collection,
    exact,
    ranked,
    report,
    two_steps,
)


def int8_index(documents: Collection) -> faiss.IndexScalarQuantizer:
    """Return the int8 codes as an index, a byte per dim."""
    codec = documents.codec
    index = faiss.IndexScalarQuantizer(
        codec.dim, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT
    )
    widths = codec.ranges.high - codec.ranges.low
    faiss.copy_array_to_vector(np.concatenate([codec.ranges.low, widths]), index.sq.trained)
    index.is_trained = True
    levels = documents.codes.view(np.uint8) ^ 128  # codes are levels less 128
    index.add_sa_codes(np.ascontiguousarray(levels))
    return index


def bit_index(documents: Collection) -> faiss.IndexBinaryFlat:
    """Return the bits as an index; zero bits at the end of a row change no distance."""
    index = faiss.IndexBinaryFlat(bits_in_bytes(documents))
    index.add(np.ascontiguousarray(documents.bits))
    return index


def main() -> None:
    """Index, write, read again, search, compare with numpy."""
    documents = collection(__doc__.splitlines()[0])
    print(f"faiss {faiss.__version__}, {len(documents.codes)} documents")
    with tempfile.TemporaryDirectory() as folder:
        # faiss keeps no notes: the names of the files say of which space they are.
        codes_path = Path(folder, f"int8-{documents.space_id}.faiss")
        bits_path = Path(folder, f"bits-{documents.space_id}.faiss")
        faiss.write_index(int8_index(documents), str(codes_path))
        faiss.write_index_binary(bit_index(documents), str(bits_path))
        codes = faiss.read_index(str(codes_path))
        bits = faiss.read_index_binary(str(bits_path))
        for kind, path in (("int8", codes_path), ("bits", bits_path)):
            print(f"{kind}: {path.stat().st_size / len(documents.codes):.1f} bytes per vector")
    # faiss multiplies; decoded codes are not quite of length 1, so the best are ranked again.
    count = min(CANDIDATES, len(documents.codes))
    _, candidates = codes.search(documents.queries, count)
    found = ranked(codes.reconstruct_batch, candidates, documents.queries)
    report("all int8 codes", found, documents, exact(documents))
    _, candidates = bits.search(documents.query_bits, count)
    found = ranked(codes.reconstruct_batch, candidates, documents.queries)
    report(f"bits, {CANDIDATES} rescored by int8", found, documents, two_steps(documents))


if __name__ == "__main__":
    main()
