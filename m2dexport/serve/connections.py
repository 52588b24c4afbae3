"""Connections to a server: how many there are, and for how long one may say nothing."""

from __future__ import annotations

import asyncio
import errno
import sys
import time
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

if sys.platform != "win32":
    import resource

HEAD_WITHIN_S = 10  # from a connection, or the first byte on it after an answer, to a whole head
TAKES_WITHIN_S = 60  # of a client: any part of what is to be sent to it
_MOST, _LEAST = 1024, 8
_OTHER_FILES = 40  # that the process opens: its bundle, and what was accepted and is not counted
_SAID_EVERY_S = 60
_NO_MORE_FILES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


def most_connections(requests: int) -> int:
    """Return how many connections there may be, as far as this process may open files.

    Args:
        requests: how many may be at work at once.
    """
    wanted = max(_MOST, 2 * requests)
    if sys.platform == "win32":
        return wanted
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files == resource.RLIM_INFINITY:
        return wanted
    return max(_LEAST, min(wanted, files - _OTHER_FILES))


class Connection(H11Protocol):
    """uvicorn's, closed when the head of a request does not come, or an answer is not taken.

    Where there are as many connections as uvicorn's ``limit_concurrency``, a new one takes the
    place of the one that has been idle for longest. Where none is idle, uvicorn refuses it.
    """

    _idle_since = 0.0
    _head: asyncio.TimerHandle | None = None  # closes it when the head is late
    _taking: asyncio.TimerHandle | None = None  # closes it when nothing of an answer is taken

    @property
    def idle(self) -> bool:
        """Whether no request is at work on it."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Make room for it, and wait for the head of its first request."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(0)  # pauses wherever the client has not taken everything
        self._idle_since = self.loop.time()
        self._head = self.loop.call_later(HEAD_WITHIN_S, self._close_idle)
        if self.limit_concurrency and len(self.connections) >= self.limit_concurrency:
            self._take_a_place()

    def data_received(self, data: bytes) -> None:
        """Wait for the rest of a head, or for no more once it is there."""
        super().data_received(data)
        if not self.idle:
            self._wait_no_more()
        elif self._head is None:
            self._head = self.loop.call_later(HEAD_WITHIN_S, self._close_idle)

    def on_response_complete(self) -> None:
        """Note since when it is idle."""
        super().on_response_complete()
        self._idle_since = self.loop.time()

    def pause_writing(self) -> None:
        """Wait for the client to take what is to be sent."""
        super().pause_writing()
        self._wait_until_taken()

    def resume_writing(self) -> None:
        """Wait no more: it has taken everything."""
        self._stop_taking()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait for nothing."""
        self._wait_no_more()
        self._stop_taking()
        super().connection_lost(exc)

    def _wait_no_more(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None

    def _wait_until_taken(self) -> None:
        left = self.transport.get_write_buffer_size()
        self._taking = self.loop.call_later(TAKES_WITHIN_S, self._close_stuck, left)

    def _close_stuck(self, left: int) -> None:
        if self.transport.get_write_buffer_size() < left:
            self._wait_until_taken()  # slow, which is not stuck
        else:
            self.transport.abort()

    def _stop_taking(self) -> None:
        if self._taking is not None:
            self._taking.cancel()
            self._taking = None

    def _close_idle(self) -> None:
        if self.idle:
            self.transport.abort()

    def _take_a_place(self) -> None:
        others = [
            each
            for each in self.connections
            if isinstance(each, Connection)
            and each is not self
            and each.idle
            and not each.flow.write_paused
            and not each.transport.is_closing()
        ]
        if others:
            min(others, key=lambda each: each._idle_since).transport.abort()


def say_no_more_files(
    on_news: Callable[[str], None],
) -> Callable[[asyncio.AbstractEventLoop, dict[str, Any]], None]:
    """Return what an event loop does with errors: one line a minute where files have run out.

    Args:
        on_news: called with that line.
    """
    said = -float(_SAID_EVERY_S)

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        nonlocal said
        error = context.get("exception")
        if not isinstance(error, OSError) or error.errno not in _NO_MORE_FILES:
            loop.default_exception_handler(context)
        elif time.monotonic() - said >= _SAID_EVERY_S:
            said = time.monotonic()
            on_news(
                f"no connection can be taken now: {error.strerror}; allow more open files "
                "(ulimit -n)."
            )

    return handle
