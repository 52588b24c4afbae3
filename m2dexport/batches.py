"""Token ids in padded batches, as a graph takes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m2dexport.cores import side_by_side

#: A batch holds at most this many tokens, padding included: longer texts make smaller batches.
TOKENS_PER_BATCH = 8192


def padded(
    ids: Sequence[Sequence[int]], pad_id: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the ids and the attention mask of a batch, int64 (texts, longest text) each.

    A text without any token (a decoder's empty string) is one pad token that is attended to: there
    must be something to pool.

    Args:
        ids: the token ids of each text, at least one text.
        pad_id: the id behind shorter texts, where the mask is 0.
    """
    width = max(1, max(map(len, ids), default=0))
    input_ids = np.full((len(ids), width), pad_id, dtype=np.int64)
    mask = np.zeros((len(ids), width), dtype=np.int64)
    for row, text in enumerate(ids):
        input_ids[row, : len(text)] = text
        mask[row, : max(1, len(text))] = 1
    return input_ids, mask


def encode_tokens(
    run: Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[Any]],
    ids: Sequence[Sequence[int]],
    pad_id: int,
    batch_size: int,
    workers: int = 1,
    empty: Callable[[tuple[int, ...], Any], NDArray[Any]] = np.empty,
) -> NDArray[Any] | None:
    """Run token ids in batches of similar length; one output row per text, in the given order.

    Args:
        run: from int64 (batch, sequence) ids and mask to an array of ``batch`` rows.
        ids: the token ids of each text.
        pad_id: the id that fills a batch up to its longest text.
        batch_size: texts run together at most.
        workers: batches that run at once, each in a thread of its own while this call lasts; which
            texts run together does not depend on it.
        empty: from shape and dtype to the array that rows are written to.

    Returns:
        The rows, or None when there are no texts.
    """
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]), reverse=True)
    batches = list(_batches(order, ids, batch_size))

    def rows_of(batch: list[int]) -> NDArray[Any]:
        return run(*padded([ids[index] for index in batch], pad_id))

    # The threads are this call's: a process may fork between two.
    outputs = side_by_side(rows_of, batches, min(workers, max(1, len(batches))))
    return _in_order(batches, outputs, len(ids), empty)


def _in_order(
    batches: Sequence[list[int]],
    outputs: Iterable[NDArray[Any]],
    count: int,
    empty: Callable[[tuple[int, ...], Any], NDArray[Any]],
) -> NDArray[Any] | None:
    """Return the rows of all batches, each where its text stands."""
    result: NDArray[Any] | None = None
    for batch, rows in zip(batches, outputs, strict=True):
        if result is None:
            result = empty((count, *rows.shape[1:]), rows.dtype)
        result[batch] = rows
    return result


def _batches(
    order: Sequence[int], ids: Sequence[Sequence[int]], batch_size: int
) -> Iterator[list[int]]:
    start = 0
    while start < len(order):
        longest = max(1, len(ids[order[start]]))
        size = max(1, min(batch_size, TOKENS_PER_BATCH // longest))
        yield list(order[start : start + size])
        start += size
