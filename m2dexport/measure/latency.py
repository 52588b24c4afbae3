"""Honest timing: candidates interleaved in one run, and steady before they count."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from m2dexport.engines import Device, engine_runner
from m2dexport.errors import M2DError
from m2dexport.measure.quantiles import Ratio, quantile_range, ratio_of
from m2dexport.precisions import Isa

if TYPE_CHECKING:  # a process that measures memory has no use for a tokenizer
    from m2dexport.measure.requests import Requests

Ids = NDArray[np.int64]
Run = Callable[[Ids, Ids], Any]
Key = TypeVar("Key", bound=Hashable)

QUICK, THOROUGH = 30, 500  # timed rounds, for ``Conditions.repeats``

_SEED = 0
#: Ids and mask of one text, enough work to wake every thread.
_WAKE = np.zeros((1, 16), dtype=np.int64), np.ones((1, 16), dtype=np.int64)
_WARM_UP_LIMIT = 50
_WARM_UP_WINDOW = 5
_STEADY = 1.1  # a window whose median is within 10% of the one before it
#: Candidates are interleaved in groups whose graphs fit in this many bytes together.
_GROUP_BYTES = 2 << 30
_LEAST, _LEAST_FIRST, _MOST = 30, 100, 300  # rounds; of the first shape, whose p95 is compared
_RUNS_OF_P99 = 300
_TEXT_EVERY = 3  # rounds: one in so many also goes from text to vector


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
    #: Timed rounds per shape. None: as many as there is time for, from 30 (at the first shape 100,
    #: fewer of which mean no p95) to 300 (from which a p99 is stated).
    repeats: int | None = None
    seconds: float = 0.3  # that there are for each candidate and shape


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
    p99_ms: float | None  # None: fewer than 300 runs, of which it is one of the three slowest
    p50_range: tuple[float, float]  # 95% confidence
    p95_range: tuple[float, float]
    runs: int
    ratio: Ratio | None = None  # its median over the reference's; None: there is none
    text_p50_ms: float | None = None  # from texts to vectors, measured as such; None: it was not


@dataclass(frozen=True)
class Loaded(Generic[Key]):
    """Candidates that are timed together."""

    runs: Mapping[Key, Run]
    failed: Mapping[Key, M2DError]  # why those cannot be loaded
    pause: float = 0.0  # seconds that threads of theirs spin at most; 0: none do
    reference: Key | None = None  # that the others are compared with; None: there is none


@dataclass(frozen=True)
class Timed(Generic[Key]):
    """What a group of candidates took at one shape."""

    points: Mapping[Key, LatencyPoint]
    reference_ms: tuple[float, ...]  # each run of the reference, in order


def groups_of(candidates: Mapping[Key, Candidate], reference: Key | None) -> list[list[Key]]:
    """Return which candidates are timed together, as they fit into memory; the reference in each.

    Args:
        candidates: the graphs by any key.
        reference: one of them, or None.
    """
    base = 0 if reference is None else candidates[reference].size_bytes
    groups: list[list[Key]] = [[]]
    size = base
    for name, graph in candidates.items():
        if name == reference:
            continue
        size += graph.size_bytes
        if groups[-1] and size > _GROUP_BYTES:
            groups.append([])
            size = base + graph.size_bytes
        groups[-1].append(name)
    if reference is None:
        return groups
    return [[reference, *group] for group in groups]


def load_group(candidates: Mapping[Key, Candidate], reference: Key | None = None) -> Loaded[Key]:
    """Load candidates that are to be timed together.

    Args:
        candidates: the graphs by any key.
        reference: the one that the others are compared with, or None.
    """
    runs: dict[Key, Run] = {}
    failed: dict[Key, M2DError] = {}
    for name, candidate in candidates.items():
        try:
            runs[name] = loaded(candidate)
        except M2DError as error:
            failed[name] = error
    pause = max((candidates[name].device.spin_us or 0 for name in runs), default=0) * 1e-6
    return Loaded(runs, failed, pause, reference if reference in runs else None)


def time_shape(
    group: Loaded[Key],
    shape: tuple[int, int],
    conditions: Conditions,
    requests: Mapping[Key, Requests] | None = None,
    on_share: Callable[[float], None] = lambda _: None,
) -> Timed[Key]:
    """Time a group at one shape; in each round every candidate runs once.

    Interleaving makes a slow moment of the machine fall on all candidates alike.

    Args:
        group: as ``load_group`` returns it.
        shape: (batch, sequence); every token is real, none is padding.
        conditions: token ids and number of rounds.
        requests: of the first shape, texts for the candidates that are also timed from text to
            vector, in every third round; None: this is another shape.
        on_share: called with the share of the rounds that is done.
    """
    inputs = random_inputs(*shape, conditions.vocab_size)
    for run in group.runs.values():
        _warm_up(run, *inputs)
    turns = _Turns(group)
    runs = {name: partial(run, *inputs) for name, run in group.runs.items()}
    times: dict[Key, list[float]] = {name: [] for name in runs}
    texts: dict[Key, list[float]] = {name: [] for name in runs if name in (requests or {})}
    least = _LEAST if requests is None else _LEAST_FIRST
    for number in _rounds(conditions, least, len(runs), on_share):
        for name, taken in turns.take(runs).items():
            times[name].append(taken)
        if requests and number % _TEXT_EVERY == 0:
            whole = {name: _text_run(group.runs[name], requests[name], number) for name in texts}
            for name, taken in turns.take(whole).items():
                texts[name].append(taken)
    reference = times[group.reference] if group.reference is not None else None
    points = {
        name: _summary(shape, taken, reference, texts.get(name)) for name, taken in times.items()
    }
    return Timed(points, tuple(reference or ()))


def measure_latency(
    candidates: Mapping[Key, Candidate],
    shapes: Sequence[tuple[int, int]],
    conditions: Conditions,
    reference: Key | None = None,
) -> dict[Key, tuple[LatencyPoint, ...] | M2DError]:
    """Time every graph at every shape, without tokenization.

    Args:
        candidates: the graphs by any key.
        shapes: (batch, sequence) pairs.
        conditions: token ids and number of rounds.
        reference: the candidate that the others are compared with; None: there is none.

    Returns:
        A point per shape, or why a graph cannot be loaded.
    """
    results: dict[Key, tuple[LatencyPoint, ...] | M2DError] = {}
    for names in groups_of(candidates, reference):
        group = load_group({name: candidates[name] for name in names}, reference)
        timed = [
            time_shape(group, shape, conditions, {} if shape == shapes[0] else None)
            for shape in shapes
        ]
        found = {name: tuple(each.points[name] for each in timed) for name in group.runs}
        results = {**group.failed, **found, **results}  # of the reference, the first group's
    return results


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
    runs: Mapping[Key, Callable[[], object]], repeats: int, group: Loaded[Key]
) -> dict[Key, list[float]]:
    """Return the milliseconds of ``repeats`` runs of each.

    Args:
        runs: what is timed of each candidate.
        repeats: rounds, in each of which all run once.
        group: the candidates, to be woken up before their turns.
    """
    turns = _Turns(group)
    rounds = [turns.take(runs) for _ in range(repeats)]
    return {name: [each[name] for each in rounds] for name in runs}


def timed(run: Callable[[], object]) -> float:
    """Return the milliseconds of one run."""
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


class _Turns(Generic[Key]):
    """Rounds in an order of their own each: nobody always finds the same one's data in caches."""

    def __init__(self, group: Loaded[Key]) -> None:
        self._group = group
        self._order = np.random.default_rng(_SEED)

    def take(self, runs: Mapping[Key, Callable[[], object]]) -> dict[Key, float]:
        """Return the milliseconds that each took, in one round."""
        names = list(runs)
        taken = {}
        for index in self._order.permutation(len(names)):
            name = names[index]
            self._settle(name)
            taken[name] = timed(runs[name])
        return taken

    def _settle(self, name: Key) -> None:
        """Wait until the threads of the run before stopped spinning, and wake those of this one."""
        if self._group.pause > 0:
            time.sleep(self._group.pause)
            self._group.runs[name](*_WAKE)


