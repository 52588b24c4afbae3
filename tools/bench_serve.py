"""Measure ``m2dexport serve`` under load, over the loopback interface, as ratios to one client.

    python tools/bench_serve.py edge.m2d                          # 1, 8 and 64 clients
    python tools/bench_serve.py edge.m2d --clients 1,16 --seconds 2 --rounds 1

Every client keeps one connection and sends a text as soon as it has the vector of the last one. The
texts are the sentences of the shipped STS-B dev, and the vectors come as base64. The clients share
one process beside the server's, of plain sockets, and the same cores: what they use the server
lacks. In each round every number of clients has its turn. Requests per second are the median of the
rounds, latencies those of all of them. The first row is the same texts one by one by
``m2dexport.load(...).encode``, without a server.

At the end the server is stopped by SIGTERM with the most clients at work. Lost is a request that
was sent and got no vector; a connection that is refused after the stop is not a request.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import signal
import statistics
import subprocess
import sys
import time
import urllib.request
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import page

import m2dexport
from m2dexport.vectors.tasks import default_tasks

_HEAD = (
    *("clients", "requests/s", "to one client", "p50 ms", "p95 ms", "p99 ms"),
    "texts in a batch",
)
_WARM_S = 0.5
_STOP_AFTER_S = 1.0


@dataclass(frozen=True)
class Load:
    """What clients are to do."""

    url: str
    model: str
    texts: tuple[str, ...]
    clients: int
    seconds: float  # for which they begin requests; 0: until the server is gone


@dataclass
class Seen:
    """What clients saw."""

    milliseconds: list[float]  # of every request that was answered with a vector
    lost: list[str]  # what became of every other one
    seconds: float = 0.0


async def one_client(load: Load, number: int, seen: Seen, until: float) -> None:
    """Send a text after the other until the time is over or the port is closed."""
    place = urlsplit(load.url)
    sent = number
    while time.perf_counter() < until:
        try:
            reader, writer = await asyncio.open_connection(place.hostname, place.port)
        except OSError:  # the server has stopped
            return
        answered, closes = 0, False
        try:
            while time.perf_counter() < until and not closes:
                began = time.perf_counter()
                writer.write(request(load, sent))
                status, closes = await answer(reader)
                if status == 200:
                    seen.milliseconds.append((time.perf_counter() - began) * 1e3)
                else:
                    seen.lost.append(str(status))
                answered += 1
                sent += load.clients
        except (OSError, asyncio.IncompleteReadError) as error:
            if answered:  # else the port closed before the server had the connection
                seen.lost.append(repr(error))
        writer.close()


def request(load: Load, number: int) -> bytes:
    """Return the bytes of a request for one text."""
    text = load.texts[number % len(load.texts)]
    body = json.dumps({"model": load.model, "input": text, "encoding_format": "base64"})
    return (
        "POST /v1/embeddings HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\n\r\n{body}"
    ).encode()


async def answer(reader: asyncio.StreamReader) -> tuple[int, bool]:
    """Read an answer; return its status and whether its connection closes."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    await reader.readexactly(int(re.search(r"content-length: (\d+)", head)[1]))
    return int(head.split()[1]), "connection: close" in head


async def all_clients(load: Load) -> Seen:
    """Run all clients at once."""
    seen = Seen([], [])
    began = time.perf_counter()
    until = began + (load.seconds or float("inf"))
    await asyncio.gather(*(one_client(load, n, seen, until) for n in range(load.clients)))
    seen.seconds = time.perf_counter() - began
    return seen


class Clients:
    """A load in a process of its own."""

    def __init__(self, load: Load) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--as-clients"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._process.stdin.write(json.dumps(asdict(load)))
        self._process.stdin.close()

    def seen(self) -> Seen:
        """Return what they saw, at the end."""
        return Seen(**json.loads(self._process.stdout.read()))


class Server:
    """``m2dexport serve`` in a process of its own."""

    def __init__(self, bundle: Path, threads: int | None) -> None:
        options = ["--threads", str(threads)] if threads else []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "m2dexport", "serve", bundle, "--port", "0", "--json", *options],
            stdout=subprocess.PIPE,
            text=True,
        )
        said = json.loads(self.process.stdout.readline())
        self.url, self.model = said["url"], said["model"]

    def batches(self) -> tuple[float, float]:
        """Return how many texts ran so far, and in how many batches."""
        with urllib.request.urlopen(self.url.removesuffix("/v1") + "/metrics") as answered:
            text = answered.read().decode()
        names = ("sum", "count")
        found = [re.search(rf"^m2dexport_batch_texts_{n} (\S+)", text, re.M) for n in names]
        return float(found[0][1]), float(found[1][1])


