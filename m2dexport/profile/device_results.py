"""Results of ``m2dexport bench --json`` on a device, as cells of a target of a profile."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from m2dexport.errors import UsageError
from m2dexport.precisions import WEIGHT_PRECISIONS, Align, Isa, VectorPrecision, WeightPrecision
from m2dexport.profile.bounds import Count, Elapsed, Name, Natural, Positive
from m2dexport.profile.compare import described, quotient, same_machine
from m2dexport.profile.joining import noisiest, rejudged
from m2dexport.profile.schema import (
    Cell,
    Latency,
    Machine,
    MeasuredOn,
    Noise,
    Profile,
    Recommended,
    Shape,
    SizeParts,
    TargetInfo,
    Tokenization,
)
from m2dexport.runtime.cells import cell_id
from m2dexport.strict import shown

FORMAT = 1
_KIND = "bench"


class _Table(BaseModel):
    """A part of a result; what a later version adds to it does no harm."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)


class MeasuredCell(_Table):
    """What was measured."""

    layers: Natural
    dim: Count
    align: Align
    weights: WeightPrecision
    vectors: VectorPrecision
    engine: str
    isa: Isa
    device: MeasuredOn
    checkpoint_sha256: str | None
    full_model_sha256: str | None  # that of the model which an aligned cell is aligned with
    size_bytes: Count
    size_parts: SizeParts

    @property
    def id(self) -> str:
        """The id of the cell in a profile."""
        return cell_id(self.layers, self.dim, self.weights, self.vectors, self.align, self.engine)


class DeviceResult(_Table):
    """What ``bench --json`` prints."""

    format: Literal[1]
    kind: Literal["bench"]
    name: Name  # of the device
    created: str
    cell: MeasuredCell
    machine: Machine
    shapes: tuple[Shape, ...]
    asked: tuple[Shape, ...]
    latency: tuple[Latency, ...]
    tokenization: tuple[Tokenization, ...]
    text_p50_ms: Positive | None
    load_ms: Elapsed
    first_ms: Elapsed
    peak_memory_bytes: Natural
    used_memory_bytes: Natural
    noise: Noise | None


def is_result(stored: Any) -> bool:
    """Say whether a JSON value is a result of ``bench``."""
    return isinstance(stored, dict) and stored.get("kind") == _KIND


def result_from(stored: Any, path: Path) -> DeviceResult:
    """Return the result that a JSON value is.

    Raises:
        UsageError: when it is none, or of another format.
    """
    number = stored.get("format")
    if number != FORMAT:
        raise UsageError(
            f"{path} is a result of bench in format {shown(number)}, and this version reads format "
            f"{FORMAT}; measure and merge with one version of m2dexport."
        )
    try:
        result = DeviceResult.model_validate(stored)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UsageError(f"{path} is not a result of bench: {where}: {first['msg']}.") from error
    if not result.latency or not result.shapes:
        raise UsageError(f"{path} holds no latency; measure again.")
    timed = [(each.batch, each.sequence) for each in result.latency]
    if timed != [(each.batch, each.sequence) for each in result.shapes]:
        raise UsageError(f"{path} has latency of other shapes than it names; measure again.")
    return result


def add_results(
    profile: Profile, results: Sequence[tuple[Path, DeviceResult]], name: str | None = None
) -> Profile:
    """Return a profile with results from devices as targets of their own.

    A result has what a cell costs there; the quality is that of the profile's cell of the same id,
    which is the same on every device. The reference of such a target is the deepest, widest, least
    quantized cell that was measured there.

    Args:
        profile: of the checkpoint that the bundles were made of.
        results: each with its file; those of one device become one target.
        name: of the target; None: the name that each result has for its device.

    Raises:
        UsageError: when a result is of another checkpoint or of a cell that the profile lacks, a
            target of its name is there already or on another machine, or a cell is there twice.
    """
    by_target: dict[str, list[tuple[Path, DeviceResult]]] = {}
    for path, result in results:
        by_target.setdefault(name or result.name, []).append((path, result))
    for target, found in by_target.items():
        profile = _with_target(profile, target, found)
    return rejudged(profile, list(by_target))


