"""serve: clients that say nothing, signals that come twice, and options that make no sense."""

from __future__ import annotations

import asyncio
import re
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, closing, suppress
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import uvicorn
from command_line import m2d
from live_server import live
from tiny_artifact import tiny_artifact

from m2dexport.engines import Device
from m2dexport.errors import UsageError
from m2dexport.runtime.bundle import write_bundle
from m2dexport.serve import connections
from m2dexport.serve.app import Service
from m2dexport.serve.connections import Connection, say_no_more_files
from m2dexport.serve.messages import Limits
from m2dexport.serve.reloading import Reloading
from m2dexport.serve.served import open_served
from m2dexport.serve.server import _listener


@pytest.fixture(scope="module")
def edge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny bundle; read only."""
    folder = tmp_path_factory.mktemp("limits")
    return write_bundle(tiny_artifact(folder / "artifact"), folder / "edge.m2d").path


def test_silent_clients_leave_room_for_others(edge: Path) -> None:
    """120 of them on 64 open files stopped the server, which wrote 44 MB of tracebacks."""
    with live(edge, "--threads", 1, files=64) as server, ExitStack() as open_clients:
        place = urlsplit(server.url)
        for number in range(120):
            client = socket.create_connection((place.hostname, place.port), timeout=10)
            open_clients.enter_context(client)
            if number % 2:
                client.sendall(b"POST /v1/embeddings HTTP/1.1\r\nhost: ")
        assert server.request("/healthz").status == 200
        assert server.embed("a guitar").status == 200
        server.signal("SIGTERM")
        assert server.process.wait(20) == 0
        assert server.process.stderr is not None
        assert server.process.stderr.read() == ""


def test_a_head_that_does_not_come_closes_its_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEAD_WITHIN_S", 0.2)
    head = b"GET / HTTP/1.1\r\nhost: a\r\n"

    async def scene() -> None:
        config = uvicorn.Config(app, http=Connection, log_config=None, lifespan="off")
        server = uvicorn.Server(config)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            serving = asyncio.ensure_future(server.serve([listener]))
            silent, halting, whole = [await connect(listener) for _ in range(3)]
            halting[1].write(head)
            whole[1].write(head + b"\r\n")
            assert b"200" in await whole[0].readline()
            assert await closed(silent[0])
            assert await closed(halting[0])
            whole[1].write(head + b"\r\n")  # kept all the time
            assert b"200" in await whole[0].readuntil(b"200")
            whole[1].write(head)
            assert await closed(whole[0])
            server.should_exit = True
            await serving

    asyncio.run(scene())


def test_an_answer_that_is_not_taken_closes_its_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "TAKES_WITHIN_S", 0.3)
    ask = b"GET / HTTP/1.1\r\nhost: a\r\n\r\n"

    async def large(scope: object, receive: object, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": bytes(SIZE)})

    async def scene() -> None:
        config = uvicorn.Config(large, http=Connection, log_config=None, lifespan="off")
        server = uvicorn.Server(config)
        loop = asyncio.get_running_loop()
        with socket.create_server(("127.0.0.1", 0)) as listener, ExitStack() as clients:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
            serving = asyncio.ensure_future(server.serve([listener]))
            stuck, slow = (clients.enter_context(client(listener)) for _ in range(2))
            for each in (stuck, slow):
                await loop.sock_sendall(each, ask)
            taken = 0
            while taken < SIZE:  # for longer than a client may take nothing
                part = await asyncio.wait_for(loop.sock_recv(slow, 1 << 16), 10)
                assert part
                taken += len(part)
                await asyncio.sleep(0.005)
            until = time.monotonic() + 10
            while len(server.server_state.connections) > 1 and time.monotonic() < until:
                await asyncio.sleep(0.05)
            (left,) = server.server_state.connections
            assert (left.client or [])[-1] == slow.getsockname()[1]  # type: ignore[union-attr]
            server.should_exit = True
            await serving

    asyncio.run(scene())


SIZE = 1 << 23  # bytes of an answer, more than the kernel keeps


def client(listener: socket.socket) -> socket.socket:
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
    made.connect(listener.getsockname())
    made.setblocking(False)
    return made


async def app(scope: object, receive: object, send: object) -> None:
    await asyncio.sleep(0.3)  # longer than a head may take
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


async def connect(listener: socket.socket) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection(*listener.getsockname())


async def closed(reader: asyncio.StreamReader) -> bool:
    """Read until the connection is closed."""
    with suppress(ConnectionResetError):
        await asyncio.wait_for(reader.read(), 10)
    return True


def test_files_that_run_out_are_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    others: list[dict[str, object]] = []
    handle, loop = say_no_more_files(said.append), asyncio.new_event_loop()
    monkeypatch.setattr(loop, "default_exception_handler", others.append)
    for _ in range(3):
        handle(loop, {"message": "x", "exception": OSError(24, "Too many open files")})
    assert len(said) == 1
    assert "Too many open files" in said[0]
    assert others == []
    handle(loop, {"message": "something else"})
    assert others == [{"message": "something else"}]
    loop.close()


@pytest.mark.parametrize(
    "option",
    [
        ("--max-body-mb", "nan"),
        ("--max-body-mb", "inf"),
        ("--stop-within", "nan"),
        ("--host", "ü..x"),
        ("--host", "a" * 300),
    ],
)
def test_an_option_without_sense_is_one_sentence(option: tuple[str, str], edge: Path) -> None:
    said = m2d("serve", edge, "--port", 0, *option)
    assert said.exit_code == 2
    assert re.fullmatch(r"(Usage: .*\n.*\n\n)?Error: [^\n]+\.\n", said.stderr)


def test_a_port_is_had_before_anything_is_loaded() -> None:
    with _listener("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(UsageError, match=f"port {port} of 127.0.0.1 cannot be had"):
            _listener("127.0.0.1", port)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a file that is full, of Linux")
def test_a_first_line_that_cannot_be_written_is_one_sentence(edge: Path) -> None:
    command = [sys.executable, "-m", "m2dexport", "serve", str(edge), "--port", "0"]
    with Path("/dev/full").open("w") as full:
        ran = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False
        )
    assert ran.returncode == 1
    assert re.fullmatch(r"Error: No space left on device\.\n", ran.stderr)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_second_signal_does_not_wait_for_requests(name: str, edge: Path) -> None:
    with live(edge, "--threads", 1) as server, closing(server.at_work()) as asking:
        server.signal("SIGTERM")
        time.sleep(0.05)  # two at once are one
        server.signal(name)
        assert server.process.wait(20) == 1
        assert asking.getresponse().status == 503
        assert server.process.stderr is not None
        said = server.process.stderr.read()
    assert re.fullmatch(r"Error: 1 request was not done at the second signal [^\n]+\.\n", said)


HANGUP = """
import signal
from m2dexport.serve.server import _early_hangups

before = signal.getsignal(signal.SIGHUP)
with _early_hangups() as came:
    signal.raise_signal(signal.SIGHUP)
assert came == [signal.SIGHUP]
assert signal.getsignal(signal.SIGHUP) == before
"""


def test_a_hangup_while_it_loads_is_kept_for_later() -> None:
    """In a process of its own: the test's own may have other uses for signals."""
    subprocess.run([sys.executable, "-c", HANGUP], check=True, timeout=60)


def test_a_folder_that_is_no_artifact_any_more_is_refused_in_words(tmp_path: Path) -> None:
    folder = tiny_artifact(tmp_path / "edge")
    opened, news = partial(open_served, folder, Device(threads=1)), []
    service = Service(opened(), Limits())
    (folder / "artifact.json").unlink()
    asyncio.run(Reloading(service, folder, opened, False, news.append).reload())
    assert news == [
        f"{folder} was not loaded, and the old one stays: {folder} has no artifact.json; name a "
        "bundle or an artifact folder."
    ]