def rounds(server: Server, options: argparse.Namespace, texts: tuple[str, ...]) -> list[list[str]]:
    """Return the rows of the table."""
    seen: dict[int, list[Seen]] = {clients: [] for clients in options.clients}
    batches: dict[int, list[tuple[float, float]]] = {clients: [] for clients in options.clients}
    direct: list[float] = []
    encoder = m2dexport.load(options.bundle, m2dexport.Device(threads=options.threads))
    for number in range(options.rounds):
        page.say(f"round {number + 1} of {options.rounds}")
        direct += one_by_one(encoder, texts, options.seconds)
        for clients in options.clients:
            before = server.batches()
            load = Load(server.url, server.model, texts, clients, options.seconds)
            seen[clients].append(Clients(load).seen())
            after = server.batches()
            batches[clients].append((after[0] - before[0], after[1] - before[1]))
    speed = {
        clients: statistics.median(len(each.milliseconds) / each.seconds for each in found)
        for clients, found in seen.items()
    }
    one = speed[min(speed)]
    rows = [["none, encode", *figures(1e3 / statistics.mean(direct), one, direct), "1.0"]]
    for clients, found in seen.items():
        if lost := [reason for each in found for reason in each.lost]:
            raise SystemExit(f"{clients} clients lost {len(lost)} requests: {lost[0]}")
        milliseconds = [ms for each in found for ms in each.milliseconds]
        texts_run, runs = np.sum(batches[clients], axis=0)
        row = figures(speed[clients], one, milliseconds)
        rows.append([str(clients), *row, f"{texts_run / runs:.1f}"])
    return rows


def one_by_one(encoder: m2dexport.Encoder, texts: tuple[str, ...], seconds: float) -> list[float]:
    """Return the milliseconds of texts that are encoded without a server."""
    found: list[float] = []
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        began = time.perf_counter()
        encoder.encode([texts[len(found) % len(texts)]])
        found.append((time.perf_counter() - began) * 1e3)
    return found


def figures(speed: float, one: float, milliseconds: list[float]) -> list[str]:
    """Return the cells that all rows have."""
    quantiles = np.percentile(milliseconds, (50, 95, 99))
    return [f"{speed:.0f}", f"{speed / one:.2f}x", *(f"{each:.2f}" for each in quantiles)]


def stop(server: Server, clients: int, texts: tuple[str, ...]) -> str:
    """Stop the server while clients are at work, and return a sentence about it."""
    before = server.batches()
    working = Clients(Load(server.url, server.model, texts, clients, 0))
    while server.batches() == before:
        time.sleep(0.1)
    time.sleep(_STOP_AFTER_S)
    began = time.perf_counter()
    server.process.send_signal(signal.SIGTERM)
    status = server.process.wait()
    took = time.perf_counter() - began
    seen = working.seen()
    lost = f" ({seen.lost[0]})" if seen.lost else ""
    return (
        f"Stopped by SIGTERM with {clients} clients at work: {len(seen.milliseconds)} requests "
        f"answered, {len(seen.lost)} lost{lost}, exit status {status} after {took:.1f} s."
    )


def main() -> None:
    """Print a Markdown page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path, nargs="?")
    parser.add_argument("--clients", type=page.numbers, default=(1, 8, 64))
    parser.add_argument("--seconds", type=float, default=5.0, help="of each turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, help="a file; without it, standard output")
    parser.add_argument("--as-clients", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.as_clients:
        load = Load(**json.load(sys.stdin))
        print(json.dumps(asdict(asyncio.run(all_clients(load)))))
        return
    if options.bundle is None:
        parser.error("name a bundle")
    task = next(each for each in default_tasks() if each.kind == "sts")
    texts = tuple(dict.fromkeys((*task.sentences1, *task.sentences2)))
    server = Server(options.bundle, options.threads)
    try:
        Clients(Load(server.url, server.model, texts, 1, _WARM_S)).seen()
        rows = rounds(server, options, texts)
        stopped = stop(server, max(options.clients), texts)
    finally:
        server.process.kill()
    threads = f"{options.threads} threads" if options.threads else "threads as the bundle says"
    packages = ("m2dexport", "onnxruntime", "uvicorn", "starlette")
    lines = [
        *page.heading(threads, packages),
        f"{options.rounds} rounds of {options.seconds:g} s; {len(texts)} sentences.",
        "",
        *page.table(_HEAD, rows),
        "",
        stopped,
    ]
    page.write(lines, options.out)


if __name__ == "__main__":
    main()
