"""Batches: what shorter texts are filled up with, and a text without tokens."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from m2dexport.batches import encode_tokens, padded
from m2dexport.errors import M2DError


def test_shorter_texts_are_filled_up_and_masked() -> None:
    ids, mask = padded([[5, 6, 7], [8], []], 9)
    assert ids.tolist() == [[5, 6, 7], [8, 9, 9], [9, 9, 9]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0], [1, 0, 0]]
    assert (ids.dtype, mask.dtype) == (np.int64, np.int64)


def test_long_texts_make_smaller_batches() -> None:
    shapes: list[tuple[int, ...]] = []

    def run(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        shapes.append(ids.shape)
        return mask.sum(axis=1, keepdims=True)

    rows = encode_tokens(run, [[1] * 5000, [1] * 4000, [1] * 10], 0, 32)
    assert rows is not None
    assert rows.tolist() == [[5000], [4000], [10]]
    assert shapes[0] == (1, 5000)
    assert shapes[1] == (2, 4000)


def test_a_text_without_tokens_is_one_pad_token() -> None:
    seen = []
    encode_tokens(lambda ids, mask: seen.append((ids, mask)) or ids, [[]], 7, 32)  # type: ignore[func-returns-value]
    assert [array.tolist() for array in seen[0]] == [[[7]], [[1]]]


@pytest.mark.parametrize(("batch_size", "workers"), [(4, 2), (32, 3), (1, 8), (32, 1)])
def test_workers_change_no_row_and_no_order(batch_size: int, workers: int) -> None:
    ids = [[number] * (1 + number % 5) for number in range(1, 12)]
    rows = encode_tokens(lambda given, mask: given[:, :1], ids, 0, batch_size, workers)
    assert rows is not None
    assert rows[:, 0].tolist() == [text[0] for text in ids]


@pytest.mark.parametrize("workers", [1, 2, 9])
def test_which_texts_run_together_does_not_depend_on_workers(workers: int) -> None:
    shapes: list[tuple[int, ...]] = []

    def run(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        shapes.append(ids.shape)
        return ids[:, :1]

    encode_tokens(run, [[1] * length for length in range(1, 12)], 0, 4, workers)
    assert sorted(shapes) == [(3, 3), (4, 7), (4, 11)]


def test_batches_run_at_once_where_there_are_workers() -> None:
    together = threading.Barrier(2, timeout=20)

    def run(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        together.wait()  # broken unless two batches are here at a time
        return ids

    rows = encode_tokens(run, [[1], [2]], 0, 1, workers=2)
    assert rows is not None
    assert rows.tolist() == [[1], [2]]


def test_a_batch_that_fails_in_a_worker_fails_the_list_and_the_rest_is_left_out() -> None:
    seen = []

    def run(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        seen.append(ids)
        raise M2DError("no memory")

    with pytest.raises(M2DError, match="no memory"):
        encode_tokens(run, [[1]] * 100, 0, 1, workers=2)
    assert len(seen) < 100
