"""Honest timing: candidates interleaved in one run, steady before they count, memory apart."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from m2dexport.engines import Device, engine_runner
from m2dexport.errors import M2DError, one_line
from m2dexport.precisions import Isa

Ids = NDArray[np.int64]
_Run = Callable[[Ids, Ids], object]
Key = TypeVar("Key", bound=Hashable)

_SEED = 0
_WARM_UP_LIMIT = 50
_WARM_UP_WINDOW = 5
_STEADY = 1.1  # a window whose median is within 10% of the one before it
#: Candidates are interleaved in groups whose graphs fit in this many bytes together.
_GROUP_BYTES = 2 << 30


@dataclass(frozen=True)
class Candidate:
    """A graph to be measured."""

    files: Mapping[str, Path]  # of the engine, by name
    isa: Isa
    engine: str
    device: Device

    @property
    def size_bytes(self) -> int:
        """Bytes of all files of the graph."""
        return sum(path.stat().st_size for path in self.files.values())


@dataclass(frozen=True)
class Conditions:
    """What is the same for all candidates of one run."""

    vocab_size: int  # token ids are drawn below this
    repeats: int = 30  # timed rounds per shape


def write_candidate(
    contents: Mapping[str, bytes],
    folder: Path,
    engine: str,
    device: Device = Device(),
    isa: Isa = "portable",
) -> Candidate:
    """Write the engine's files of a graph into a new folder, to be measured."""
    folder.mkdir()
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    files = {name: folder / name for name in contents}
    return Candidate(files, isa, engine, device)


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
    candidates: Mapping[Key, Candidate],
    shapes: Sequence[tuple[int, int]],
    conditions: Conditions,
    on_step: Callable[[], None] = lambda: None,
) -> dict[Key, tuple[LatencyPoint, ...] | M2DError]:
    """Time every graph at every shape; in each round every candidate runs once.

    Interleaving makes a slow moment of the machine fall on all candidates alike. Tokenization is
    not included.

    Args:
        candidates: the graphs by any key.
        shapes: (batch, sequence) pairs; every token is real, none is padding.
        conditions: token ids and number of rounds.
        on_step: called once per candidate and shape.

    Returns:
        A point per shape, or why a graph cannot be loaded.
    """
    results: dict[Key, tuple[LatencyPoint, ...] | M2DError] = {}
    for group in _groups(candidates):
        runs: dict[Key, _Run] = {}
        for name in group:
            graph = candidates[name]
            try:
                engine = engine_runner(graph.engine)
                session = engine.load(graph.files, graph.device, graph.isa)
                runs[name] = partial(engine.run, session)
            except M2DError as error:
                results[name] = error
        points: dict[Key, list[LatencyPoint]] = {name: [] for name in runs}
        for shape in shapes if runs else ():
            times = _interleaved(runs, _inputs(*shape, conditions.vocab_size), conditions.repeats)
            for name, taken in times.items():
                p50, p95 = np.percentile(taken, (50, 95))
                points[name].append(LatencyPoint(*shape, float(p50), float(p95), len(taken)))
                on_step()
        results |= {name: tuple(measured) for name, measured in points.items()}
    return results


def measure_footprint(
    candidate: Candidate, shape: tuple[int, int], conditions: Conditions
) -> Footprint:
    """Load and run a graph in a process of its own, and report what that took.

    Raises:
        M2DError: when the process fails.
    """
    asked = {
        "engine": candidate.engine,
        "device": {**asdict(candidate.device), "cache": None},
        "files": {name: str(path) for name, path in candidate.files.items()},
        "isa": candidate.isa,
        "shape": [*shape, conditions.vocab_size],
    }
    finished = subprocess.run(
        [sys.executable, "-m", "m2dexport.profile.latency", json.dumps(asked)],
        capture_output=True,
        text=True,
        check=False,
    )
    if finished.returncode != 0:
        reason = (finished.stderr.strip().splitlines() or ["no message"])[-1]
        name = next(iter(candidate.files.values()))
        raise M2DError(f"measuring the memory of {name} failed: {one_line(reason)}")
    return Footprint(**json.loads(finished.stdout))


def _groups(graphs: Mapping[Key, Candidate]) -> list[list[Key]]:
    groups: list[list[Key]] = [[]]
    size = 0
    for name, graph in graphs.items():
        size += graph.size_bytes
        if groups[-1] and size > _GROUP_BYTES:
            groups.append([])
            size = graph.size_bytes
        groups[-1].append(name)
    return groups


def _inputs(batch: int, sequence: int, vocab_size: int) -> tuple[Ids, Ids]:
    ids = np.random.default_rng(_SEED).integers(0, vocab_size, (batch, sequence))
    return ids, np.ones_like(ids)


def _interleaved(
    runs: Mapping[Key, _Run], inputs: tuple[Ids, Ids], repeats: int
) -> dict[Key, list[float]]:
    """Return the milliseconds of ``repeats`` runs of each, taken in turns once all are steady."""
    for run in runs.values():
        _warm_up(run, *inputs)
    names = list(runs)
    times: dict[Key, list[float]] = {name: [] for name in names}
    order = np.random.default_rng(_SEED)
    for _ in range(repeats):
        # No candidate always follows the same one, which leaves its data in the caches.
        for index in order.permutation(len(names)):
            times[names[index]].append(_timed(runs[names[index]], *inputs))
    return times


def _warm_up(run: _Run, ids: Ids, mask: Ids) -> None:
    """Run until one window of runs is about as fast as the window before it."""
    previous = float("inf")
    for _ in range(_WARM_UP_LIMIT // _WARM_UP_WINDOW):
        window = float(np.median([_timed(run, ids, mask) for _ in range(_WARM_UP_WINDOW)]))
        if previous / _STEADY <= window <= previous * _STEADY:
            return
        previous = window


def _timed(run: _Run, ids: Ids, mask: Ids) -> float:
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

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _footprint(asked: Mapping[str, Any]) -> Footprint:
    engine = engine_runner(asked["engine"])
    start = time.perf_counter()
    files = {name: Path(path) for name, path in asked["files"].items()}
    session = engine.load(files, Device(**asked["device"]), asked["isa"])
    load_ms = (time.perf_counter() - start) * 1e3
    engine.run(session, *_inputs(*asked["shape"]))
    return Footprint(_peak_memory(), load_ms)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(asdict(_footprint(json.loads(sys.argv[1])))))
