"""``m2dexport serve`` in a process of its own, for tests that talk to it."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Answer:
    """What came back for a request."""

    status: int
    headers: dict[str, str]  # names in lower case
    content: bytes

    @property
    def body(self) -> Any:
        return json.loads(self.content)


@dataclass(frozen=True)
class Live:
    """A server that takes requests."""

    process: subprocess.Popen[str]
    url: str  # ends in /v1
    model: str
    space_id: str

    def request(self, path: str, body: bytes | None = None) -> Answer:
        """Get a path, or post to it, by a connection of its own."""
        place = urlsplit(self.url)
        connection = http.client.HTTPConnection(str(place.hostname), place.port, timeout=30)
        try:
            connection.request("GET" if body is None else "POST", path, body)
            found = connection.getresponse()
            headers = {name.lower(): value for name, value in found.getheaders()}
            return Answer(found.status, headers, found.read())
        finally:
            connection.close()

    def embed(self, texts: Any, **fields: Any) -> Answer:
        """Ask for embeddings."""
        body = json.dumps({"model": self.model, "input": texts, **fields})
        return self.request("/v1/embeddings", body.encode())

    def at_work(self) -> http.client.HTTPConnection:
        """Return the connection of a request that is at work for 30 s, as its body does not end."""
        place = urlsplit(self.url)
        connection = http.client.HTTPConnection(str(place.hostname), place.port, timeout=30)
        connection.putrequest("POST", "/v1/embeddings")
        connection.putheader("content-length", "100")
        connection.endheaders(b"half")
        while b"m2dexport_requests_at_work 1.0" not in self.request("/metrics").content:
            time.sleep(0.01)
        return connection

    def signal(self, name: str) -> None:
        self.process.send_signal(getattr(signal, name))

    def news(self) -> str:
        """Return the next line of its stderr."""
        assert self.process.stderr is not None
        return self.process.stderr.readline()


@contextmanager
def live(bundle: Path, *options: object, files: int | None = None) -> Iterator[Live]:
    """Serve a bundle on a free port while the context lasts, with so many open files at most."""
    command = [sys.executable, "-m", "m2dexport", "serve", bundle, "--port", 0, "--json", *options]
    if files is not None:
        command = ["sh", "-c", f'ulimit -n {files} && exec "$@"', "sh", *command]
    process = subprocess.Popen(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ,
    )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line, process.stderr and process.stderr.read()
        said = json.loads(line)
        yield Live(process, said["url"], said["model"], said["space_id"])
    finally:
        process.kill()
        process.communicate()
