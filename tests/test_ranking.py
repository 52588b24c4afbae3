"""Exact search and rescoring, against each other and by hand."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m2dexport.vectors import codecs, ranking
from m2dexport.vectors.ranking import NO_ROW, nearest, nearest_among, rank, rescore, rounded


def test_the_best_come_first_and_ties_go_by_row() -> None:
    documents = np.array([[1, 0], [0, 1], [1, 0], [2, 0]], np.float32)
    queries = np.array([[1, 0], [0, 1]], np.float32)
    assert rank(queries, documents, 3).tolist() == [[3, 0, 2], [1, 0, 2]]


def test_few_documents_make_short_rankings() -> None:
    documents = np.eye(3, dtype=np.float32)
    candidates = rank(documents[:2], documents, 40)
    assert candidates.shape == (2, 3)
    assert rescore(documents[:2], documents, candidates, 10).shape == (2, 3)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 20), st.integers(0, 1000))
def test_rescoring_everything_is_exact_search(
    queries: int, documents: int, count: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    left, right = (
        rng.integers(-9, 9, (rows, 8)).astype(np.float32) for rows in (queries, documents)
    )
    everything = np.tile(np.arange(documents), (queries, 1))  # by row, as ties go
    np.testing.assert_array_equal(rescore(left, right, everything, count), rank(left, right, count))


_ROWS = st.lists(st.lists(st.integers(-1, 1), min_size=3, max_size=3), min_size=1, max_size=24)


def table(rows: list[list[int]]) -> np.ndarray:  # type: ignore[type-arg]
    return np.array(rows, dtype=np.float32)


@settings(deadline=None)
@given(_ROWS, _ROWS, st.integers(1, 30), st.data())
def test_a_ranking_is_that_of_a_plain_loop_however_many_documents_tie(
    left: list[list[int]], right: list[list[int]], count: int, data: st.DataObject
) -> None:
    own = data.draw(
        st.lists(st.integers(NO_ROW, len(right) - 1), min_size=len(left), max_size=len(left))
    )
    places = min(count, len(right))
    plain, without_own = [], []
    for query, left_out in zip(left, own, strict=True):
        product = [sum(a * b for a, b in zip(query, row, strict=True)) for row in right]
        order = sorted(range(len(right)), key=lambda row: (-product[row], row))
        plain.append(order[:count])
        others = [row for row in order if row != left_out]
        without_own.append([*others, *[NO_ROW] * len(right)][:places])
    assert rank(table(left), table(right), count).tolist() == plain
    found = rank(table(left), table(right), count, np.array(own))
    assert found.tolist() == without_own


@settings(deadline=None)
@given(_ROWS, _ROWS, st.integers(1, 30), st.data())
def test_rescored_candidates_are_those_of_a_plain_loop(
    left: list[list[int]], right: list[list[int]], count: int, data: st.DataObject
) -> None:
    """With many ties, places without a candidate, and in either way of computing products."""
    width = data.draw(st.integers(1, 30))
    rows = st.lists(st.integers(NO_ROW, len(right) - 1), min_size=width, max_size=width)
    given_rows = data.draw(st.lists(rows, min_size=len(left), max_size=len(left)))
    expected = []
    for query, candidates in zip(left, given_rows, strict=True):
        product = [sum(a * b for a, b in zip(query, row, strict=True)) for row in right]
        worth = {row: product[row] for row in candidates if row != NO_ROW}
        order = sorted(range(width), key=lambda at: -worth.get(candidates[at], -np.inf))
        expected.append([candidates[at] for at in order][:count])
    for few in (0, 2048):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ranking, "_FEW", few)
            found = rescore(table(left), table(right), np.array(given_rows), count)
        assert found.tolist() == expected


def test_equal_documents_tie_across_blocks_of_queries_and_documents() -> None:
    documents = np.ones((9000, 2), np.float32)  # more than a block
    queries = np.ones((300, 2), np.float32)
    expected = np.tile(np.arange(7), (300, 1))
    np.testing.assert_array_equal(rank(queries, documents, 7), expected)
    everything = np.tile(np.arange(30)[::-1], (300, 1))
    found = nearest_among(queries, lambda rows: documents[rows], everything, 7)
    np.testing.assert_array_equal(found.rows, rescore(queries, documents, everything, 7))
    np.testing.assert_array_equal(found.rows, everything[:, :7])


@pytest.mark.parametrize("kind", ["unit", "signs", "nearly equal", "some zero", "repeated"])
def test_a_ranking_over_many_blocks_is_that_of_one_product(kind: str) -> None:
    """Float32 products leave out none of the best, however near to them the others are."""
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((25_000, 24))
    if kind == "nearly equal":  # by less than float32 tells apart
        vectors = 1 + 3e-7 * vectors
    if kind == "repeated":
        vectors = vectors[rng.integers(0, 900, len(vectors))]
    if kind == "some zero":
        vectors[::2] = 0
    documents = codecs.normalize(vectors.astype(np.float32))
    if kind == "signs":
        documents = np.where(vectors > 0, 1, -1).astype(np.float32)
    queries = documents[rng.integers(0, len(documents), 100)]
    products = rounded(queries) @ rounded(documents).T
    expected = np.argsort(-products, axis=1, kind="stable")[:, :20]
    found = nearest(queries, np.split(documents, [8000, 15_000, 15_007]), 20)
    np.testing.assert_array_equal(found.rows, expected)
    np.testing.assert_array_equal(found.similarity, np.take_along_axis(products, expected, 1))
    np.testing.assert_array_equal(rank(rounded(queries), documents, 20), expected)


def test_rescoring_finds_nothing_that_is_no_candidate() -> None:
    documents = np.array([[3], [2], [1]], np.float32)
    found = rescore(np.ones((1, 1), np.float32), documents, np.array([[2, 1]]), 1)
    assert found.tolist() == [[1]]


def test_documents_that_are_left_out_are_not_ranked() -> None:
    documents = np.eye(3, dtype=np.float32)
    found = rank(documents, documents, 2, np.array([0, NO_ROW, 2]))
    assert found.tolist() == [[1, 2], [1, 0], [0, 1]]
    found = rank(documents, documents, 9, np.array([0, NO_ROW, 2]))
    assert found.tolist() == [[1, 2, NO_ROW], [1, 0, 2], [0, 1, NO_ROW]]


def test_a_place_without_a_candidate_stays_last() -> None:
    documents = -np.eye(3, dtype=np.float32)  # what is there has no larger product than 0
    found = rescore(documents[:1], documents, np.array([[NO_ROW, 2, NO_ROW, 0]]), 3)
    assert found.tolist() == [[0, 2, NO_ROW]]


def test_products_are_exact_whatever_the_order_of_their_sums() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((40, 1024)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    values = rounded(vectors)
    assert np.abs(values - vectors).max() <= 2.0**-27
    np.testing.assert_array_equal(rank(values, vectors, 7), rank(vectors, vectors, 7))
    products = nearest(vectors[:1], [vectors], 40)
    for row, product in zip(products.rows[0], products.similarity[0], strict=True):
        terms = zip(values[0].tolist(), values[row].tolist(), strict=True)
        assert product == sum(Fraction(a) * Fraction(b) for a, b in terms)
    backwards = values[:, ::-1] @ values[:, ::-1].T
    np.testing.assert_array_equal(values @ values.T, backwards)


def unit_rows(rows: int, rng: np.random.Generator) -> np.ndarray:  # type: ignore[type-arg]
    return codecs.normalize(rng.standard_normal((rows, 24)).astype(np.float32))


def sign_rows(rows: int, rng: np.random.Generator) -> np.ndarray:  # type: ignore[type-arg]
    return np.sign(unit_rows(rows, rng))


@pytest.mark.parametrize("documents", [1, 2, 46, 256, 257, 700])
@pytest.mark.parametrize("sides", [*itertools.product((unit_rows, sign_rows), repeat=2)])
def test_few_documents_are_ordered_as_a_stable_sort_of_their_products_has_them(
    sides, documents: int
) -> None:
    rng = np.random.default_rng(documents)
    left, right = sides[0](30, rng), sides[1](documents, rng)
    right[::5] = right[0]  # tie
    products = rounded(left) @ rounded(right).T
    for count in (1, 10, 40):
        found = nearest(left, [right], count)
        order = np.argsort(-products, axis=1, kind="stable")[:, :count]
        np.testing.assert_array_equal(found.rows, order)
        np.testing.assert_array_equal(found.similarity, np.take_along_axis(products, order, axis=1))


_REPRODUCED = """
import hashlib
import numpy as np
from m2dexport.vectors import codecs, ranking
rng = np.random.default_rng(0)
vectors = codecs.truncate(rng.standard_normal((3001, 390)).astype(np.float32), 384)
vectors[2990] = vectors[1234] = vectors[3]
ranges = codecs.calibrate_ranges(vectors)
print(ranges.sha256(), codecs.held_out_clipping_rate(vectors))
print(hashlib.sha256(vectors.tobytes()).hexdigest())
rows = ranking.rank(vectors[:300], vectors, 3001)
print(hashlib.sha256(rows.tobytes()).hexdigest())
print(hashlib.sha256(ranking.rescore(vectors[:9], vectors, rows[:9], 3001).tobytes()).hexdigest())
print(rows[3, :3])
"""


def test_rankings_and_ranges_do_not_depend_on_the_number_of_threads() -> None:
    found = set()
    for threads in ("1", "2"):
        names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
        environment = {**os.environ, **dict.fromkeys(names, threads)}
        command = [sys.executable, "-c", _REPRODUCED]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        found.add(run.stdout)
    assert len(found) == 1
    assert found.pop().endswith("[   3 1234 2990]\n")
