"""Stored codes in use, against the float vectors that they stand for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tiny_artifact import unit_vectors

from m2dexport.errors import UsageError
from m2dexport.precisions import BIT_ORDERS, VECTOR_PRECISIONS, BitOrder, VectorPrecision
from m2dexport.vectors.codecs import calibrate_ranges, encode_vectors, normalize
from m2dexport.vectors.search import Codec

Floats = NDArray[np.float32]
DIM = 50  # not divisible by 8


RANGES = calibrate_ranges(unit_vectors(9, 2000, DIM))
QUERIES = unit_vectors(1, 20, DIM)
#: The first twenty lie near the queries, in the other order.
DOCUMENTS = normalize(
    np.concatenate([QUERIES[::-1] + unit_vectors(2, 20, DIM) / 2, unit_vectors(3, 280, DIM)])
)


def codec_of(precision: VectorPrecision, bit_order: BitOrder = "big") -> Codec:
    return Codec(precision, DIM, RANGES if precision in ("int8", "int4") else None, bit_order)


def coded(vectors: Floats, codec: Codec) -> NDArray[np.generic]:
    return encode_vectors(vectors, codec.precision, codec.ranges, codec.bit_order)


@pytest.mark.parametrize("bit_order", BIT_ORDERS)
@pytest.mark.parametrize(
    ("precision", "error"),
    # Root mean squares; that of signs is about sqrt(1 / DIM).
    [
        ("float32", 1e-6),
        ("int8", 0.004),
        ("int8-symmetric", 0.004),
        ("int4", 0.035),
        ("ubinary", 0.14),
        ("binary", 0.14),
    ],
)
def test_similarity_is_near_the_cosine_of_the_vectors(
    precision: VectorPrecision, error: float, bit_order: BitOrder
) -> None:
    codec = codec_of(precision, bit_order)
    found = codec.similarity(coded(QUERIES, codec), coded(DOCUMENTS, codec))
    assert (found.shape, found.dtype) == ((20, 300), np.float32)
    assert np.sqrt(np.mean((found - QUERIES @ DOCUMENTS.T) ** 2)) < error


@pytest.mark.parametrize("bit_order", BIT_ORDERS)
@pytest.mark.parametrize("precision", VECTOR_PRECISIONS)
def test_search_finds_the_most_similar_documents_first(
    precision: VectorPrecision, bit_order: BitOrder
) -> None:
    codec = codec_of(precision, bit_order)
    queries, documents = coded(QUERIES, codec), coded(DOCUMENTS, codec)
    found = codec.search(queries, documents, top=7)
    similarity = codec.similarity(queries, documents)
    expected = np.argsort(-similarity, axis=1, kind="stable")[:, :7]
    np.testing.assert_array_equal(found.rows, expected)
    np.testing.assert_array_equal(
        found.similarity, np.take_along_axis(similarity, expected, axis=1)
    )
    assert (found.rows[:, 0] == np.arange(20)[::-1]).mean() >= 0.9


@pytest.mark.parametrize("bit_order", BIT_ORDERS)
@pytest.mark.parametrize("precision", ["ubinary", "binary"])
def test_similarity_of_bits_is_their_hamming_distance(
    precision: VectorPrecision, bit_order: BitOrder
) -> None:
    codec = codec_of(precision, bit_order)
    found = codec.similarity(coded(QUERIES, codec), coded(DOCUMENTS, codec))
    distance = ((QUERIES[:, None] > 0) != (DOCUMENTS[None] > 0)).sum(axis=2)
    np.testing.assert_allclose(found, 1 - 2 * distance / DIM, atol=1e-7)
    assert (np.diagonal(codec.similarity(coded(QUERIES, codec), coded(QUERIES, codec))) == 1).all()


@pytest.mark.parametrize("precision", VECTOR_PRECISIONS)
def test_a_query_that_was_not_stored_may_stay_float32(precision: VectorPrecision) -> None:
    codec = codec_of(precision)
    documents = coded(DOCUMENTS, codec)
    found = codec.similarity(3 * QUERIES, documents)
    decoded = normalize(codec.decode(documents))
    np.testing.assert_allclose(found, QUERIES @ decoded.T, atol=1e-6)


def test_candidates_of_bits_are_ranked_again_by_longer_codes() -> None:
    bits, int8 = codec_of("ubinary"), codec_of("int8")
    coarse = bits.search(coded(QUERIES, bits), coded(DOCUMENTS, bits), top=40)
    queries, documents = coded(QUERIES, int8), coded(DOCUMENTS, int8)
    found = int8.search(queries, documents, top=10, candidates=coarse.rows)
    best = int8.search(queries, documents, top=10)
    similarity = int8.similarity(queries, documents)
    for row in range(len(QUERIES)):
        assert set(found.rows[row]) <= set(coarse.rows[row])
        order = sorted(coarse.rows[row], key=lambda i, row=row: -similarity[row, i])
        assert found.rows[row].tolist() == order[:10]
    assert (found.rows[:, 0] == best.rows[:, 0]).mean() >= 0.9
    np.testing.assert_array_equal(
        found.similarity, np.take_along_axis(similarity, found.rows, axis=1)
    )


def test_missing_candidates_come_last() -> None:
    codec = codec_of("int8")
    documents = coded(DOCUMENTS, codec)
    found = codec.search(QUERIES[:1], documents, candidates=np.array([[-1, 5, -1, 19]]))
    assert found.rows.tolist() == [[19, 5, -1, -1]]
    assert (found.similarity[0, 2:] == -np.inf).all()


@pytest.mark.parametrize("precision", VECTOR_PRECISIONS)
def test_equal_documents_tie_and_the_first_comes_first(precision: VectorPrecision) -> None:
    codec = codec_of(precision)
    copies = np.repeat(DOCUMENTS[:7], 3, axis=0)  # at places that a kernel treats differently
    found = codec.search(coded(QUERIES, codec), coded(copies, codec), top=21)
    similarity = codec.similarity(coded(QUERIES, codec), coded(copies, codec))
    for rows, values in zip(found.rows, similarity, strict=True):
        assert (values.reshape(7, 3) == values[::3, None]).all()
        for three in range(0, 21, 3):
            first = rows[three]
            assert rows[three : three + 3].tolist() == [first, first + 1, first + 2]


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 30), st.integers(1, 12))
def test_memory_is_bounded_by_blocks_and_the_result_is_that_of_one_block(
    dim: int, queries: int, documents: int, top: int
) -> None:
    rng = np.random.default_rng(dim)
    bits = rng.integers(0, 255, (documents, -(-dim // 8)), dtype=np.uint8)  # with many ties
    codec = Codec("ubinary", dim)
    left = unit_vectors(top, queries, dim)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("m2dexport.vectors.ranking._DOCUMENT_BLOCK", 4)
        patch.setattr("m2dexport.vectors.ranking._QUERY_BLOCK", 2)
        found = codec.search(left, bits, top)
        similarity = codec.similarity(left, bits)
    whole = codec.search(left, bits, top)
    np.testing.assert_array_equal(found.rows, whole.rows)
    np.testing.assert_array_equal(found.similarity, whole.similarity)
    np.testing.assert_array_equal(similarity, codec.similarity(left, bits))
    assert found.rows.shape == (queries, min(top, documents))


@pytest.mark.parametrize("precision", VECTOR_PRECISIONS)
def test_nothing_is_found_among_no_documents_and_for_no_queries(precision: VectorPrecision) -> None:
    codec = codec_of(precision)
    queries, documents = coded(QUERIES, codec), coded(DOCUMENTS, codec)
    assert codec.decode(documents[:0]).shape == (0, DIM)
    assert codec.similarity(queries, documents[:0]).shape == (20, 0)
    assert codec.similarity(queries[:0], documents).shape == (0, 300)
    assert codec.search(queries, documents[:0]).rows.shape == (20, 0)
    found = codec.search(queries[:0], documents)
    assert found.rows.shape == found.similarity.shape == (0, 10)
    none = np.empty((20, 0), dtype=np.intp)
    assert codec.search(queries, documents, candidates=none).rows.shape == (20, 0)


def test_documents_may_be_a_memory_map(tmp_path: Path) -> None:
    codec = codec_of("int4")
    documents = coded(DOCUMENTS, codec)
    np.save(tmp_path / "index.npy", documents)
    mapped = np.load(tmp_path / "index.npy", mmap_mode="r")
    found = codec.search(QUERIES, mapped)
    np.testing.assert_array_equal(found.rows, codec.search(QUERIES, documents).rows)


@pytest.mark.parametrize("precision", VECTOR_PRECISIONS)
def test_codes_of_another_type_or_width_are_refused(precision: VectorPrecision) -> None:
    codec = codec_of(precision)
    queries, documents = coded(QUERIES, codec), coded(DOCUMENTS, codec)
    for wrong in (documents.astype(np.int64), documents[:, :-1], documents[:0, :-1]):
        for use in (codec.decode, lambda w: codec.search(queries, w)):
            with pytest.raises(UsageError, match=f"{precision} vectors of 50 dims are"):
                use(wrong)
    with pytest.raises(
        UsageError, match=rf"not of shape \({documents.shape[1]},\); for one vector"
    ):
        codec.search(documents[0], documents)
    with pytest.raises(UsageError, match="not of shape"):
        codec.similarity(queries, documents[0])


def test_vectors_that_cannot_be_compared_are_refused() -> None:
    codec, broken = codec_of("float32"), DOCUMENTS.copy()
    broken[3, 1] = np.nan
    with pytest.raises(UsageError, match="vector 3 holds NaN or infinite values"):
        codec.search(QUERIES, broken)
    with pytest.raises(UsageError, match="vector 3 holds NaN or infinite values"):
        codec_of("int8").similarity(broken, coded(DOCUMENTS, codec_of("int8")))


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_ranged_codes_without_their_ranges_are_refused(precision: VectorPrecision) -> None:
    with pytest.raises(UsageError, match=f"{precision} vectors need ranges"):
        Codec(precision, DIM)
    with pytest.raises(UsageError, match="the ranges have 50 dims and the vectors 49"):
        Codec(precision, DIM - 1, RANGES)


@pytest.mark.parametrize(
    ("candidates", "message"),
    [
        (np.array([[300]]), "candidate 300 is not a row of the 300 documents"),
        (np.array([[-2]]), "candidate -2 is not a row"),
        (np.array([[0], [1]]), "an integer array of a row per query"),
        (np.array([0]), "an integer array of a row per query"),
        (np.array([[0.0]]), "not float64 of shape"),
    ],
)
def test_candidates_that_are_not_documents_are_refused(
    candidates: NDArray[np.generic], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        codec_of("float32").search(QUERIES[:1], DOCUMENTS, candidates=candidates)


def test_a_search_for_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="top is 0; ask for 1 document or more"):
        codec_of("float32").search(QUERIES, DOCUMENTS, top=0)
