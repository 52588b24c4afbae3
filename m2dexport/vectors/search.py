"""Using stored vectors: ``Codec`` decodes, compares and searches them.

Codes themselves must not be multiplied: products of int8 overflow, and those of ranged or packed
codes mean nothing. Here they are decoded, some at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m2dexport.errors import UsageError
from m2dexport.precisions import BitOrder, VectorPrecision
from m2dexport.vectors.codecs import (
    LEVELS,
    Ranges,
    code_width,
    decode_vectors,
    normalize,
    require_ranges,
)
from m2dexport.vectors.ranking import (
    NO_ROW,
    Floats,
    Found,
    Rows,
    block_rows,
    nearest,
    nearest_among,
    rounded,
)

_SIGNS: tuple[VectorPrecision, ...] = ("ubinary", "binary")


@dataclass(frozen=True)
class Codec:
    """How one artifact's vectors are stored, and what can be done with their codes.

    Raises:
        UsageError: when int8 or int4 come without ranges, or with ranges of another dim.
    """

    precision: VectorPrecision
    dim: int
    ranges: Ranges | None = None  # of int8 and int4
    bit_order: BitOrder = "big"  # of int4, ubinary and binary

    def __post_init__(self) -> None:
        if self.precision in LEVELS:
            require_ranges(self.precision, self.ranges, self.dim)

    def decode(self, codes: NDArray[Any]) -> Floats:
        """Return what codes stand for, float32 (texts, dim); see ``codecs.decode_vectors``.

        Raises:
            UsageError: when the codes are not a row per text of this precision and dim.
        """
        codes = np.asarray(codes)
        if codes.ndim != 2:
            raise UsageError(
                f"codes are (texts, {code_width(self.dim, self.precision)}) arrays, not of shape "
                f"{codes.shape}; for one vector, pass vector[None]."
            )
        return decode_vectors(codes, self.precision, self.dim, self.ranges, self.bit_order)

    def similarity(self, first: NDArray[Any], second: NDArray[Any]) -> Floats:
        """Return the cosine of what codes stand for, float32 (rows of first, rows of second).

        That of one-bit codes is ``1 - 2 * Hamming distance / dim``.

        Args:
            first: codes, or float32 (texts, dim) vectors that were not stored.
            second: codes.

        Raises:
            UsageError: when the codes are not of this precision and dim, or hold NaN.
        """
        left, scale = self._queries(first)
        result = np.empty((len(left), len(second)), dtype=np.float32)
        row = 0
        for block in self._blocks(second):
            result[:, row : row + len(block)] = rounded(left) @ rounded(block).T * scale
            row += len(block)
        return result

    def search(
        self,
        queries: NDArray[Any],
        documents: NDArray[Any],
        top: int = 10,
        candidates: Rows | None = None,
    ) -> Found:
        """Return the documents that are most similar to each query, with float32 cosines.

        Every document is compared, a block at a time: memory does not grow with their number, and
        ``documents`` may be a memory map. With ``candidates``, only those are: so what was found
        by short codes is ranked again by longer ones.

        Args:
            queries: codes, or float32 (queries, dim) vectors that were not stored.
            documents: codes.
            top: how many to return at most.
            candidates: rows of the documents to choose from, (queries, any), such as the ``rows``
                of another search; -1 stands for none.

        Raises:
            UsageError: when the codes are not of this precision and dim, or hold NaN, ``top`` is
                below 1, or candidates are not rows of the documents.

        Example:
            >>> coarse = bits.search(bit_queries, bit_documents, top=40)
            >>> found = int8.search(queries, documents, top=10, candidates=coarse.rows)
        """
        if top < 1:
            raise UsageError(f"top is {top}; ask for 1 document or more.")
        left, scale = self._queries(queries)
        if candidates is None:
            found = nearest(left, self._blocks(documents), top)
        else:
            documents, candidates = np.asarray(documents), np.asarray(candidates)
            self.decode(documents[:0])
            _require_candidates(candidates, len(left), len(documents))
            found = nearest_among(
                left, lambda rows: self.comparable(documents[rows]), candidates, top
            )
        return replace(found, similarity=(found.similarity * scale).astype(np.float32))

    def comparable(self, codes: NDArray[Any]) -> Floats:
        """Return what products of codes are taken of, float32 (texts, dim).

        Normalised decoded values; of one-bit codes the signs, whose products are whole numbers.

        Raises:
            UsageError: as ``decode``, or when float32 vectors hold NaN or infinite values.
        """
        decoded = self.decode(codes)
        return decoded if self.precision in _SIGNS else _normalized(decoded)

    def _queries(self, queries: NDArray[Any]) -> tuple[Floats, float]:
        """Return what to multiply with ``comparable`` documents, and what makes that a cosine."""
        queries = np.asarray(queries)
        length = float(self.dim) ** 0.5 if self.precision in _SIGNS else 1.0  # of a document
        if queries.dtype == np.float32 and queries.shape[1:] == (self.dim,):
            return _normalized(queries), 1 / length
        return self.comparable(queries), 1 / length**2

    def _blocks(self, documents: NDArray[Any]) -> Iterator[Floats]:
        """Yield documents as ``comparable``, as many rows at a time as memory should hold."""
        documents = np.asarray(documents)
        self.decode(documents[:0])  # refused before any work, and when there are none
        size = block_rows(self.dim)
        for start in range(0, len(documents), size):
            yield self.comparable(documents[start : start + size])


def _normalized(vectors: Floats) -> Floats:
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        raise UsageError(f"vector {int(np.argmin(finite))} holds NaN or infinite values.")
    return normalize(vectors)


def _require_candidates(candidates: Rows, queries: int, documents: int) -> None:
    if candidates.ndim != 2 or len(candidates) != queries or candidates.dtype.kind != "i":
        raise UsageError(
            f"candidates are an integer array of a row per query ({queries}), not "
            f"{candidates.dtype} of shape {candidates.shape}."
        )
    wrong = (candidates < NO_ROW) | (candidates >= documents)
    if wrong.any():
        raise UsageError(
            f"candidate {int(candidates[wrong][0])} is not a row of the {documents} documents."
        )
