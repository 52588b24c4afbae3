"""Batches: what shorter texts are filled up with, and a text without tokens."""

from __future__ import annotations

import numpy as np

from m2dexport.batches import encode_tokens, padded


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
