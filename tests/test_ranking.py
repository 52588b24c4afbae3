"""Exact search and rescoring, against each other and by hand."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from m2dexport.vectors.ranking import rank, rescore


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


def test_rescoring_finds_nothing_that_is_no_candidate() -> None:
    documents = np.array([[3], [2], [1]], np.float32)
    found = rescore(np.ones((1, 1), np.float32), documents, np.array([[2, 1]]), 1)
    assert found.tolist() == [[1]]
