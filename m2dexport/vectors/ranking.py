"""Exact search in numpy: the best documents of each query, and candidates ranked again.

Products are exact, so a ranking does not depend on the number of threads, the BLAS library or where
in a matrix a document stands, and equal documents tie. Values are rounded to multiples of 2^-26:
of rows of length 1, each product is then a multiple of 2^-52 and each partial sum below 2, which
float64 holds. So are sums of whole numbers. The rounding moves a value by at most 2^-27, less than
float32 itself does above 1/8.

Of many documents, float32 products say first which can be among the best at all; only those few are
then multiplied exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache, partial

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Products = NDArray[np.floating]  # exact ones
Rows = NDArray[np.intp]

#: A row of a ranking that has no more documents.
NO_ROW = -1

_QUERY_BLOCK = 256
_DOCUMENT_BLOCK = 8192
_BLOCK_VALUES = 1 << 21  # of a block of documents
_BLOCK_PRODUCTS = 1 << 17  # of queries with few documents, as many as a processor's cache holds
#: The neighbours of this number are 2^-26 apart, so that adding it rounds what is below 2^25.
_ROUNDER = 1.5 * 2**26
_FEW = 2048  # documents that are all multiplied with a query sooner than some are picked out
_FEW_OF = 64  # likewise, one of so many
_GROUPS = 8  # of documents, for each that is wanted
_LEAST_GROUP = 4  # documents of a group
_SORTED_WHOLE = 256  # products of a query that are sorted sooner than the largest are picked out
_SMALLEST = 52  # products are multiples of 2^-52


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
    return np.take_along_axis(candidates, _sorted(values, count).rows, axis=1)


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
        known = found.similarity[:, -1:] if first_row >= count else None
        best = _nearest_of_block(queries, block, count, known)
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
    values += _ROUNDER
    values -= _ROUNDER
    return values


def _nearest_of_block(
    queries: Floats | Doubles,
    documents: Floats,
    count: int,
    least: NDArray[np.floating] | None,
) -> Found:
    """Return the best documents of a block.

    Args:
        queries: as ``nearest`` takes them.
        documents: likewise.
        count: how many to return, or as many as there are.
        least: (queries, 1) products; documents that do not exceed them may be left out. In their
            place are rows of no meaning, with a similarity of -inf.
    """
    count = min(count, len(documents))
    rows = np.empty((len(queries), count), dtype=np.intp)
    products = np.empty((len(queries), count), dtype=np.float64)
    whole = _whole_products(queries, documents)
    exact = cache(partial(rounded, documents))
    size = max(_QUERY_BLOCK, _BLOCK_PRODUCTS // max(1, len(documents)))
    for start in range(0, len(queries), size):
        some = slice(start, start + size)
        found = None
        if least is not None:
            found = _nearest_of_few(queries[some], documents, count, least[some], whole=whole)
        if found is None and whole:
            singles = queries[some].astype(np.float32, copy=False)
            found = _nearest_of_products(singles @ documents.T, count)
        elif found is None:
            found = _nearest_of_products(rounded(queries[some]) @ exact().T, count)
        rows[some], products[some] = found.rows, found.similarity
    return Found(rows, products)


def _nearest_of_products(products: Products, count: int) -> Found:
    """Return the largest of exact products, (queries, documents)."""
    width = products.shape[1]
    if width <= max(2 * count, _SORTED_WHOLE):
        return _sorted(products, count)
    near = _at_least_nearest(products, count)
    if near is not None:
        places, columns = np.nonzero(near)
        return _best_of(len(products), count, places, columns, products[places, columns])
    best = _columns_of_largest(products, count)
    found = _sorted(np.take_along_axis(products, best, axis=1), count)
    return replace(found, rows=np.take_along_axis(best, found.rows, axis=1))


def _sorted(products: Products, count: int) -> Found:
    """Return the largest of exact products, (queries, documents), by sorting them all.

    One whole number can hold a product and, below it, its column. Numbers sort several times as
    fast as columns by their products do, and never tie.
    """
    below = (products.shape[1] - 1).bit_length()
    largest = max(products.max(), -products.min()) if products.size else np.inf
    # Of one side that is whole, such as signs, products are multiples of 2^-26.
    smallest = _SMALLEST if largest < 2 else _SMALLEST // 2
    if not largest < 2.0 ** (62 - smallest - below):  # or there is one of -inf
        order = np.argsort(-products, axis=1, kind="stable")[:, :count]
        return Found(order, np.take_along_axis(products, order, axis=1))
    keys = (products * -(2.0 ** (smallest + below))).astype(np.int64)
    keys |= np.arange(products.shape[1])
    if 2 * count <= products.shape[1]:
        keys = np.partition(keys, count, axis=1)[:, :count]
    keys.sort(axis=1)
    keys = keys[:, :count]
    values: Doubles = (keys >> below) * -(2.0**-smallest)
    return Found(keys & ((1 << below) - 1), values)


def _at_least_nearest(products: Products, count: int) -> NDArray[np.bool_] | None:
    """Return which products may be among the ``count`` largest of their row, and few others.

    No fewer than ``count`` are as large as the one that is ``count``-th among the largest of some
    groups: each of these groups has one. Finding the largest of groups is fast, and there are few.

    Returns:
        None where many products tie, or there are too few for groups.
    """
    queries, width = products.shape
    groups = _GROUPS * count
    size = width // groups
    if size < _LEAST_GROUP:
        return None
    largest = products[:, : size * groups].reshape(queries, size, groups).max(axis=1)
    near = products >= np.partition(largest, groups - count, axis=1)[:, groups - count, None]
    return near if np.count_nonzero(near) <= 2 * count * queries else None


def _nearest_of_few(
    queries: Floats | Doubles,
    documents: Floats,
    count: int,
    least: NDArray[np.floating],
    *,
    whole: bool,
) -> Found | None:
    """Return what ``_nearest_of_block`` does, by exact products of few documents.

    They are those whose float32 product does not show that the exact one is too small.

    Args:
        queries: as ``nearest`` takes them.
        documents: likewise.
        count: how many to return.
        least: as ``_nearest_of_block`` takes them.
        whole: whether float32 products are exact, by ``_whole_products``.

    Returns:
        None where so many are left that all exact products are made sooner.
    """
    singles = queries.astype(np.float32)
    products = singles @ documents.T
    bound = least if whole else least - _margin(singles, documents)
    below = bound.astype(np.float32)
    below = np.where(below > bound, np.nextafter(below, np.float32(-np.inf)), below)
    near = products > below
    if np.count_nonzero(near) > near.size // _FEW_OF:
        return None
    places, columns = np.nonzero(near)
    if whole:
        values = products[near].astype(np.float64)
    else:
        values = _products_of(queries, documents, places, columns)
    return _best_of(len(queries), count, places, columns, values)


def _best_of(queries: int, count: int, places: Rows, columns: Rows, values: Products) -> Found:
    """Return the best of some documents, each of a query (``places``, ascending).

    In the place of documents that are not there are rows of no meaning, of similarity -inf.
    """
    order = np.lexsort((-values, places))  # stable: columns that tie keep their order
    places = places[order]
    rank = np.arange(len(places)) - np.searchsorted(places, places)
    kept = rank < count
    found = Found(np.zeros((queries, count), np.intp), np.full((queries, count), -np.inf))
    found.rows[places[kept], rank[kept]] = columns[order][kept]
    found.similarity[places[kept], rank[kept]] = values[order][kept]
    return found


def _margin(queries: Floats, documents: Floats) -> Doubles:
    """Return by how much a float32 product may miss that of ``rounded`` vectors, (queries, 1).

    A sum of ``dim`` products, in any order, misses ``dim`` times 2^-24 of the lengths' product at
    most (Higham, "Accuracy and Stability of Numerical Algorithms", 2002, section 3.1); rounding
    the values adds less than that again.
    """
    lengths = np.linalg.norm(queries.astype(np.float64), axis=1, keepdims=True)
    products: Doubles = lengths * float(np.linalg.norm(documents, axis=1).max())
    products *= queries.shape[1] * 2.0**-23
    return products


def _whole_products(queries: Floats | Doubles, documents: Floats) -> bool:
    """Say whether float32 products are exact: of whole numbers whose sums stay below 2^24."""
    if not (_whole(queries) and _whole(documents)):
        return False
    largest = (float(np.abs(each).max(initial=0)) for each in (queries, documents))
    return bool(math.prod(largest) * documents.shape[1] < 1 << 24)


def _whole(vectors: Floats | Doubles) -> bool:
    return all(np.array_equal(each, np.rint(each)) for each in (vectors[:1], vectors))


def _products_of(
    queries: Floats | Doubles, documents: Floats, places: Rows, columns: Rows
) -> Doubles:
    """Return the exact products of some queries with one document each, (pairs,)."""
    found = np.empty(len(places))
    size = block_rows(documents.shape[1])
    for start in range(0, len(places), size):
        some = slice(start, start + size)
        pairs = rounded(queries[places[some]]), rounded(documents[columns[some]])
        found[some] = np.einsum("ij,ij->i", *pairs)
    return found


def _columns_of_largest(block: Products, count: int) -> Rows:
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
