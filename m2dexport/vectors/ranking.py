"""Exact search in numpy: the best documents of each query, and candidates ranked anew."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Rows = NDArray[np.intp]

_QUERY_BLOCK = 256


def rank(queries: Floats, documents: Floats, count: int) -> Rows:
    """Return the rows of the documents with the largest dot products, (queries, count) at most.

    Best first, ties by row. Decoded one-bit codes (signs of -1 and 1) are ranked by their Hamming
    distance this way, since ``sign @ sign = dim - 2 * distance``.
    """
    blocks = [
        np.argsort(-(queries[start : start + _QUERY_BLOCK] @ documents.T), axis=1, kind="stable")
        for start in range(0, len(queries), _QUERY_BLOCK)
    ]
    return np.concatenate([block[:, :count] for block in blocks])


def rescore(queries: Floats, documents: Floats, candidates: Rows, count: int) -> Rows:
    """Return the best ``count`` candidates of each query, by vectors that tell more.

    Args:
        queries: float32 (queries, dim), usually not quantized: a query is not stored.
        documents: float32 (documents, dim), as decoded from what is stored for rescoring.
        candidates: rows of documents, (queries, candidates), best first by the codes that found
            them; ties keep that order.
        count: how many to keep.
    """
    kept = np.empty((len(queries), min(count, candidates.shape[1])), dtype=candidates.dtype)
    for row, (query, rows) in enumerate(zip(queries, candidates, strict=True)):
        order = np.argsort(-(documents[rows] @ query), kind="stable")
        kept[row] = rows[order[:count]]
    return kept
