"""Exact search in numpy: the best documents of each query, and candidates ranked again.

Products are exact, so a ranking does not depend on the number of threads, the BLAS library or where
in a matrix a document stands, and equal documents tie. Values are rounded to multiples of 2^-26:
of rows of length 1, each product is then a multiple of 2^-52 and each partial sum below 2, which
float64 holds. So are sums of whole numbers. The rounding moves a value by at most 2^-27, less than
float32 itself does above 1/8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Rows = NDArray[np.intp]

#: A row of a ranking that has no more documents.
NO_ROW = -1

_QUERY_BLOCK = 256
_DOCUMENT_BLOCK = 8192
_BLOCK_VALUES = 1 << 21  # of a block of documents
_BLOCK_PRODUCTS = 1 << 17  # of queries with few documents, as many as a processor's cache holds
_GRAIN = 1 << 26
_FEW = 2048  # documents that are all multiplied with a query sooner than some are picked out


@dataclass(frozen=True)
class Found:
    """The nearest documents of each query, best first, ties by row."""

    rows: Rows  # (queries, count) rows of the documents; ``NO_ROW`` where there are no more
    #: (queries, count): float64 dot products; of ``Codec.search``, float32 cosines. -inf where
    #: there are no more.
    similarity: NDArray[np.floating]


def rank(
    queries: Floats | Doubles, documents: Floats, count: int, leave_out: Rows | None = None
) -> Rows:
    """Return the rows of the documents with the largest dot products, (queries, count) at most.

    Best first, ties by row. Decoded one-bit codes (signs of -1 and 1) are ranked by their Hamming
    distance this way, since ``sign @ sign = dim - 2 * distance``.

    Args:
        queries: float32 (queries, dim), of length 1 or whole numbers; or ``rounded`` ones.
        documents: float32 (documents, dim), likewise.
        count: how many to return.
        leave_out: per query, the row of a document that is not ranked, or ``NO_ROW``. Its ranking
            ends in ``NO_ROW`` where there are not enough other documents.
    """
    size = block_rows(documents.shape[1])
    blocks = (documents[start : start + size] for start in range(0, len(documents), size))
    if leave_out is None:
        return nearest(queries, blocks, count).rows
    rows = nearest(queries, blocks, count + 1).rows
    left_out = rows == leave_out[:, None]
    order = np.argsort(left_out, axis=1, kind="stable")  # the others keep their order
    rows = np.take_along_axis(np.where(left_out, NO_ROW, rows), order, axis=1)
    return rows[:, :count]


def rescore(queries: Floats, documents: Floats, candidates: Rows, count: int) -> Rows:
    """Return the best ``count`` candidates of each query, by vectors that say more.

    Args:
        queries: float32 (queries, dim), usually not quantized: a query is not stored.
        documents: float32 (documents, dim), as decoded from what is stored for rescoring.
        candidates: rows of documents, (queries, candidates), best first by the codes that found
            them; ties keep that order, and ``NO_ROW`` stays last.
        count: how many to keep.
    """
    if len(documents) > _FEW:
        return nearest_among(queries, lambda rows: documents[rows], candidates, count).rows
    products = rounded(queries) @ rounded(documents).T
    values = np.take_along_axis(products, np.maximum(candidates, 0), axis=1)
    values[candidates == NO_ROW] = -np.inf
    order = np.argsort(-values, axis=1, kind="stable")[:, :count]
    return np.take_along_axis(candidates, order, axis=1)


def nearest_among(
    queries: Floats, vectors_of: Callable[[Rows], Floats], candidates: Rows, count: int
) -> Found:
    """Return the best candidates of each query, as ``rescore`` describes them.

    Args:
        queries: float32 (queries, dim), of length 1 or whole numbers.
        vectors_of: from rows of documents to their vectors, likewise.
        candidates: rows of documents, (queries, candidates).
        count: how many to keep. A place without a candidate has a similarity of -inf.
    """
    kept = min(count, candidates.shape[1])
    rows = np.empty((len(queries), kept), dtype=np.intp)
    products = np.empty((len(queries), kept), dtype=np.float64)
    for index, (query, choice) in enumerate(zip(queries, candidates, strict=True)):
        there = choice != NO_ROW
        values = np.full(len(choice), -np.inf)
        values[there] = rounded(vectors_of(choice[there])) @ rounded(query)
        order = np.argsort(-values, kind="stable")[:kept]
        rows[index], products[index] = choice[order], values[order]
    return Found(rows, products)


def nearest(queries: Floats | Doubles, blocks: Iterable[Floats], count: int) -> Found:
    """Return the best documents of each query from documents that come in blocks.

    Args:
        queries: float32 (queries, dim), of length 1 or whole numbers; or ``rounded`` ones.
        blocks: float32 (documents, dim) each, likewise, in the order of their rows.
        count: how many to return, or as many as there are.
    """
    found = Found(np.empty((len(queries), 0), dtype=np.intp), np.empty((len(queries), 0)))
    first_row = 0
    for block in blocks:
        best = _nearest_of_block(queries, rounded(block), count)
        best = replace(best, rows=best.rows + first_row)
        found = _nearest_of_both(found, best, count) if first_row else best
        first_row += len(block)
    return found


def _nearest_of_both(first: Found, second: Found, count: int) -> Found:
    rows = np.concatenate([first.rows, second.rows], axis=1)
    products = np.concatenate([first.similarity, second.similarity], axis=1)
    order = np.argsort(-products, axis=1, kind="stable")[:, :count]
    best = (np.take_along_axis(each, order, axis=1) for each in (rows, products))
    return Found(*best)


def block_rows(dim: int) -> int:
    """Return how many documents of ``dim`` values are compared at a time, to bound memory."""
    return max(1, min(_DOCUMENT_BLOCK, _BLOCK_VALUES // max(1, dim)))


def rounded(vectors: Floats | Doubles) -> Doubles:
    """Return float64 (rows, dim) vectors in multiples of 2^-26: products are exact in any order.

    What is float64 already is taken to be rounded: whoever multiplies vectors often rounds them
    once.
    """
    if vectors.dtype == np.float64:
        return vectors  # type: ignore[return-value]
    values = vectors.astype(np.float64)
    values *= _GRAIN
    np.rint(values, out=values)
    values /= _GRAIN
    return values


def _nearest_of_block(queries: Floats | Doubles, documents: Doubles, count: int) -> Found:
    count = min(count, len(documents))
    rows = np.empty((len(queries), count), dtype=np.intp)
    products = np.empty((len(queries), count), dtype=np.float64)
    size = max(_QUERY_BLOCK, _BLOCK_PRODUCTS // max(1, len(documents)))
    for start in range(0, len(queries), size):
        block = rounded(queries[start : start + size]) @ documents.T
        best = _columns_of_largest(block, count)
        values = np.take_along_axis(block, best, axis=1)
        order = np.argsort(-values, axis=1, kind="stable")
        rows[start : start + size] = np.take_along_axis(best, order, axis=1)
        products[start : start + size] = np.take_along_axis(values, order, axis=1)
    return Found(rows, products)


def _columns_of_largest(block: Doubles, count: int) -> Rows:
    """Return where the largest values of each row are, ascending; of those that tie, the first."""
    width = block.shape[1]
    lowest = np.partition(block, width - count, axis=1)[:, width - count, None]
    kept, tied = block > lowest, block == lowest
    ties, places = np.count_nonzero(tied, axis=1), np.flatnonzero(tied)
    earlier = np.arange(len(places)) - np.repeat(np.cumsum(ties) - ties, ties)
    room = np.repeat(count - np.count_nonzero(kept, axis=1), ties)
    kept.ravel()[places[earlier < room]] = True
    columns: Rows = (np.flatnonzero(kept) % width).reshape(len(block), count)
    return columns
