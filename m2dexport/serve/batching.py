"""One thread runs the model; what waits for it runs together, as far as it is of like length.

Nothing is delayed so that a batch fills: a text that finds the model idle runs at once, and what
arrives meanwhile makes the next batch. Each request has one part of its texts in the queue at a
time, so that a long one does not hold up those that come after it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m2dexport.runtime.encoder import Encoder

_TEXTS, _TOKENS = 32, 8192  # of a batch at most, padding included
_SHORT = 16  # tokens: texts up to that cost about the same

Ids = Sequence[Sequence[int]]


@dataclass(frozen=True, eq=False)
class _Part:
    """Texts of one request and of like length, which run in one batch."""

    encoder: Encoder
    ids: Ids
    length: int  # tokens that each is padded to at most
    vectors: asyncio.Future[NDArray[Any]]  # cancelled once nobody waits for them


class Batcher:
    """A queue and the thread that works it off; all methods belong to one event loop.

    Args:
        on_batch: called with the number of texts of every batch that runs.
    """

    def __init__(self, on_batch: Callable[[int], None]) -> None:
        self._on_batch = on_batch
        self._waiting: deque[_Part] = deque()
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, "encode")

    @property
    def waiting(self) -> int:
        """Texts that wait for their turn."""
        return sum(len(part.ids) for part in self._waiting)

    async def encode(self, encoder: Encoder, ids: Ids) -> NDArray[Any]:
        """Return the vectors of token ids, in order, as ``Encoder.encode_ids`` does.

        Whoever cancels this takes back what has not begun.

        Raises:
            M2DError: when the graph fails.
        """
        found: list[tuple[list[int], NDArray[Any]]] = []
        for length, chosen in _parts(ids):
            future = asyncio.get_running_loop().create_future()
            part = _Part(encoder, [ids[index] for index in chosen], length, future)
            self._waiting.append(part)
            self._arrived.set()
            found.append((chosen, await part.vectors))
        first = found[0][1]
        vectors = np.empty((len(ids), *first.shape[1:]), first.dtype)
        for chosen, rows in found:
            vectors[chosen] = rows
        return vectors

    async def work(self) -> None:
        """Run what waits, and what comes, until cancelled."""
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            while batch := self._take():
                await self._run(batch)

    def _take(self) -> list[_Part]:
        """Take the next batch from the queue: its first part, and others of the same length."""
        batch: list[_Part] = []
        left: deque[_Part] = deque()
        room = 0
        for part in self._waiting:
            if part.vectors.done():  # nobody waits for it any more
                continue
            if not batch:
                batch, room = [part], _room_beside(part)
            elif _alike(part, batch[0]) and len(part.ids) <= room:
                batch.append(part)
                room -= len(part.ids)
            else:
                left.append(part)
        self._waiting = left
        return batch

    async def _run(self, batch: list[_Part]) -> None:
        ids = [each for part in batch for each in part.ids]
        encode, loop = batch[0].encoder.encode_ids, asyncio.get_running_loop()
        self._on_batch(len(ids))
        try:
            rows = await loop.run_in_executor(self._thread, encode, ids)
        except Exception as error:  # of any engine: whoever waits is told, and the queue goes on
            for part in batch:
                if not part.vectors.done():
                    part.vectors.set_exception(error)
            return
        start = 0
        for part in batch:
            end = start + len(part.ids)
            if not part.vectors.done():
                part.vectors.set_result(rows[start:end])
            start = end


def _alike(first: _Part, second: _Part) -> bool:
    return first.length == second.length and first.encoder is second.encoder


def _room_beside(part: _Part) -> int:
    """Return how many texts of others may run in its batch."""
    return _most(part.length) - len(part.ids) if part.encoder.spec.batch_invariant else 0


def _parts(ids: Ids) -> Iterator[tuple[int, list[int]]]:
    """Yield lengths, and the texts (their indices) that are padded to that at most."""
    lengths = [_rounded(len(each)) for each in ids]
    order = sorted(range(len(ids)), key=lengths.__getitem__)
    for length, group in groupby(order, key=lengths.__getitem__):
        chosen = list(group)
        most = _most(length)
        yield from ((length, chosen[i : i + most]) for i in range(0, len(chosen), most))


def _rounded(tokens: int) -> int:
    """Return the next power of two, so that padding at most doubles a text."""
    return max(_SHORT, 1 << (tokens - 1).bit_length())


def _most(length: int) -> int:
    """Return how many texts of a length run together at most."""
    return max(1, min(_TEXTS, _TOKENS // length))
