"""The gate: what of a profile fell behind a baseline, by more than is allowed and than noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from m2dexport.errors import UsageError
from m2dexport.profile.compare import (
    Figure,
    compare_cell,
    remarks_on,
    remarks_on_devices,
)
from m2dexport.profile.schema import Cell, Profile, TargetInfo
from m2dexport.runtime.cells import unknown_cell


@dataclass(frozen=True)
class Limits:
    """How far a cell may fall behind its baseline."""

    quality_drop: float = 0.5  # points at most, in the mean and in every task's main metric
    slowdown: float = 1.1  # factor at most, of p50 over that of the reference cell
    growth: float = 1.02  # factor at most, of the files' size
    strict: bool = False  # what is beyond a limit fails also where that may be noise


@dataclass(frozen=True)
class Check:
    """One figure of a cell, held against its baseline."""

    target: str
    cell: str  # id
    figure: Figure | None  # None: the cell is missing now
    within_noise: bool = False  # beyond the limit, and not surely so
    failure: str | None = None  # what is wrong, without the cell's name; None: nothing


@dataclass(frozen=True)
class Verdict:
    """What the gate says of a profile."""

    checks: tuple[Check, ...]
    remarks: tuple[str, ...]  # a sentence each: what was not measured alike

    @property
    def failures(self) -> tuple[Check, ...]:
        """The checks that failed."""
        return tuple(check for check in self.checks if check.failure is not None)


@dataclass(frozen=True)
class Scope:
    """What is held against the baseline."""

    #: Ids; none: the baseline's reference, its recommended cells, and all layers and dims in every
    #: weight precision.
    cells: tuple[str, ...] = ()
    all_cells: bool = False  # all of the baseline's, then
    target: str | None = None  # name; None: every target of the baseline
    other_checkpoint: bool = False  # whether the baseline may be of another checkpoint


def check_profile(
    profile: Profile, baseline: Profile, limits: Limits = Limits(), scope: Scope = Scope()
) -> Verdict:
    """Hold a profile against a baseline.

    A figure fails when it is worse by more than the limit and, unless the limits are strict, the
    95% interval of the change excludes no change; a cell that is missing now fails, too. Quality
    is compared over the baseline's tasks, latency as the ratio to each profile's own reference
    cell.

    Args:
        profile: what was measured now.
        baseline: what it is held against.
        limits: how far it may fall behind.
        scope: the cells and targets, and whether another checkpoint is expected.

    Raises:
        UsageError: when a limit is not a finite number, or too low; when the two cannot be
            compared: other evaluation data, a checkpoint of another shape, or another one unless
            ``scope`` allows it; when one is a shard; or when a target or cell is named that is
            not there.
    """
    _require_limits(limits)
    require_comparable(profile, baseline, other_checkpoint=scope.other_checkpoint)
    wanted = [t for t in baseline.targets if scope.target in (None, t.name)]
    if not wanted:
        baseline.target(scope.target)
    _require_cells(baseline, wanted, scope)
    checks: list[Check] = []
    remarks: list[str] = []
    counts: list[str] = []
    for target in wanted:
        _require_target(profile, target)
        cells = {cell.id: cell for cell in profile.of_target(target.name)}
        pairs = [(old, cells.get(old.id)) for old in _cells_to_check(baseline, target, scope)]
        remarks += remarks_on_devices(pairs)
        for old, new in pairs:
            checks += (
                [_missing(profile, old)]
                if new is None
                else _checks(baseline, profile, (old, new), limits)
            )
        of = f"{len(pairs)} of {len(baseline.of_target(target.name))}"
        counts.append(f"{target.name}: {of} cells of the baseline were checked.")
    remarks += remarks_on(baseline, profile, [target.name for target in wanted])
    return Verdict(tuple(checks), (*_remarks_on_noise(checks), *remarks, *counts))


def _require_limits(limits: Limits) -> None:
    """Refuse limits that limit nothing: of NaN, nothing is more."""
    lowest = {"quality_drop": 0, "slowdown": 1, "growth": 1}
    for name, low in lowest.items():
        value = getattr(limits, name)
        if not (math.isfinite(value) and value >= low):
            option = f"--max-{name.replace('_', '-')}"
            raise UsageError(f"{option} is {value}; it must be a finite number of {low} or more.")


def _remarks_on_noise(checks: Sequence[Check]) -> list[str]:
    unsure = [check for check in checks if check.within_noise and check.failure is None]
    if not unsure:
        return []
    first = unsure[0]
    figures, are = ("figure", "is") if len(unsure) == 1 else ("figures", "are")
    named = f"{first.figure.name} of {first.cell} ({first.target})" if first.figure else first.cell
    return [
        f"{len(unsure)} {figures} {are} worse than is allowed, and too noisy to tell, such as "
        f"{named}: measure again, with more texts or on a quieter machine, or let that fail by "
        "--strict."
    ]


def require_comparable(profile: Profile, baseline: Profile, *, other_checkpoint: bool) -> None:
    """Refuse a baseline that says nothing of a profile.

    Raises:
        UsageError: when one is a shard, their evaluation data differ, or their checkpoints do:
            in shape, or, without ``other_checkpoint``, in content.
    """
    for what, each in (("profile", profile), ("baseline", baseline)):
        if each.shard is not None:
            raise UsageError(
                f"the {what} is the shard {each.shard}; join all shards with profile merge first."
            )
    old, new = baseline.checkpoint, profile.checkpoint
    if (old.layers, old.dim) != (new.layers, new.dim):
        raise UsageError(
            f"the baseline is of a checkpoint of {old.layers} layers and {old.dim} dims, and the "
            f"profile of one of {new.layers} and {new.dim}; name a baseline of the same shape."
        )
    if old.sha256 != new.sha256 and not other_checkpoint:
        raise UsageError(
            f"the baseline is of another checkpoint ({old.sha256[:12]}, and here "
            f"{new.sha256[:12]}); pass --other-checkpoint to hold a retrained one against it."
        )
    if old.model_sha256 != new.model_sha256 and not other_checkpoint:
        raise UsageError(
            "the baseline is of the same weights with another tokenizer, configuration, pooling, "
            "prompts or maximum length; pass --other-checkpoint if that is the point."
        )
    _require_tasks(profile, baseline)


def _require_tasks(profile: Profile, baseline: Profile) -> None:
    there = {(task.name, task.main_metric): task.sha256 for task in profile.tasks}
    for task in baseline.tasks:
        found = there.get((task.name, task.main_metric))
        if found is None:
            raise UsageError(
                f"the baseline has the task {task.main}, and the profile has "
                "not; profile with the same --eval."
            )
        if found != task.sha256:
            raise UsageError(
                f"the task {task.name} of the profile has other content than the baseline's; "
                "profile with the same --eval, or make a new baseline."
            )


def _require_target(profile: Profile, target: TargetInfo) -> None:
    known = {each.name: each for each in profile.targets}
    if target.name not in known:
        raise UsageError(
            f"the baseline has the target {target.name}, and the profile has "
            f"{', '.join(known)} only; profile that target, too, or name one with --target."
        )
    found = known[target.name]
    if found.reference != target.reference:
        raise UsageError(
            f"latency of the target {target.name} was relative to {target.reference} and is to "
            f"{found.reference}; make a new baseline."
        )
    if found.shapes[0] != target.shapes[0]:
        raise UsageError(
            f"latency of the target {target.name} is of another shape than the baseline's; "
            "profile the shape of the baseline, or make a new one."
        )


def _require_cells(baseline: Profile, targets: Sequence[TargetInfo], scope: Scope) -> None:
    if scope.cells and scope.all_cells:
        raise UsageError("--cell names some cells and --all takes every one; leave one out.")
    ids = [cell.id for target in targets for cell in baseline.of_target(target.name)]
    for name in scope.cells:
        if name not in ids:
            raise unknown_cell("the baseline", name, ids)


def _cells_to_check(baseline: Profile, target: TargetInfo, scope: Scope) -> Sequence[Cell]:
    cells = {cell.id: cell for cell in baseline.of_target(target.name)}
    if scope.all_cells:
        return list(cells.values())
    told = target.recommended
    reference = cells[target.reference]
    whole = [
        cell.id
        for cell in cells.values()
        if (cell.layers, cell.dim, cell.vectors) == (reference.layers, reference.dim, "float32")
    ]
    names = scope.cells or (
        *(target.reference, told.best, told.balanced, told.smallest),
        *([told.within_budget] if told.within_budget else []),
        *whole,
    )
    return [cells[name] for name in dict.fromkeys(names) if name in cells]


def _missing(profile: Profile, old: Cell) -> Check:
    reason = profile.failure_of(old.id, old.target)
    failure = f"failed when measured: {reason}" if reason else "was not measured"
    return Check(old.target, old.id, None, failure=failure)


def _checks(
    baseline: Profile, profile: Profile, cells: tuple[Cell, Cell], limits: Limits
) -> list[Check]:
    change = compare_cell(baseline, profile, *cells)
    return [
        _check(change.target, change.cell, figure, limits)
        for figure in change.figures
        if figure.kind != "memory"
    ]


def _check(target: str, cell: str, figure: Figure, limits: Limits) -> Check:
    if figure.kind == "quality":
        beyond = -figure.change > limits.quality_drop
        said = f"fell by {-figure.change:.2f} points, and {limits.quality_drop:g} are allowed"
    elif figure.kind == "latency":
        beyond = figure.change > limits.slowdown
        said = f"rose {figure.change:.2f} times, and {limits.slowdown:g} are allowed"
    else:
        beyond = figure.change > limits.growth
        said = f"grew {figure.change:.2f} times, and {limits.growth:g} are allowed"
    sure = figure.moved or figure.kind == "size"
    unsure = beyond and not sure and not figure.below_grain
    said += ", which may be noise" if unsure else ""
    fails = (beyond and sure) or (unsure and limits.strict)
    return Check(
        target,
        cell,
        figure,
        within_noise=unsure,
        failure=f"{figure.name} {said}" if fails else None,
    )
