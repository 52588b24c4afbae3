"""The queue of a server: what runs together, in which order, and what is dropped."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from m2dexport.errors import M2DError
from m2dexport.serve.batching import Batcher


class HeldEncoder:
    """Gives each text its first token, once the test lets it; notes what ran together."""

    def __init__(self, *, batch_invariant: bool = True) -> None:
        self.spec = SimpleNamespace(batch_invariant=batch_invariant)
        self.batches: list[list[int]] = []
        self.free = threading.Event()
        self.error: M2DError | None = None

    def encode_ids(self, ids: Sequence[Sequence[int]]) -> NDArray[Any]:
        self.free.wait(10)
        self.batches.append([each[0] for each in ids])
        if self.error:
            raise self.error
        return np.array([[each[0]] for each in ids], np.float32)


class Held:
    """A batcher at work, whose first batch is held until ``finish``."""

    def __init__(self, encoder: HeldEncoder) -> None:
        self.encoder = encoder
        self.ran: list[int] = []  # texts of each batch
        self.batcher = Batcher(self.ran.append)
        self.worker = asyncio.ensure_future(self.batcher.work())

    async def ask(self, *ids: Sequence[int]) -> asyncio.Future[NDArray[Any]]:
        asked = asyncio.ensure_future(self.batcher.encode(self.encoder, ids))
        await asyncio.sleep(0.01)  # until it is in the queue
        return asked

    async def finish(self, *asked: asyncio.Future[NDArray[Any]]) -> list[Any]:
        self.encoder.free.set()
        found = await asyncio.gather(*asked, return_exceptions=True)
        self.worker.cancel()
        return [each if isinstance(each, BaseException) else each[:, 0].tolist() for each in found]


def test_what_waits_runs_together_and_everyone_gets_their_own() -> None:
    async def scene() -> None:
        held = Held(HeldEncoder())
        first = await held.ask([1])
        others = [await held.ask([2], [3]), await held.ask([4])]
        assert held.batcher.waiting == 3
        assert await held.finish(first, *others) == [[1], [2, 3], [4]]
        assert held.encoder.batches == [[1], [2, 3, 4]]
        assert held.ran == [1, 3]
        assert held.batcher.waiting == 0

    asyncio.run(scene())


def test_texts_of_different_length_run_apart_and_come_back_in_order() -> None:
    async def scene() -> None:
        held = Held(HeldEncoder())
        long, short = [9] * 200, [8] * 20
        first = await held.ask([1])
        mixed = await held.ask(long, [2], short, [3])
        other = await held.ask([4])
        assert await held.finish(first, mixed, other) == [[1], [9, 2, 8, 3], [4]]
        assert held.encoder.batches == [[1], [2, 3, 4], [8], [9]]

    asyncio.run(scene())


def test_a_batch_has_at_most_32_texts_and_8192_tokens() -> None:
    async def scene() -> None:
        held = Held(HeldEncoder())
        many = await held.ask(*([n] for n in range(70)), *([n] * 2000 for n in range(9)))
        await held.finish(many)
        assert held.ran == [32, 32, 6, 4, 4, 1]

    asyncio.run(scene())


def test_a_long_request_lets_those_that_come_later_through() -> None:
    async def scene() -> None:
        held = Held(HeldEncoder())
        long = await held.ask(*([n] for n in range(320)))
        late = await held.ask(*([1000 + n] for n in range(20)))
        await held.finish(long, late)
        assert [len(batch) for batch in held.encoder.batches[:2]] == [32, 20]

    asyncio.run(scene())


def test_what_nobody_waits_for_any_more_does_not_run() -> None:
    async def scene() -> None:
        held = Held(HeldEncoder())
        first, gone, other = [await held.ask([number]) for number in (1, 2, 3)]
        gone.cancel()
        found = await held.finish(first, gone, other)
        assert [found[0], found[2]] == [[1], [3]]
        assert isinstance(found[1], asyncio.CancelledError)
        assert held.encoder.batches == [[1], [3]]

    asyncio.run(scene())


def test_requests_of_a_batch_dependent_model_run_one_by_one() -> None:
    async def scene() -> None:
        held = Held(HeldEncoder(batch_invariant=False))
        asked = [await held.ask([number]) for number in (1, 2, 3)]
        await held.finish(*asked)
        assert held.encoder.batches == [[1], [2], [3]]

    asyncio.run(scene())


def test_a_reloaded_model_does_not_run_what_was_tokenized_for_the_old_one() -> None:
    async def scene() -> None:
        held = Held(HeldEncoder())
        old, new = held.encoder, HeldEncoder()
        new.free.set()
        asked = [await held.ask([1]), await held.ask([2])]
        held.encoder = new
        asked.append(await held.ask([3]))
        held.encoder = old
        assert await held.finish(*asked) == [[1], [2], [3]]
        assert (old.batches, new.batches) == ([[1], [2]], [[3]])

    asyncio.run(scene())


def test_a_failed_batch_tells_all_of_it_and_the_queue_goes_on() -> None:
    async def scene() -> None:
        held = Held(HeldEncoder())
        held.encoder.error = M2DError("the graph failed.")
        failed = await held.ask([1])
        held.encoder.free.set()
        with pytest.raises(M2DError, match="the graph failed"):
            await failed
        held.encoder.error = None
        assert await held.finish(await held.ask([2])) == [[2]]

    asyncio.run(scene())
