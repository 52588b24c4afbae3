"""Two profiles compared cell by cell: what moved, and whether by more than noise."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from m2dexport.profile.frontier import LATENCY_GRAIN_MS, LATENCY_NOISE, QUALITY_NOISE, SIZE_NOISE
from m2dexport.profile.intervals import Interval, interval_of
from m2dexport.profile.schema import (
    MEAN,
    Cell,
    Machine,
    MeasuredOn,
    Profile,
    TargetInfo,
    TaskInfo,
)
from m2dexport.vectors.resample import Score, difference, mean_of

#: Peak memory of one graph differs by this factor between runs and systems.
MEMORY_NOISE = 1.05
#: Times slower or faster, surely, from which a cell is so on a very noisy machine, too: its
#: reference cell was timed in turn with it, and what else the machine did struck both.
_BUSY = 2.0

Kind = Literal["quality", "latency", "size", "memory"]


@dataclass(frozen=True)
class Figure:
    """One figure of a cell in two profiles."""

    name: str  # "mean", "task/metric", "latency", "size" or "memory"
    kind: Kind
    before: float  # points; p50 over that of the reference cell; bytes
    after: float
    change: float  # in points; of all but quality, the factor after / before
    interval: Interval | None  # 95% confidence of the change; None: it has no noise that is known
    paired: bool  # whether both were measured on the same resamples, so that their noise cancels
    moved: bool  # beyond noise
    below_grain: bool = False  # of latency: by less than a clock can tell, whatever the factor


@dataclass(frozen=True)
class CellChange:
    """A cell that both profiles have."""

    target: str
    cell: str  # id
    figures: tuple[Figure, ...]


@dataclass(frozen=True)
class OneSided:
    """A cell that one profile has and the other lacks."""

    target: str
    cell: str  # id
    reason: str | None  # why it failed in the profile that lacks it; None: it did not


@dataclass(frozen=True)
class Comparison:
    """What differs between two profiles."""

    changes: tuple[CellChange, ...]  # of every cell that both have, in the order of the second
    came: tuple[OneSided, ...]
    went: tuple[OneSided, ...]
    remarks: tuple[str, ...]  # a sentence each: what else differs that bears on the figures


def compare_profiles(before: Profile, after: Profile, target: str | None = None) -> Comparison:
    """Compare what two profiles say of the cells of the same target and id.

    Quality is compared over the tasks that both have. Latency is compared as the ratio to each
    profile's own reference cell, so that two machines compare.

    Args:
        before: the older profile.
        after: the newer one.
        target: the name of the target to compare; None: all that either has.

    Raises:
        UsageError: when ``target`` is given and one of the profiles lacks it.
    """
    if target is not None:
        for each in (before, after):
            each.target(target)
    both = [t.name for t in (*after.targets, *before.targets) if target in (None, t.name)]
    names = list(dict.fromkeys(both))
    changes, came, went, devices = [], [], [], []
    for name in names:
        old, new = _cells(before, name), _cells(after, name)
        devices += remarks_on_devices([(old[id_], new[id_]) for id_ in new if id_ in old])
        changes += [compare_cell(before, after, old[id_], new[id_]) for id_ in new if id_ in old]
        came += [_one_sided(new[id_], before) for id_ in new if id_ not in old]
        went += [_one_sided(old[id_], after) for id_ in old if id_ not in new]
    remarks = [*devices, *remarks_on(before, after, names)]
    return Comparison(tuple(changes), tuple(came), tuple(went), tuple(remarks))


def compare_cell(before: Profile, after: Profile, old: Cell, new: Cell) -> CellChange:
    """Compare the figures of a cell in two profiles: ``old`` in ``before``, ``new`` in ``after``.

    The mean is among them where the profiles share more than one task, and latency where their
    reference cells have one id.
    """
    tasks = shared_tasks(before, after)
    paired = {task.name: _sha256(before, task) == _sha256(after, task) for task in tasks}
    figures = []
    if len(tasks) > 1:
        figures.append(_quality(MEAN, tasks, all(paired.values()), (before, old), (after, new)))
    figures += [
        _quality(task.main, [task], paired[task.name], (before, old), (after, new))
        for task in tasks
    ]
    references = before.reference_cell(old.target), after.reference_cell(new.target)
    if references[0].id == references[1].id:
        # Intervals are of one run; how far a busy machine is off from run to run, they do not know.
        noises = before.target(old.target).noise, after.target(new.target).noise
        busy = any(each is not None and each.verdict == "very noisy" for each in noises)
        figures.append(_latency(old, new, references[1], busy=busy))
    figures.append(_bytes("size", old.size_bytes, new.size_bytes, SIZE_NOISE))
    figures.append(
        _bytes("memory", old.peak_memory_bytes, new.peak_memory_bytes, MEMORY_NOISE),
    )
    return CellChange(new.target, new.id, tuple(figures))


def shared_tasks(before: Profile, after: Profile) -> tuple[TaskInfo, ...]:
    """Return the tasks of ``before`` that ``after`` has by the same name and main metric."""
    there = {task.main for task in after.tasks}
    return tuple(task for task in before.tasks if task.main in there)


def same_machine(first: Machine, second: Machine) -> bool:
    """Say whether two machines are of one kind, as far as latency depends on that."""
    kind = [(m.cpu, m.flags, m.cores, m.gpu) for m in (first, second)]
    return kind[0] == kind[1]


def described(machine: Machine) -> str:
    """Return a machine in a few words."""
    gpu = f", {machine.gpu}" if machine.gpu else ""
    return f"{machine.cpu}, {machine.cores} cores{gpu}"


def _sha256(profile: Profile, task: TaskInfo) -> str:
    return next(each.sha256 for each in profile.tasks if each.name == task.name)


def _cells(profile: Profile, target: str) -> dict[str, Cell]:
    return {cell.id: cell for cell in profile.cells if cell.target == target}


def _one_sided(cell: Cell, other: Profile) -> OneSided:
    return OneSided(cell.target, cell.id, other.failure_of(cell.id, cell.target))


def _quality(
    name: str,
    tasks: Sequence[TaskInfo],
    paired: bool,
    old: tuple[Profile, Cell],
    new: tuple[Profile, Cell],
) -> Figure:
    """Compare a metric, or the mean of several, replicate by replicate.

    Of tasks with other content the draws are independent, and so are the replicates: the
    difference has the same form, and its interval the noise of both sides.
    """
    first, second = (_score(profile, cell, tasks) for profile, cell in (old, new))
    points = _points(old[1], tasks), _points(new[1], tasks)
    if first is None or second is None:
        change, interval, beyond = points[1] - points[0], None, True
    else:
        count = min(len(first.replicates), len(second.replicates))
        cut = [Score(each.points, each.replicates[:count]) for each in (second, first)]
        change, interval = points[1] - points[0], interval_of(difference(*cut))
        beyond = not interval.low <= 0 <= interval.high
    moved = beyond and abs(change) > QUALITY_NOISE
    paired = paired and interval is not None
    return Figure(name, "quality", *points, change, interval, paired, moved)


def _points(cell: Cell, tasks: Sequence[TaskInfo]) -> float:
    return sum(cell.quality[task.main] for task in tasks) / len(tasks)


def _score(profile: Profile, cell: Cell, tasks: Sequence[TaskInfo]) -> Score | None:
    scores = [profile.score(cell, task.main) for task in tasks]
    known = [score for score in scores if score is not None]
    return mean_of(known) if len(known) == len(tasks) else None


def _latency(old: Cell, new: Cell, reference: Cell, *, busy: bool) -> Figure:
    """Compare p50 over that of the reference; ``reference`` is that of the newer profile."""
    factor, interval = quotient(new.ratio, new.ratio_interval, old.ratio, old.ratio_interval)
    below_grain = abs(new.ratio - old.ratio) * reference.p50_ms <= LATENCY_GRAIN_MS
    beyond = max(factor, 1 / factor) > LATENCY_NOISE and not interval.low <= 1 <= interval.high
    ratios = old.ratio, new.ratio
    far = interval.low > _BUSY or interval.high < 1 / _BUSY
    moved = beyond and not below_grain and (far or not busy)
    return Figure("latency", "latency", *ratios, factor, interval, False, moved, below_grain)


def quotient(
    above: float, above_interval: Interval, below: float, below_interval: Interval
) -> tuple[float, Interval]:
    """Return one positive figure over another that was measured apart, with its 95% interval.

    The intervals of both are combined on the scale of logarithms: Zou and Donner, "Construction of
    confidence limits about effect measures: a general approach", Statistics in Medicine 27, 2008.
    """
    low = math.hypot(math.log(above / above_interval.low), math.log(below_interval.high / below))
    high = math.hypot(math.log(above_interval.high / above), math.log(below / below_interval.low))
    factor = above / below
    return factor, Interval(low=factor * math.exp(-low), high=factor * math.exp(high))


def _bytes(kind: Literal["size", "memory"], old: int, new: int, noise: float) -> Figure:
    factor = max(new, 1) / max(old, 1)
    return Figure(kind, kind, old, new, factor, None, False, max(factor, 1 / factor) > noise)


def remarks_on(before: Profile, after: Profile, targets: Sequence[str]) -> tuple[str, ...]:
    """Say what two profiles were not measured alike with or on, a sentence each."""
    found = [*_remarks_on_texts(before, after), *_remarks_on_tools(before, after)]
    return (*found, *_remarks_on_targets(before, after, targets))


def remarks_on_devices(cells: Iterable[tuple[Cell, Cell | None]]) -> list[str]:
    """Say which cells of a target ran on another provider or by other threads, in a sentence.

    Args:
        cells: of one target, each before and now; None: it is not there now.
    """
    moved = [
        (old, new)
        for old, new in cells
        if new is not None and _ran_on(old.device) != _ran_on(new.device)
    ]
    if not moved:
        return []
    old, new = moved[0]
    more = f" (and {len(moved) - 1} more)" if len(moved) > 1 else ""
    before, now = (f"{d.provider} by {d.threads} threads" for d in (old.device, new.device))
    return [f"{old.target}: {old.id}{more} ran on {before}, and runs on {now}."]


def _ran_on(device: MeasuredOn) -> tuple[str, int]:
    return device.provider, device.threads


def _remarks_on_texts(before: Profile, after: Profile) -> list[str]:
    found = []
    if before.checkpoint.sha256 != after.checkpoint.sha256:
        hashes = [each.checkpoint.sha256[:12] for each in (before, after)]
        found.append(f"The checkpoint is another: {hashes[0]} before, {hashes[1]} now.")
    elif before.checkpoint.model_sha256 != after.checkpoint.model_sha256:
        found.append(
            "The checkpoint has the same weights, and another tokenizer, configuration, pooling, "
            "prompts or maximum length."
        )
    found += _remarks_on_tasks(before, after)
    if before.calibration_sha256 != after.calibration_sha256:
        found.append("The calibration texts are others.")
    if before.aligned_with and after.aligned_with and before.aligned_with != after.aligned_with:
        found.append("The texts that maps are fitted on are others.")
    return found


def _remarks_on_tools(before: Profile, after: Profile) -> list[str]:
    names = sorted({*before.tools} | {*after.tools})
    versions = {name: [p.tools.get(name, "none") for p in (before, after)] for name in names}
    return [
        f"{name} was {old} and is {new}." for name, (old, new) in versions.items() if old != new
    ]


def _remarks_on_tasks(before: Profile, after: Profile) -> list[str]:
    old, new = ({task.main: task for task in each.tasks} for each in (before, after))
    found = [f"The task {name} came." for name in new if name not in old]
    found += [f"The task {name} went." for name in old if name not in new]
    found += [
        f"The task {name} has other content, so its figures are compared unpaired."
        for name in old
        if name in new and old[name].sha256 != new[name].sha256
    ]
    return found


def _remarks_on_targets(before: Profile, after: Profile, names: Sequence[str]) -> list[str]:
    old, new = ({t.name: t for t in each.targets if t.name in names} for each in (before, after))
    found = [f"The target {name} came." for name in new if name not in old]
    found += [f"The target {name} went." for name in old if name not in new]
    for name in (name for name in new if name in old):
        found += _remarks_on_target(old[name], new[name])
        ms = [each.reference_cell(name).p50_ms for each in (before, after)]
        if old[name].reference == new[name].reference:
            found.append(
                f"{name}: latency is relative to {new[name].reference}, whose p50 was "
                f"{ms[0]:.2f} ms and is {ms[1]:.2f} ms."
            )
    return found


def _remarks_on_target(old: TargetInfo, new: TargetInfo) -> list[str]:
    """Say what bears on the latency of a target that two profiles have."""
    name, found = new.name, []
    if not same_machine(old.machine, new.machine):
        machines = [described(each.machine) for each in (old, new)]
        found.append(f"{name}: the machine was {machines[0]}, and is {machines[1]}.")
    if old.shapes[0] != new.shapes[0]:
        shapes = [f"{each.shapes[0].batch} x {each.shapes[0].sequence}" for each in (old, new)]
        found.append(f"{name}: latency was of {shapes[0]} tokens, and is of {shapes[1]}.")
    if old.reference != new.reference:
        found.append(
            f"{name}: the reference cell was {old.reference} and is {new.reference}, so latency "
            "is not compared."
        )
    for when, each in (("was", old), ("is", new)):
        if each.noise is not None and each.noise.verdict != "quiet":
            found.append(f"{name}: the machine {when} {each.noise.verdict}.")
    return found