def _rounds(
    conditions: Conditions, least: int, candidates: int, on_share: Callable[[float], None]
) -> Iterator[int]:
    """Yield the numbers of the rounds for which there is time."""
    done, start = 0, time.perf_counter()
    while True:
        spent = (time.perf_counter() - start) / (conditions.seconds * max(candidates, 1))
        share = min(done / least, max(done / _MOST, spent))
        if conditions.repeats is not None:
            share = done / conditions.repeats
        on_share(min(share, 1))
        if share >= 1:
            return
        yield done
        done += 1


def _text_run(run: Run, requests: Requests, number: int) -> Callable[[], object]:
    return lambda: run(*requests.ids(number // _TEXT_EVERY))


def _summary(
    shape: tuple[int, int],
    times: Sequence[float],
    reference: Sequence[float] | None,
    texts: Sequence[float] | None,
) -> LatencyPoint:
    p50, p95, p99 = (float(each) for each in np.percentile(times, (50, 95, 99)))
    return LatencyPoint(
        *shape,
        p50,
        p95,
        p99 if len(times) >= _RUNS_OF_P99 else None,
        quantile_range(times, 0.5),
        quantile_range(times, 0.95),
        len(times),
        None if reference is None else ratio_of(times, reference),
        float(np.median(texts)) if texts else None,
    )


def _warm_up(run: Run, ids: Ids, mask: Ids) -> None:
    """Run until one window of runs is about as fast as the window before it."""
    previous = float("inf")
    for _ in range(_WARM_UP_LIMIT // _WARM_UP_WINDOW):
        times = [timed(partial(run, ids, mask)) for _ in range(_WARM_UP_WINDOW)]
        window = float(np.median(times))
        if previous / _STEADY <= window <= previous * _STEADY:
            return
        previous = window
