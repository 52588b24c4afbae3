"""Settings of sessions: the threads, spinning and workers with which each graph runs best.

Which those are depends on the graph and the machine. A small graph is done before a second thread
has woken up; threads that spin are there at once, unless others want the cores; in a long list,
every core may take a batch of its own. So what a target leaves open is measured.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import replace
from functools import partial
from typing import Literal, TypeVar

import numpy as np

from m2dexport.batches import TOKENS_PER_BATCH, encode_tokens
from m2dexport.cores import at_once, threads_for, usable_cores
from m2dexport.engines import ENGINES, SPIN_US, STATIC_ENGINE, Device
from m2dexport.errors import M2DError
from m2dexport.measure.latency import (
    Candidate,
    Ids,
    Loaded,
    Run,
    loaded,
    random_inputs,
    time_in_turns,
)
from m2dexport.profile.schema import MeasuredOn

Optimize = Literal["latency", "throughput"]
Key = TypeVar("Key", bound=Hashable)

_ROUNDS = {"latency": 15, "throughput": 5}  # the first of which does not count
_TEXTS = 16  # of a list, for every core
_STATES = 8  # in memory at once, of a layer, the wide ones in the middle counted by their width
_NOISE = 1.05  # settings that take fewer cores win unless others are faster by more than this


def batches_at_once(device: Device, engine: str, longest: int, width: int) -> Device:
    """Return a device that runs several batches at once, where the CPU runs them.

    Cores that share a batch wait for each other after every operator; with a batch each, they do
    not. How many there are is bounded by the memory for what flows through the layers.

    Args:
        device: its threads are those of all batches together.
        engine: what runs them.
        longest: tokens of a text, at most.
        width: of the hidden states.
    """
    if not _chooses_threads(engine, device):
        return device
    threads = threads_for(device.threads)
    # Of a token, in float32: attention to all others, twice, by heads of 64, and states.
    values = 2 * longest * width // 64 + _STATES * width
    workers = min(threads, at_once(4 * values * TOKENS_PER_BATCH))
    return replace(device, threads=threads // workers, workers=workers)


def settings_of(candidate: Candidate, optimize: Optimize) -> tuple[Device, ...]:
    """Return the settings that may suit a graph, those that take the fewest cores first.

    What its device names is fixed; ``spin_us`` is a limit. Where the CPU does not run the graph,
    there is nothing to choose.

    Args:
        candidate: the graph, on a device that leaves settings open.
        optimize: "latency" of one request, or "throughput" of a list.
    """
    device, engine = candidate.device, candidate.engine
    if engine == STATIC_ENGINE:  # numpy, in one thread
        return (replace(device, threads=1, spin_us=0, workers=1),)
    if not _chooses_threads(engine, device):
        return (device,)
    most = threads_for(device.threads)
    found = []
    for threads in (most,) if device.threads else sorted({1, most}):
        workers = usable_cores() // threads if optimize == "throughput" else 1
        can_spin = threads > 1 and engine == "onnx"
        for spin_us in sorted({0, _longest(device) if can_spin else 0}):
            found.append(replace(device, threads=threads, spin_us=spin_us, workers=workers))
    return tuple(found)


def choose_settings(
    graphs: Mapping[Key, Candidate],
    optimize: Optimize,
    shape: tuple[int, int],
    vocab_size: int,
) -> dict[Key, Device]:
    """Measure the settings that may suit each graph and return the best ones.

    Args:
        graphs: the graphs by any key.
        optimize: as for ``settings_of``.
        shape: (batch, sequence) of a request; a list has texts of the same length.
        vocab_size: token ids are drawn below this.
    """
    size, batches = (_TEXTS, usable_cores()) if optimize == "throughput" else (shape[0], 1)
    ids, _ = random_inputs(size * batches, shape[1], vocab_size)
    found = {}
    for name, graph in graphs.items():
        settings = settings_of(graph, optimize)
        found[name] = settings[0]
        if len(settings) > 1:
            try:
                runs = {device: loaded(replace(graph, device=device)) for device in settings}
            except M2DError:
                continue  # measuring its latency will say why
            found[name] = _best(runs, ids, size, _ROUNDS[optimize])
    return found


def measured_on(candidate: Candidate) -> MeasuredOn:
    """Return the settings that a graph is measured with, for the record."""
    device = candidate.device
    return MeasuredOn(
        provider=_provider(candidate.engine, device),
        threads=threads_for(device.threads),
        spin_us=_longest(device),
        workers=device.workers or 1,
    )


def _best(runs: Mapping[Device, Run], ids: Ids, batch_size: int, rounds: int) -> Device:
    """Return the first of the settings than which none is clearly faster."""
    whole = {
        device: partial(_run_list, run, device.workers or 1, ids, batch_size)
        for device, run in runs.items()
    }
    pause = max(device.spin_us or 0 for device in runs) * 1e-6
    times = time_in_turns(whole, rounds, Loaded(runs, {}, pause))
    medians = {device: float(np.median(taken[1:])) for device, taken in times.items()}
    enough = min(medians.values()) * _NOISE
    return next(device for device, median in medians.items() if median <= enough)


def _run_list(run: Run, workers: int, ids: Ids, batch_size: int) -> None:
    encode_tokens(lambda *batch: run(*batch)[0], ids.tolist(), 0, batch_size, workers)


def _chooses_threads(engine: str, device: Device) -> bool:
    """Say whether an engine runs on the CPU, in as many threads as it is told to."""
    return engine in ("onnx", "openvino") and _provider(engine, device) == ENGINES[engine].provider


def _provider(engine: str, device: Device) -> str:
    return device.provider or ENGINES[engine].provider


def _longest(device: Device) -> int:
    return SPIN_US if device.spin_us is None else device.spin_us
