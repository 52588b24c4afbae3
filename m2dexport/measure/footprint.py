"""Memory, loading and the first vector: each graph or bundle in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from m2dexport.engines import Device, engine_runner
from m2dexport.errors import M2DError, one_line
from m2dexport.measure.latency import Candidate, Conditions, Run, random_inputs, timed

_SEED = 0
#: Requests after which memory is measured again, and the most texts and tokens of one.
_REQUESTS, _MIXED = 1000, (4, 32)
_SHORT = 4  # the exponent that makes most of them short


@dataclass(frozen=True)
class Footprint:
    """What one process needs to load a graph, run it at the largest shape, and go on running."""

    peak_memory_bytes: int  # of the whole process: Python, numpy, engine, graph, buffers
    used_memory_bytes: int  # the same after 1,000 requests of mixed shapes
    load_ms: float  # from file to a session that can run
    first_ms: float  # the first run after that, at the first shape


@dataclass(frozen=True)
class _Subject:
    """What was loaded, and how it is run."""

    run: Run
    first: Callable[[], object]  # the first run
    vocab_size: int
    batches: bool = True  # whether it runs several texts at once


def measure_footprint(
    candidate: Candidate, shapes: Sequence[tuple[int, int]], conditions: Conditions
) -> Footprint:
    """Load and run a graph in a process of its own, and report what that took.

    Args:
        candidate: the graph.
        shapes: (batch, sequence): the first is that of the first run.
        conditions: token ids.

    Raises:
        M2DError: when the process fails.
    """
    asked = {
        "engine": candidate.engine,
        "device": _stored(candidate.device),
        "files": {name: str(path) for name, path in candidate.files.items()},
        "isa": candidate.isa,
        "shapes": shapes,
        "vocab_size": conditions.vocab_size,
    }
    return _apart(asked, next(iter(candidate.files.values())))


def measure_encoder(
    path: Path,
    engine: str,
    device: Device,
    shapes: Sequence[tuple[int, int]],
    texts: Sequence[str],
    cell: str | None = None,
) -> Footprint:
    """Load a bundle or an artifact folder in a process of its own, encode, and report likewise.

    Args:
        path: the bundle or the folder.
        engine: its engine.
        device: what to run it on; what it leaves open is as the artifact says.
        shapes: (batch, sequence), the largest of which is run.
        texts: what is encoded first.
        cell: id of a cell of the bundle; None: the default one.

    Raises:
        M2DError: when the process fails.
    """
    asked = {
        "bundle": str(path),
        "cell": cell,
        "engine": engine,
        "device": _stored(device),
        "shapes": shapes,
        "texts": list(texts),
    }
    return _apart(asked, path)


def _stored(device: Device) -> dict[str, Any]:
    """Return a device as JSON; whoever loads a bundle there finds its cache again."""
    return {**asdict(device), "cache": None}


def _apart(asked: Mapping[str, Any], name: Path) -> Footprint:
    finished = subprocess.run(
        [sys.executable, "-m", "m2dexport.measure.footprint"],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        check=False,
    )
    if finished.returncode != 0:
        reason = (finished.stderr.strip().splitlines() or ["no message"])[-1]
        raise M2DError(f"measuring the memory of {name} failed: {one_line(reason)}")
    return Footprint(**json.loads(finished.stdout))


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
    device = Device(**asked["device"])
    opened = (_bundle if "bundle" in asked else _graph)(asked, device)
    start = time.perf_counter()
    subject = opened()
    load_ms = (time.perf_counter() - start) * 1e3
    first_ms = timed(subject.first)
    batch, sequence = max(asked["shapes"], key=lambda shape: shape[0] * shape[1])
    batch = batch if subject.batches else 1
    subject.run(*random_inputs(batch, sequence, subject.vocab_size))
    peak = _peak_memory()
    for texts, tokens in _mixed_shapes(batch, sequence):
        subject.run(*random_inputs(texts, tokens, subject.vocab_size))
    return Footprint(peak, _peak_memory(), load_ms, first_ms)


def _graph(asked: Mapping[str, Any], device: Device) -> Callable[[], _Subject]:
    """Return what loads a graph, its engine imported already."""
    engine = engine_runner(asked["engine"])
    files = {name: Path(path) for name, path in asked["files"].items()}
    batch, sequence = asked["shapes"][0]
    inputs = random_inputs(batch, sequence, asked["vocab_size"])

    def opened() -> _Subject:
        run = partial(engine.run, engine.load(files, device, asked["isa"]))
        return _Subject(run, partial(run, *inputs), asked["vocab_size"])

    return opened


def _bundle(asked: Mapping[str, Any], device: Device) -> Callable[[], _Subject]:
    """Return what loads a bundle or an artifact folder."""
    from m2dexport.runtime.loading import load

    path = Path(asked["bundle"])
    engine_runner(asked["engine"])  # imported before the clock starts

    def opened() -> _Subject:
        encoder = load(path, device, asked["cell"])
        first = partial(encoder.encode, asked["texts"])
        batches = encoder.spec.batch_invariant
        return _Subject(encoder.run, first, encoder.vocab_size, batches)

    return opened


def _mixed_shapes(batch: int, sequence: int) -> list[tuple[int, int]]:
    """Return the shapes of 1,000 requests, mostly short and none larger than these, as they come.

    An engine that keeps something for every shape shows it here.
    """
    sizes = np.random.default_rng(_SEED).uniform(size=(_REQUESTS, 2)) ** _SHORT
    limits = min(batch, _MIXED[0]), min(sequence, _MIXED[1])
    return [(1 + int(a * limits[0]), 1 + int(b * limits[1])) for a, b in sizes]


if __name__ == "__main__":
    sys.stdout.write(json.dumps(asdict(_footprint(json.load(sys.stdin)))))
