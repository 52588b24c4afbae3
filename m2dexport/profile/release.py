"""Bundles for targets: the best cell of each within its budget, measured where it has to be."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from m2dexport.checkpoint.open import Checkpoint
from m2dexport.data import calibration_texts
from m2dexport.engines import Device, Here, here
from m2dexport.errors import M2DError, UsageError
from m2dexport.files import require_file
from m2dexport.profile.deploy import Deployment, bundle_cell
from m2dexport.profile.measured_for import measured_otherwise
from m2dexport.profile.plan import Plan, plan_for, within_length
from m2dexport.profile.schema import Cell, Profile
from m2dexport.profile.select import Selection, select_cell
from m2dexport.profile.sweep import profile_checkpoint
from m2dexport.profile.target import Target, load_target
from m2dexport.progress import OnProgress, one_step
from m2dexport.runtime.bundle import VerifyReport, verify_bundle
from m2dexport.vectors.tasks import Task, default_tasks

#: The limits that hold on the target's device only; quality and size are the same on any.
_OF_THE_DEVICE = ("p50_ms", "p95_ms", "memory_mb")


@dataclass(frozen=True)
class Basis:
    """What cells are chosen from, and what bundles are made with."""

    profile: Profile | None = None  # None: every target is measured
    tasks: Sequence[Task] = ()  # to measure quality on; none: those that ship
    deployment: Deployment = Deployment()  # the texts are those to measure with, too


@dataclass(frozen=True)
class Outcome:
    """What became of a target."""

    target: str  # its name
    path: Path  # of its bundle
    measured: bool = False  # now, and not taken from the profile
    lacks: str | None = None  # why the engine's oracle stood in for the device; None: it did not
    unchecked: tuple[str, ...] = ()  # limits of the budget that therefore could not be checked
    selection: Selection | None = None  # None: no cell was chosen
    report: VerifyReport | None = None  # of the bundle; None: there is none
    failure: str | None = None  # why there is none


@dataclass(frozen=True)
class _Work:
    """What is the same for all targets, and what was measured for those before."""

    checkpoint: Checkpoint
    basis: Basis
    on_progress: OnProgress
    measured: dict[Plan, Profile | M2DError] = field(default_factory=dict)


def build_for_targets(
    checkpoint: Checkpoint,
    targets: Sequence[str | Path],
    out: str | Path,
    basis: Basis = Basis(),
    on_progress: OnProgress = lambda *_: None,
    *,
    force: bool = False,
) -> tuple[Outcome, ...]:
    """Choose the best cell within each target's budget, build it, pack it and verify it.

    A target that the profile was not measured for is measured; those of one plan are measured
    once. What fails for one target is in its outcome, and the others are built all the same.

    Args:
        checkpoint: what is sliced; with a profile, what that measured (``open_profiled``).
        targets: names of shipped targets, or .toml files; each has a budget.
        out: the folder for the bundles, which are named for their targets: ``edge-cpu.m2d``.
        basis: the profile, evaluation data and texts.
        on_progress: called at every step, which begins with the target's name.
        force: whether bundles that are there are replaced.

    Returns:
        An outcome per target.

    Raises:
        UsageError: before any work, when a target cannot be read or limits nothing, two have one
            name, or a bundle is there and not to be replaced.

    Example:
        >>> build_for_targets(open_checkpoint(), ["edge-cpu", "browser"], "dist")[0].path
        PosixPath('dist/edge-cpu.m2d')
    """
    named = _named(targets)
    paths = {name: Path(out) / f"{name}.m2d" for name in named}
    for path in paths.values():
        require_file(path, force=force)
    work = _Work(checkpoint, basis, on_progress)
    return tuple(
        _outcome(target, Outcome(name, paths[name]), work, force=force)
        for name, target in named.items()
    )


def _named(targets: Sequence[str | Path]) -> dict[str, Target]:
    named: dict[str, Target] = {}
    for each in targets:
        name, target = Path(each).stem, load_target(each)
        if name in named:
            raise UsageError(
                f"two targets are named {name}, and so would their bundles be; name each once, or "
                "rename a file."
            )
        if not target.budget.limits():
            raise UsageError(
                f"the target {name} limits nothing; give it a [budget] such as p95_ms = 5.0."
            )
        named[name] = target
    return named


def _outcome(target: Target, outcome: Outcome, work: _Work, *, force: bool) -> Outcome:
    """Return an outcome with all that is reached, and the failure that ended it."""
    try:
        plan = plan_for(work.checkpoint, target)
        found = here(plan.engine, plan.device, elsewhere=True)
        outcome = replace(outcome, lacks=found.lacks)
        profile = _given(target, outcome.target, work.basis)
        if profile is None:
            profile = _measured(_measurable(plan, found), outcome.target, work)
            unchecked = _OF_THE_DEVICE if found.lacks else ()
            limited = tuple(key for key in unchecked if key in target.budget.limits())
            outcome = replace(outcome, measured=True, unchecked=limited)
        budget = target.budget.model_copy(update=dict.fromkeys(outcome.unchecked))
        held = _held(profile, outcome.target)
        selection = select_cell(profile, budget, target=held)
        outcome = replace(outcome, selection=selection)
        deployment = replace(_deployment(selection.cell, plan, found, work), target=held)
        with one_step(work.on_progress, f"{outcome.target}: build"):
            bundle_cell(
                profile, selection.cell.id, work.checkpoint, outcome.path, deployment, force=force
            )
            report = _verified(outcome.path, found.device if deployment.elsewhere else Device())
    except M2DError as error:
        return replace(outcome, failure=str(error))
    return replace(outcome, report=report)


def _given(target: Target, name: str, basis: Basis) -> Profile | None:
    """Return the profile if it was measured for a target; warn why it is not used."""
    if basis.profile is None:
        return None
    reason = measured_otherwise(basis.profile, target, _held(basis.profile, name))
    if reason is None:
        return basis.profile
    warnings.warn(f"{reason}; {name} is measured now.", stacklevel=4)
    return None


def _held(profile: Profile, name: str) -> str:
    """Return the profile's target of a name; where there is none, the first."""
    return name if any(each.name == name for each in profile.targets) else profile.targets[0].name


