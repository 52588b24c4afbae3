"""Honest timing: candidates interleaved in one run, steady before they count, memory apart."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from m2dexport.engines import engine_module
from m2dexport.errors import M2DError
from m2dexport.precisions import Isa

_Run = Callable[[NDArray[np.int64], NDArray[np.int64]], object]

_SEED = 0
_WARM_UP_LIMIT = 50
_WARM_UP_WINDOW = 5
_STEADY = 1.1  # a window whose median is within 10% of the one before it
#: Candidates are interleaved in groups whose graphs fit in this many bytes together.
_GROUP_BYTES = 2 << 30


@dataclass(frozen=True)
class Candidate:
    """A graph to be measured."""

    path: Path  # the first file of the graph: an OpenVINO IR has a second beside it
    isa: Isa

    @property
    def size_bytes(self) -> int:
        """Bytes of all files of the graph."""
        return sum(file.stat().st_size for file in self.path.parent.glob(f"{self.path.stem}.*"))


@dataclass(frozen=True)
class LatencyPoint:
    """Latency of one graph at one shape, over ``runs`` timed runs after the warm-up."""

    batch: int
    sequence: int
    p50_ms: float
    p95_ms: float
    runs: int


@dataclass(frozen=True)
class Footprint:
    """What one process needs to load a graph and run it at the largest shape of the grid."""

    peak_memory_bytes: int  # of the whole process: Python, numpy, engine, graph, buffers
    load_ms: float  # from file to a session that can run


def measure_latency(
    graphs: Mapping[str, Candidate],
    shapes: Sequence[tuple[int, int]],
    *,
    vocab_size: int,
    threads: int,
    provider: str,
    repeats: int,
    engine: str = "onnx",
    on_step: Callable[[], None] = lambda: None,
) -> dict[str, tuple[LatencyPoint, ...]]:
    """Time every graph at every shape; in each round every candidate runs once.

    Interleaving makes a slow moment of the machine fall on all candidates alike. Tokenization is
    not included.

    Args:
        graphs: the candidates by name.
        shapes: (batch, sequence) pairs; every token is real, none is padding.
        vocab_size: token ids are drawn below this.
        threads: intra-op threads of each session.
        provider: the execution provider.
        repeats: timed rounds per shape.
        engine: the engine of all of them.
        on_step: called once a candidate and shape.
    """
    load, run = engine_module(engine).load, engine_module(engine).run
    points: dict[str, list[LatencyPoint]] = {name: [] for name in graphs}
    for group in _groups(graphs):
        options = {"threads": threads, "provider": provider}
        runs = {
            name: partial(run, load(graphs[name].path, isa=graphs[name].isa, **options))
            for name in group
        }
        for batch, sequence in shapes:
            ids, mask = _inputs(batch, sequence, vocab_size)
            for run_once in runs.values():
                _warm_up(run_once, ids, mask)
            times: dict[str, list[float]] = {name: [] for name in group}
            for turn in range(repeats):
                first = turn % len(group)  # no candidate always follows the same one
                for name in (*group[first:], *group[:first]):
                    times[name].append(_timed(runs[name], ids, mask))
            for name, taken in times.items():
                p50, p95 = np.percentile(taken, (50, 95))
                points[name].append(LatencyPoint(batch, sequence, float(p50), float(p95), repeats))
                on_step()
    return {name: tuple(measured) for name, measured in points.items()}


def measure_footprint(
    graph: Candidate,
    shape: tuple[int, int],
    *,
    vocab_size: int,
    threads: int,
    provider: str,
    engine: str = "onnx",
) -> Footprint:
    """Load and run a graph in a process of its own, and report what that took.

    Raises:
        M2DError: when the process fails.
    """
    arguments = [
        engine,
        str(graph.path),
        graph.isa,
        provider,
        *(str(n) for n in (*shape, vocab_size, threads)),
    ]
    finished = subprocess.run(
        [sys.executable, "-m", "m2dexport.profile.latency", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    if finished.returncode != 0:
        reason = (finished.stderr.strip().splitlines() or ["no message"])[-1]
        raise M2DError(f"measuring the memory of {graph.path.name} failed: {reason}")
    return Footprint(**json.loads(finished.stdout))


def _groups(graphs: Mapping[str, Candidate]) -> list[list[str]]:
    groups: list[list[str]] = [[]]
    size = 0
    for name, graph in graphs.items():
        size += graph.size_bytes
        if groups[-1] and size > _GROUP_BYTES:
            groups.append([])
            size = graph.size_bytes
        groups[-1].append(name)
    return groups


def _inputs(
    batch: int, sequence: int, vocab_size: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    ids = np.random.default_rng(_SEED).integers(0, vocab_size, (batch, sequence))
    return ids, np.ones_like(ids)


def _warm_up(run: _Run, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> None:
    """Run until one window of runs is about as fast as the window before it."""
    previous = float("inf")
    for _ in range(_WARM_UP_LIMIT // _WARM_UP_WINDOW):
        window = float(np.median([_timed(run, ids, mask) for _ in range(_WARM_UP_WINDOW)]))
        if previous / _STEADY <= window <= previous * _STEADY:
            return
        previous = window


def _timed(run: _Run, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> float:
    """Return the milliseconds of one run."""
    start = time.perf_counter()
    run(ids, mask)
    return (time.perf_counter() - start) * 1e3


def _peak_memory() -> int:
    """Return the largest resident size that this process has had, in bytes."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        import resource  # not on Windows; macOS counts in bytes

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _report_footprint(
    engine: str,
    graph: Candidate,
    provider: str,
    shape: tuple[int, int],
    vocab_size: int,
    threads: int,
) -> str:
    module = engine_module(engine)
    start = time.perf_counter()
    session = module.load(graph.path, threads=threads, provider=provider, isa=graph.isa)
    load_ms = (time.perf_counter() - start) * 1e3
    module.run(session, *_inputs(*shape, vocab_size))
    return json.dumps({"peak_memory_bytes": _peak_memory(), "load_ms": load_ms})


if __name__ == "__main__":
    _, engine, path, isa, provider, *rest = sys.argv
    batch, sequence, vocab_size, threads = (int(number) for number in rest)
    graph = Candidate(Path(path), cast(Isa, isa))
    sys.stdout.write(
        _report_footprint(engine, graph, provider, (batch, sequence), vocab_size, threads)
    )
