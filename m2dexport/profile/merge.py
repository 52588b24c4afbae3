"""One profile from several: the shards of a sweep, other targets, results from devices."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from m2dexport.errors import UsageError
from m2dexport.precisions import WEIGHT_PRECISIONS
from m2dexport.profile.compare import described, same_machine
from m2dexport.profile.consistency import contradictions
from m2dexport.profile.device_results import DeviceResult, add_results, is_result, result_from
from m2dexport.profile.frontier import QUALITY_NOISE
from m2dexport.profile.joining import noisiest, rejudged, unique
from m2dexport.profile.manifest import profile_from, read_stored
from m2dexport.profile.schema import Cell, Profile, TargetInfo
from m2dexport.strict import require_name, sha256_of_json


@dataclass(frozen=True)
class Part:
    """A profile that is merged with others."""

    path: Path  # for messages
    profile: Profile


def merge_files(paths: Sequence[str | Path], name: str | None = None) -> Profile:
    """Return one profile of several files.

    Shards of one sweep become the whole; profiles of other targets, and what ``bench --json`` wrote
    on a device, become targets beside the first's.

    Args:
        paths: profiles, and results of ``bench``, in any order; what only one of them can say,
            the first says.
        name: of the target that results become; None: what each calls its device.

    Raises:
        UsageError: naming the files that do not go together.
    """
    parts: list[Part] = []
    results: list[tuple[Path, DeviceResult]] = []
    for path in map(Path, paths):
        stored = read_stored(path)
        if is_result(stored):
            results.append((path, result_from(stored, path)))
        else:
            parts.append(Part(path, profile_from(stored, path)))
    if not parts:
        raise UsageError(
            "no profile is among the files; results from a device take their quality from the "
            "profile.json of the same checkpoint: name it, too."
        )
    if name is not None and not results:
        raise UsageError("--name names the target of results from a device, and there are none.")
    if name is not None:
        require_name(name, "the target")
    whole = merge_profiles(parts)
    merged = add_results(whole, results, name) if results else whole
    for reason in contradictions(merged):
        raise UsageError(f"the files do not go together: {reason}.")
    return merged


def merge_profiles(parts: Sequence[Part]) -> Profile:
    """Return one profile of several of one checkpoint.

    Raises:
        UsageError: when they are of other checkpoints, evaluation data or texts; shards are
            missing, there twice or of different sweeps; or two have a target of one name.
    """
    for part in parts[1:]:
        _require_alike(parts[0], part)
    sweeps: dict[tuple[str, ...], list[Part]] = {}
    wholes = []
    for part in parts:
        if part.profile.shard is None:
            wholes.append(part)
        else:
            names = tuple(target.name for target in part.profile.targets)
            sweeps.setdefault(names, []).append(part)
    wholes += [Part(shards[0].path, _joined(shards)) for shards in sweeps.values()]
    merged = wholes[0]
    for part in wholes[1:]:
        _require_other_targets(merged, part, wholes)
        merged = Part(merged.path, _united(merged.profile, part.profile))
    return merged.profile


def _require_alike(first: Part, other: Part) -> None:
    """Refuse profiles whose figures do not stand beside each other."""
    one, two, files = first.profile, other.profile, f"{first.path} and {other.path}"
    if one.checkpoint.sha256 != two.checkpoint.sha256:
        raise UsageError(f"{files} are of different checkpoints; merge profiles of one.")
    if one.checkpoint.model_sha256 != two.checkpoint.model_sha256:
        raise UsageError(
            f"{files} are of the same weights with another tokenizer, configuration, pooling, "
            "prompts or maximum length; profile both alike."
        )
    contents = {task.name: task.sha256 for task in one.tasks}
    for task in two.tasks:
        if contents.get(task.name, task.sha256) != task.sha256:
            raise UsageError(
                f"{files} have a task {task.name} each, of different content; rename the file or "
                "folder of one, and profile it again."
            )
    names = [", ".join(sorted(p.mains)) for p in (one, two)]
    if names[0] != names[1]:
        raise UsageError(
            f"{files} have different tasks, {names[0]} and {names[1]}; profile both with the same "
            "--eval."
        )
    fitted = [each.aligned_with.sha256 for each in (one, two) if each.aligned_with]
    if one.calibration_sha256 != two.calibration_sha256 or len(set(fitted)) > 1:
        raise UsageError(
            f"{files} were calibrated or aligned with different texts; profile both with the same "
            "--calibration and --align-texts."
        )


def _require_other_targets(first: Part, other: Part, wholes: Sequence[Part]) -> None:
    known = {target.name: target for target in first.profile.targets}
    for target in other.profile.targets:
        if target.name not in known:
            continue
        holder = next(
            each.path for each in wholes if target.name in {t.name for t in each.profile.targets}
        )
        said = f"{holder} and {other.path} both have the target {target.name}"
        machines = known[target.name].machine, target.machine
        if not same_machine(*machines):
            said += f", of two machines ({described(machines[0])}; {described(machines[1])})"
        raise UsageError(f"{said}; profile one of them with a --target of another name.")


def _joined(shards: Sequence[Part]) -> Profile:
    """Return the whole that the shards of one sweep are parts of."""
    shards = _in_order(shards)
    first = shards[0]
    for shard in shards[1:]:
        _require_one_sweep(first, shard)
    profiles = [shard.profile for shard in shards]
    return rejudged(
        profiles[0].model_copy(
            update={
                "shard": None,
                "targets": tuple(
                    _joined_target([each.target(target.name) for each in profiles])
                    for target in first.profile.targets
                ),
                "cells": _joined_cells(profiles),
                **_shared(profiles),
            }
        ),
        [target.name for target in first.profile.targets],
    )


def _joined_cells(profiles: Sequence[Profile]) -> tuple[Cell, ...]:
    """Return all cells, each once: by engine, depth, alignment, weights, dim and vectors.

    Every shard measures the reference, also where it is not of its part; such a copy is flagged,
    and counts only where no shard has the cell as its own. It then stands first.
    """
    cells = [cell for profile in profiles for cell in profile.cells]
    own_first = sorted(cells, key=lambda cell: "reference" in cell.flags)
    layers, dims, vectors = (
        list(dict.fromkeys(getattr(cell, name) for cell in own_first))
        for name in ("layers", "dim", "vectors")
    )
    targets = [target.name for target in profiles[0].targets]
    engines = list(dict.fromkeys(e for p in profiles for t in p.targets for e in t.engines))

    def place(cell: Cell) -> tuple[object, ...]:
        return (
            targets.index(cell.target),
            "reference" not in cell.flags,
            engines.index(cell.engine) if cell.engine in engines else 0,  # depth 0 has its own
            layers.index(cell.layers),
            cell.align == "full",
            WEIGHT_PRECISIONS.index(cell.weights),
            dims.index(cell.dim),
            vectors.index(cell.vectors),
        )

    return tuple(sorted(unique(own_first, lambda cell: (cell.target, cell.id)), key=place))


def _in_order(shards: Sequence[Part]) -> list[Part]:
    """Return shards by their number.

    Raises:
        UsageError: when one is missing, or there twice, or they are parts of different wholes.
    """
    found: dict[int, Part] = {}
    counts = set()
    for shard in shards:
        match = re.fullmatch(r"(\d+)/(\d+)", shard.profile.shard or "")
        if match is None:
            raise UsageError(f"{shard.path} has the shard {shard.profile.shard!r}, not 1/2 or so.")
        number, count = int(match[1]), int(match[2])
        counts.add(count)
        if number in found:
            raise UsageError(
                f"{found[number].path} and {shard.path} are both the shard {shard.profile.shard}; "
                "name each once."
            )
        found[number] = shard
    if len(counts) > 1:
        raise UsageError(
            f"the shards are of sweeps in {' and '.join(map(str, sorted(counts)))} parts; merge "
            "those of one."
        )
    count = counts.pop()
    missing = [f"{number}/{count}" for number in range(1, count + 1) if number not in found]
    if missing:
        raise UsageError(
            f"of the {count} shards, {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} "
            "missing; name all of them."
        )
    return [found[number] for number in sorted(found)]


def _require_one_sweep(first: Part, other: Part) -> None:
    """Refuse shards that were measured by other versions, on another machine or otherwise."""
    one, two, files = first.profile, other.profile, f"{first.path} and {other.path}"
    for name in sorted({*one.tools, *two.tools}):
        versions = [each.tools.get(name, "none") for each in (one, two)]
        if versions[0] != versions[1]:
            raise UsageError(
                f"{files} were measured by {name} {versions[0]} and {versions[1]}; measure all "
                "shards by one version."
            )
    for old, new in zip(one.targets, two.targets, strict=True):
        if not same_machine(old.machine, new.machine):
            raise UsageError(
                f"{files} measured the target {old.name} on two machines "
                f"({described(old.machine)}; {described(new.machine)}); measure all shards of a "
                "target on machines of one kind."
            )
        options = [(t.shapes, t.asked, t.reference, t.budget) for t in (old, new)]
        if options[0] != options[1]:
            raise UsageError(
                f"{files} measured the target {old.name} at different shapes, against different "
                "references or for different budgets; measure all shards with the same options."
            )
    if one.decided_by != two.decided_by:
        raise UsageError(
            f"{files} are shards of different sweeps: their grids, threads, repeats or texts "
            "differ; measure all shards with the same options."
        )
    for target in one.targets:
        _require_one_reference(first, other, target.name)


def _require_one_reference(first: Part, other: Part, target: str) -> None:
    """Refuse shards whose copies of the reference have other quality, beyond rounding."""
    points = [part.profile.reference_cell(target).mean_quality for part in (first, other)]
    if abs(points[0] - points[1]) > QUALITY_NOISE:
        raise UsageError(
            f"{first.path} and {other.path} have a reference cell of {points[0]:.2f} and of "
            f"{points[1]:.2f} points for the target {target}; measure the shards again."
        )


def _joined_target(parts: Sequence[TargetInfo]) -> TargetInfo:
    engines = dict.fromkeys(engine for each in parts for engine in each.engines)
    return parts[0].model_copy(
        update={
            "engines": tuple(engines),
            "noise": noisiest([each.noise for each in parts]),
            "samples": tuple(sample for each in parts for sample in each.samples),
        }
    )


def _united(first: Profile, other: Profile) -> Profile:
    """Return a profile with the targets of another beside its own."""
    return first.model_copy(
        update={
            "targets": (*first.targets, *other.targets),
            "cells": (*first.cells, *other.cells),
            **_shared([first, other]),
            "decided_by": sha256_of_json([first.decided_by, other.decided_by]),
        }
    )


def _shared(profiles: Sequence[Profile]) -> dict[str, object]:
    """Return the fields in which the parts of a profile are added up."""
    tools = {name: version for each in reversed(profiles) for name, version in each.tools.items()}
    steps = dict.fromkeys(step for each in profiles for step in each.seconds)
    return {
        "created": max(each.created for each in profiles),
        "tools": tools,
        "seconds": {step: sum(p.seconds.get(step, 0.0) for p in profiles) for step in steps},
        "aligned_with": next((p.aligned_with for p in profiles if p.aligned_with), None),
        "cross_depth": unique(
            (each for profile in profiles for each in profile.cross_depth),
            lambda each: (each.dim, each.queries, each.documents),
        ),
        "failures": unique(
            (each for profile in profiles for each in profile.failures), lambda each: each
        ),
    }