def _measured(plan: Plan, name: str, work: _Work) -> Profile:
    """Return the profile of a plan, measured unless a target before had the same.

    Raises:
        M2DError: when it cannot be measured.
    """
    basis, deployment = work.basis, work.basis.deployment
    if plan not in work.measured:
        try:
            work.measured[plan] = profile_checkpoint(
                work.checkpoint,
                basis.tasks or default_tasks(),
                deployment.calibration or calibration_texts(),
                replace(plan, align_texts=deployment.align_texts),
                on_progress=lambda step, *count: work.on_progress(f"{name}: {step}", *count),
            )
        except M2DError as error:
            work.measured[plan] = error
    found = work.measured[plan]
    if isinstance(found, M2DError):
        raise found
    return found


def _measurable(plan: Plan, found: Here) -> Plan:
    """Return a plan for what is here; where the oracle stands in, its latency says nothing."""
    plan = replace(plan, device=found.device)
    return replace(plan, shapes=plan.shapes[:1], repeats=1) if found.lacks else plan


def _deployment(cell: Cell, plan: Plan, found: Here, work: _Work) -> Deployment:
    """Return how a cell is deployed: for the target's device, whatever it was measured on."""
    if cell.engine != plan.engine:  # depth 0 has an engine of its own
        return work.basis.deployment
    whole = within_length(plan, work.checkpoint.max_length)
    deployment = replace(work.basis.deployment, compilation=whole.compilation)
    return replace(deployment, device=plan.device, elsewhere=True) if found.lacks else deployment


def _verified(path: Path, device: Device) -> VerifyReport:
    """Verify a bundle on all its threads; one that fails is removed.

    Raises:
        M2DError: when it does not run, or reproduce its golden texts.
    """
    try:
        return verify_bundle(path, device)
    except M2DError:
        path.unlink()
        raise
