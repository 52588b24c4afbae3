"""From a bundle to a running server: the port, the signals, the stop."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from m2dexport.engines import Device
from m2dexport.errors import M2DError, UsageError, one_line
from m2dexport.serve.app import Service, make_app
from m2dexport.serve.connections import Connection, most_connections, say_no_more_files
from m2dexport.serve.messages import Limits
from m2dexport.serve.reloading import Reloading
from m2dexport.serve.served import Served, open_served

_IDLE_S = 75  # for which a connection is kept; longer than proxies do, so that they close first
#: After the port is closed: a request that is on its way on an open connection still arrives.
_LINGER_S = 0.2
_LOOK_EVERY_S = 0.02
_WAITING = 2048  # connections that the kernel has, and the server not yet
_ACCEPTED_AT_ONCE = 4  # before those are counted that came before
_CANCELLED_WITHIN_S = 2  # what is left after the limit of a stop


@dataclass(frozen=True)
class Settings:
    """How a server runs."""

    host: str = "127.0.0.1"
    port: int = 8080  # 0: any that is free
    limits: Limits = Limits()
    cell: str | None = None  # of a nested bundle; None: the default
    watch: bool = False  # whether the bundle is loaded again when its file is replaced
    allow_new_space: bool = False  # whether a reload may change the space of the vectors
    stop_within_s: float = 30  # that a stop gives to requests at work
    access_log: bool = False  # a line per request on stderr


@dataclass(frozen=True)
class Listening:
    """A server that takes requests."""

    url: str  # for the ``base_url`` of OpenAI's clients
    served: Served


def serve(
    path: Path,
    device: Device,
    settings: Settings,
    on_ready: Callable[[Listening], None],
    on_news: Callable[[str], None],
) -> None:
    """Serve a bundle until SIGTERM or SIGINT; SIGHUP loads it again.

    A stop closes the port, answers all that has come, and returns; a second signal ends the wait.

    Args:
        path: the bundle or the artifact folder.
        device: what to run it on; what it leaves open is as the artifact says.
        settings: how to serve it.
        on_ready: called once requests are taken.
        on_news: called with a sentence about every reload.

    Raises:
        UsageError: when the port cannot be had.
        OSError: when ``on_ready`` raises it.
        M2DError: when the bundle does not verify, or requests were still at work at a second signal
            or at the end of the time that a stop gives them.
    """
    with _early_hangups() as hangups, _listener(settings.host, settings.port) as listener:
        opened = functools.partial(open_served, path, device, settings.cell)
        served = opened()
        service = Service(served, settings.limits)
        host, port = listener.getsockname()[:2]
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
        reloading = Reloading(service, path, opened, settings.allow_new_space, on_news)
        app = make_app(service, reloading.watch if settings.watch else None)
        ready = functools.partial(on_ready, Listening(url, served))
        events = _Events(ready, on_news, reloading.reload, hangups)
        server = _Server(_config(app, settings), service, settings, events)
        server.run([listener])
    if server.failed:
        raise server.failed
    if server.abandoned:
        requests = "request was" if server.abandoned == 1 else "requests were"
        when = f"{settings.stop_within_s:g} s after the stop"
        remedy = "allow more time with --stop-within"
        if server.hurried:
            when, remedy = "at the second signal", "one signal waits for them"
        raise M2DError(f"{server.abandoned} {requests} not done {when} and got an error; {remedy}.")


@contextlib.contextmanager
def _early_hangups() -> Iterator[list[int]]:
    """Collect SIGHUPs, which would end a process that still loads."""
    came: list[int] = []
    if not hasattr(signal, "SIGHUP"):  # which Windows has not
        yield came
        return
    before = signal.signal(signal.SIGHUP, lambda number, _: came.append(number))
    try:
        yield came
    finally:
        signal.signal(signal.SIGHUP, before)


@dataclass(frozen=True)
class _Events:
    """What a server calls."""

    on_ready: Callable[[], None]
    on_news: Callable[[str], None]
    on_hangup: Callable[[], Awaitable[None]]
    hangups: list[int]  # that came before it could handle them


class _Server(uvicorn.Server):
    """uvicorn, with a stop that loses nothing, SIGHUP, and exit status 0 after a signal."""

    def __init__(
        self,
        config: uvicorn.Config,
        service: Service,
        settings: Settings,
        events: _Events,
    ) -> None:
        super().__init__(config)
        self.abandoned = 0  # requests that the stop did not wait for
        self.hurried = False  # whether a second signal came
        self.failed: OSError | None = None  # what kept it from saying that it is ready
        self._service = service
        self._stop_within_s = settings.stop_within_s
        self._events = events
        self._reloads: set[asyncio.Future[None]] = set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(say_no_more_files(self._events.on_news))
        await super().startup(sockets)
        for listener in sockets or []:
            listener.listen(_WAITING)  # of which asyncio takes no more at once than it was told
        if self._events.hangups:
            self._reload()
        try:
            self._events.on_ready()
        except OSError as error:  # of stdout: stop in order first
            self.failed, self.should_exit = error, True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        handlers: dict[int, Callable[..., object]] = {
            signal.SIGINT: self.handle_exit,
            signal.SIGTERM: self.handle_exit,
        }
        if hasattr(signal, "SIGHUP"):
            handlers[signal.SIGHUP] = lambda *_: loop.call_soon_threadsafe(self._reload)
        before = {number: signal.signal(number, handlers[number]) for number in handlers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop, and at the second signal without waiting for the requests at work."""
        self.hurried = self.should_exit
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the port, answer what has come, and only then close the connections.

        From here on every answer says that its connection closes, so that a client that is at work
        does not send its next request into a connection that is being closed.
        """
        for server in self.servers:
            server.close()
        self._service.stopping = True
        deadline = asyncio.get_running_loop().time() + self._stop_within_s
        await asyncio.sleep(_LINGER_S)
        while self._service.at_work and not self.hurried:
            if asyncio.get_running_loop().time() >= deadline:
                break
            await asyncio.sleep(_LOOK_EVERY_S)
        self.abandoned = self._service.abandon()
        await super().shutdown(sockets)

    def _reload(self) -> None:
        reload = asyncio.ensure_future(self._events.on_hangup())
        self._reloads.add(reload)  # else nothing holds it
        reload.add_done_callback(self._reloads.discard)


def _config(app: Starlette, settings: Settings) -> uvicorn.Config:
    if settings.access_log:
        log = logging.getLogger("uvicorn.access")
        log.addHandler(logging.StreamHandler(sys.stderr))
        log.setLevel(logging.INFO)
        log.propagate = False
    # Nor a line for every request that is refused or is not HTTP, of which anybody can send many.
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    return uvicorn.Config(
        app,
        http=Connection,
        loop="asyncio",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=settings.access_log,
        proxy_headers=False,
        server_header=False,
        backlog=_ACCEPTED_AT_ONCE,
        limit_concurrency=most_connections(settings.limits.requests),
        timeout_keep_alive=_IDLE_S,
        timeout_graceful_shutdown=_CANCELLED_WITHIN_S,
    )


def _listener(host: str, port: int) -> socket.socket:
    """Return a socket that listens on a port, so that connections wait until they are taken.

    Raises:
        UsageError: when it cannot be had.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        family, kind, protocol, _, address = found[0]
        # With the protocol: asyncio switches Nagle's delay off only where it is named.
        listener = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:  # the latter of a name that DNS cannot have
        raise UsageError(
            f"--host {one_line(host)} is no address of this machine: {one_line(error)}."
        ) from error
    try:
        if sys.platform != "win32":  # where it means something else
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_WAITING)  # before anything is loaded: of two servers, one has the port
    except OSError as error:
        listener.close()
        reason = one_line(error.strerror or error)
        raise UsageError(
            f"port {port} of {host} cannot be had: {reason}; choose another --port, or 0 for any "
            "that is free."
        ) from error
    return listener