def _with_target(
    profile: Profile, name: str, results: Sequence[tuple[Path, DeviceResult]]
) -> Profile:
    first_path = results[0][0]
    if name in {target.name for target in profile.targets}:
        raise UsageError(
            f"{first_path} is of the target {name}, which the profile has already; merge all "
            "results of one device at once, or name another target by --name."
        )
    cells: dict[str, Cell] = {}
    for path, result in results:
        _require_same_device(name, results[0], (path, result))
        if result.cell.id in cells:
            raise UsageError(
                f"{path} measured {result.cell.id}, which another file has for {name} already; "
                "name each cell once."
            )
        cells[result.cell.id] = _cell(profile, name, path, result)
    reference = min(cells.values(), key=_distance_from_reference)
    return profile.model_copy(
        update={
            "targets": (*profile.targets, _target(name, reference, [r for _, r in results])),
            "cells": (*profile.cells, *(_relative(cell, reference) for cell in cells.values())),
        }
    )


def _require_same_device(
    name: str, one: tuple[Path, DeviceResult], two: tuple[Path, DeviceResult]
) -> None:
    (first_path, first), (path, result) = one, two
    if not same_machine(first.machine, result.machine):
        raise UsageError(
            f"{first_path} and {path} measured the target {name} on two machines "
            f"({described(first.machine)}; {described(result.machine)}); give each a name of its "
            "own by bench --name."
        )
    if first.shapes[0] != result.shapes[0]:
        raise UsageError(
            f"{first_path} and {path} measured the target {name} at different shapes; measure one "
            "of them again."
        )


def _cell(profile: Profile, target: str, path: Path, result: DeviceResult) -> Cell:
    """Return the profile's cell with the costs of a result; ``_relative`` knows the rest."""
    measured, first = result.cell, result.latency[0]
    of = {measured.checkpoint_sha256, measured.full_model_sha256} - {None}
    if not of:
        raise UsageError(
            f"{path} does not say which checkpoint its bundle was made of; build the bundle again, "
            "and measure that."
        )
    if profile.checkpoint.sha256 not in of:
        raise UsageError(f"{path} is of another checkpoint than the profile; profile that one.")
    alike = [c for c in profile.cells if (c.id, c.isa) == (measured.id, measured.isa)]
    if not alike:
        raise UsageError(
            f"{path} measured {measured.id} of isa={measured.isa}, and the profile has no quality "
            "of such a cell; profile it, too."
        )
    costs = (
        *("latency", "text_p50_ms", "load_ms", "first_ms"),
        *("peak_memory_bytes", "used_memory_bytes"),
    )
    return alike[0].model_copy(
        update={
            "target": target,
            "device": measured.device,
            "size_bytes": measured.size_bytes,
            "size_parts": measured.size_parts,
            "p50_ms": first.p50_ms,
            "p95_ms": first.p95_ms,
            "p99_ms": first.p99_ms,
            "flags": tuple(flag for flag in alike[0].flags if flag != "reference"),
            **{name: getattr(result, name) for name in costs},
        }
    )


def _distance_from_reference(cell: Cell) -> tuple[int, ...]:
    """Return what orders cells from the deepest, widest, least quantized one on."""
    weights, vectors = WEIGHT_PRECISIONS.index(cell.weights), cell.bytes_per_vector / cell.dim
    return (-cell.layers, -cell.dim, weights, -int(8 * vectors), cell.align == "full")


def _relative(cell: Cell, reference: Cell) -> Cell:
    """Return a cell with its latency over that of the reference, which ran apart from it."""
    if cell.id == reference.id:
        ratio, interval = 1.0, cell.ratio_interval.model_copy(update={"low": 1.0, "high": 1.0})
    else:
        ratio, interval = quotient(
            cell.p50_ms,
            cell.latency[0].p50_interval,
            reference.p50_ms,
            reference.latency[0].p50_interval,
        )
    return cell.model_copy(update={"ratio": ratio, "ratio_interval": interval})


def _target(name: str, reference: Cell, results: Sequence[DeviceResult]) -> TargetInfo:
    first, none = results[0], reference.id
    return TargetInfo(
        name=name,
        description="measured by bench",
        engines=tuple(dict.fromkeys(result.cell.engine for result in results)),
        machine=first.machine,
        noise=noisiest([result.noise for result in results]),
        shapes=first.shapes,
        asked=first.asked,
        tokenization=first.tokenization,
        budget={},
        reference=reference.id,
        recommended=Recommended(best=none, balanced=none, smallest=none, within_budget=None),
        samples=(),
    )
