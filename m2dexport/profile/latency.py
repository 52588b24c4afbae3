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
Run = Callable[[Ids, Ids], list[NDArray[Any]]]
Key = TypeVar("Key", bound=Hashable)

_SEED = 0
#: Requests after which memory is measured again, and the most texts and tokens of one.
_REQUESTS, _MIXED = 1000, (4, 32)
_SHORT = 4  # the exponent that makes most of them short
#: Ids and mask of one text, enough work to wake every thread.
_WAKE = np.zeros((1, 16), dtype=np.int64), np.ones((1, 16), dtype=np.int64)
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
    p99_ms: float
    p50_range: tuple[float, float]  # 95% confidence
    p95_range: tuple[float, float]
    runs: int


@dataclass(frozen=True)
class Footprint:
    """What one process needs to load a graph, run it at the largest shape, and go on running."""

    peak_memory_bytes: int  # of the whole process: Python, numpy, engine, graph, buffers
    used_memory_bytes: int  # the same after 1,000 requests of mixed shapes
    load_ms: float  # from file to a session that can run
    first_ms: float  # the first run after that


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
        runs: dict[Key, Run] = {}
        for name in group:
            try:
                runs[name] = loaded(candidates[name])
            except M2DError as error:
                results[name] = error
        points: dict[Key, list[LatencyPoint]] = {name: [] for name in runs}
        pause = max((candidates[name].device.spin_us or 0 for name in runs), default=0) * 1e-6
        for shape in shapes if runs else ():
            inputs = random_inputs(*shape, conditions.vocab_size)
            for run in runs.values():
                _warm_up(run, *inputs)
            timed = {name: partial(run, *inputs) for name, run in runs.items()}
            times = time_in_turns(timed, conditions.repeats, partial(settle, runs, pause))
            for name, taken in times.items():
                points[name].append(_summary(shape, taken))
                on_step()
        results |= {name: tuple(measured) for name, measured in points.items()}
    return results


def _summary(shape: tuple[int, int], times: Sequence[float]) -> LatencyPoint:
    p50, p95, p99 = (float(each) for each in np.percentile(times, (50, 95, 99)))
    return LatencyPoint(
        *shape, p50, p95, p99, quantile_range(times, 0.5), quantile_range(times, 0.95), len(times)
    )


def quantile_range(times: Sequence[float], share: float) -> tuple[float, float]:
    """Return the 95% confidence range of a quantile, from the order of the values alone.

    The number of values below a quantile has a binomial distribution, whatever that of the values
    (Conover, "Practical Nonparametric Statistics", section 3.2, in the normal approximation).
    Where there are too few values for an upper bound, that is the largest.

    Args:
        times: one or more values.
        share: of values below the quantile, such as 0.95.
    """
    ordered, count = sorted(times), len(times)
    spread = 1.96 * (count * share * (1 - share)) ** 0.5
    low, high = int(count * share - spread), int(np.ceil(count * share + spread))
    return ordered[max(low, 0)], ordered[min(high, count - 1)]


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


def loaded(candidate: Candidate) -> Run:
    """Return what runs a graph.

    Raises:
        M2DError: when its engine refuses it.
    """
    engine = engine_runner(candidate.engine)
    return partial(engine.run, engine.load(candidate.files, candidate.device, candidate.isa))


def random_inputs(batch: int, sequence: int, vocab_size: int) -> tuple[Ids, Ids]:
    """Return int64 (batch, sequence) ids, the same every time, and a mask without padding."""
    ids = np.random.default_rng(_SEED).integers(0, vocab_size, (batch, sequence))
    return ids, np.ones_like(ids)


def time_in_turns(
    runs: Mapping[Key, Callable[[], object]], repeats: int, before: Callable[[Key], None]
) -> dict[Key, list[float]]:
    """Return the milliseconds of ``repeats`` runs of each; ``before`` each, that is called."""
    names = list(runs)
    times: dict[Key, list[float]] = {name: [] for name in names}
    order = np.random.default_rng(_SEED)
    for _ in range(repeats):
        # No candidate always follows the same one, which leaves its data in the caches.
        for index in order.permutation(len(names)):
            before(names[index])
            times[names[index]].append(_timed(runs[names[index]]))
    return times


def settle(runs: Mapping[Key, Run], pause: float, name: Key) -> None:
    """Wait until the threads of the run before have stopped spinning, and wake those of this one.

    Args:
        runs: of all candidates.
        pause: seconds that threads spin at most; 0: none do, and there is nothing to wait for.
        name: which run comes next.
    """
    if pause > 0:
        time.sleep(pause)
        runs[name](*_WAKE)


def _warm_up(run: Run, ids: Ids, mask: Ids) -> None:
    """Run until one window of runs is about as fast as the window before it."""
    previous = float("inf")
    for _ in range(_WARM_UP_LIMIT // _WARM_UP_WINDOW):
        times = [_timed(partial(run, ids, mask)) for _ in range(_WARM_UP_WINDOW)]
        window = float(np.median(times))
        if previous / _STEADY <= window <= previous * _STEADY:
            return
        previous = window


def _timed(run: Callable[[], object]) -> float:
    """Return the milliseconds of one run."""
    start = time.perf_counter()
    run()
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
    batch, sequence, vocab_size = asked["shape"]
    first_ms = _timed(partial(engine.run, session, *random_inputs(1, 16, vocab_size)))
    engine.run(session, *random_inputs(batch, sequence, vocab_size))
    peak = _peak_memory()
    for texts, tokens in _mixed_shapes(batch, sequence):
        engine.run(session, *random_inputs(texts, tokens, vocab_size))
    return Footprint(peak, _peak_memory(), load_ms, first_ms)


def _mixed_shapes(batch: int, sequence: int) -> list[tuple[int, int]]:
    """Return the shapes of 1,000 requests, mostly short and none larger than these, as they come.

    An engine that keeps something for every shape shows it here.
    """
    sizes = np.random.default_rng(_SEED).uniform(size=(_REQUESTS, 2)) ** _SHORT
    limits = min(batch, _MIXED[0]), min(sequence, _MIXED[1])
    return [(1 + int(a * limits[0]), 1 + int(b * limits[1])) for a, b in sizes]


if __name__ == "__main__":
    sys.stdout.write(json.dumps(asdict(_footprint(json.loads(sys.argv[1])))))
