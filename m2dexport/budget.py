"""Targets and budgets: profiles/*.toml, the Pareto frontier, and the best cell within limits."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError

from m2dexport.codecs import VectorPrecision
from m2dexport.errors import M2DError, UsageError
from m2dexport.manifest import MEAN, Cell, Profile
from m2dexport.weights import WeightPrecision

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_MEGA = 1e6

#: Smaller differences than these decide nothing: points of quality, factors of latency and size.
QUALITY_NOISE = 0.1
LATENCY_NOISE = 1.05
SIZE_NOISE = 1.01


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Budget(_Table):
    """What a deployment may cost and must give; a limit that is None does not count."""

    p50_ms: PositiveFloat | None = None
    p95_ms: PositiveFloat | None = None
    size_mb: PositiveFloat | None = Field(None, description="10^6 bytes")
    memory_mb: PositiveFloat | None = Field(None, description="10^6 bytes")
    vector_bytes: PositiveInt | None = None
    min_quality: float | None = Field(None, ge=0, le=100, description="points")
    metric: str = MEAN


class Grid(_Table):
    """The cells to profile; None takes the default."""

    layers: tuple[PositiveInt, ...] | None = None
    dims: tuple[PositiveInt, ...] | None = None
    weights: tuple[WeightPrecision, ...] | None = None
    vectors: tuple[VectorPrecision, ...] | None = None


class LatencyShapes(_Table):
    """The shapes to time; the first is the one that limits on latency mean."""

    shapes: tuple[tuple[PositiveInt, PositiveInt], ...] = Field(min_length=1)


class Target(_Table):
    """Where an artifact will run."""

    description: str
    engine: Literal["onnx", "openvino", "tensorrt"]
    provider: str
    threads: PositiveInt | None = None
    grid: Grid = Grid()
    latency: LatencyShapes | None = None
    budget: Budget = Field(default_factory=lambda: Budget.model_validate({}))


@dataclass(frozen=True)
class Selection:
    """The best cell within a budget."""

    cell: Cell
    points: float  # in the budget's metric
    metric: str
    binding: str | None  # the limit without which a better cell would fit; None: none does
    next_better: Cell | None  # that cell


@dataclass(frozen=True)
class _Limit:
    key: str
    limit: float
    sign: int  # 1: at most; -1: at least
    values: dict[str, float] = field(repr=False)  # cell id -> value

    def excess(self, cell: Cell) -> float:
        """Return by which share of the limit a cell misses it; 0 or less when it holds."""
        return self.sign * (self.values[cell.id] - self.limit) / max(abs(self.limit), 1e-9)


def load_target(name: str | Path) -> Target:
    """Read a target.

    Args:
        name: the name of a shipped target, such as "edge-cpu", or a .toml file.

    Raises:
        UsageError: naming the file, the key and what is allowed.
    """
    path = Path(name)
    if path.suffix != ".toml":
        shipped = {found.stem: found for found in _profiles_folder().glob("*.toml")}
        if str(name) not in shipped:
            raise UsageError(
                f"{name} is neither a .toml file nor a shipped target; those are: "
                f"{', '.join(sorted(shipped))}."
            )
        path = shipped[str(name)]
    try:
        stored = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{path} cannot be read as TOML: {error}.") from error
    target: Target = _validated(Target, stored, str(path))
    return target


def budget_from(target: str | Path | None, **limits: Any) -> Budget:
    """Return a target's budget with the limits that are given replaced.

    Raises:
        UsageError: when a limit is no positive number, or nothing is limited at all.
    """
    base = load_target(target).budget.model_dump() if target else {}
    given = {key: value for key, value in limits.items() if value is not None}
    budget: Budget = _validated(Budget, {**base, **given}, "the budget")
    if not any(value is not None for key, value in budget if key != "metric"):
        raise UsageError("no limit is given; pass --target or a limit such as --p95-ms 5.")
    return budget


def frontier(cells: Sequence[Cell]) -> frozenset[str]:
    """Return the ids of the cells that no other cell dominates.

    A cell dominates another when it is no worse in mean quality, p50 latency, file size and bytes
    per vector, and better in one of them. Differences of quality, latency and size within
    ``QUALITY_NOISE``, ``LATENCY_NOISE`` and ``SIZE_NOISE`` count as none.
    """
    quality = np.array([cell.mean_quality for cell in cells])
    cost = np.array([[cell.p50_ms, cell.size_bytes, cell.bytes_per_vector] for cell in cells])
    noise = np.array([LATENCY_NOISE, SIZE_NOISE, 1])
    best = []
    for index, cell in enumerate(cells):
        no_worse = (quality >= quality[index] - QUALITY_NOISE) & (cost <= cost[index] * noise).all(
            axis=1
        )
        better = (quality > quality[index] + QUALITY_NOISE) | (cost * noise < cost[index]).any(
            axis=1
        )
        if not (no_worse & better).any():
            best.append(cell.id)
    return frozenset(best)


def select_cell(profile: Profile, budget: Budget) -> Selection:
    """Return the cell of the highest quality within the budget.

    Ties go to the lower p50, then the smaller file, the fewer vector bytes, and the id.

    Raises:
        UsageError: when the profile lacks the budget's metric.
        M2DError: when no cell fits, naming the one that misses by the least.
    """
    limits = _limits(profile, budget)
    ranked = sorted(profile.cells, key=lambda cell: _rank(profile, cell, budget.metric))
    fitting = [cell for cell in ranked if all(limit.excess(cell) <= 0 for limit in limits)]
    if not fitting:
        nearest = min(ranked, key=lambda cell: max(limit.excess(cell) for limit in limits))
        missed = "; ".join(
            f"{limit.key} is {limit.values[nearest.id]:.4g} where {limit.limit:g} is "
            f"{'allowed' if limit.sign > 0 else 'needed'}"
            for limit in limits
            if limit.excess(nearest) > 0
        )
        raise M2DError(f"no cell fits the budget; the nearest is {nearest.id}: {missed}.")
    best = fitting[0]
    binding, better = _binding(ranked, best, limits)
    points = profile.metric(best, budget.metric)
    return Selection(best, points, budget.metric, binding, better)


def _limits(profile: Profile, budget: Budget) -> list[_Limit]:
    def limit(key: str, sign: int, values: dict[str, float]) -> list[_Limit]:
        bound = getattr(budget, key)
        return [] if bound is None else [_Limit(key, float(bound), sign, values)]

    cells = profile.cells
    return [
        *limit("p50_ms", 1, {c.id: c.p50_ms for c in cells}),
        *limit("p95_ms", 1, {c.id: c.p95_ms for c in cells}),
        *limit("size_mb", 1, {c.id: c.size_bytes / _MEGA for c in cells}),
        *limit("memory_mb", 1, {c.id: c.peak_memory_bytes / _MEGA for c in cells}),
        *limit("vector_bytes", 1, {c.id: c.bytes_per_vector for c in cells}),
        *limit("min_quality", -1, {c.id: profile.metric(c, budget.metric) for c in cells}),
    ]


def _rank(profile: Profile, cell: Cell, metric: str) -> tuple[float, float, int, int, str]:
    quality = profile.metric(cell, metric)
    return -quality, cell.p50_ms, cell.size_bytes, cell.bytes_per_vector, cell.id


def _binding(
    ranked: Sequence[Cell], best: Cell, limits: Sequence[_Limit]
) -> tuple[str | None, Cell | None]:
    """Return the limit whose removal admits the best cell that ranks above ``best``."""
    for cell in ranked[: ranked.index(best)]:
        missed = [limit.key for limit in limits if limit.excess(cell) > 0]
        if len(missed) == 1:
            return missed[0], cell
    if ranked[0] is not best:
        missed = [limit.key for limit in limits if limit.excess(ranked[0]) > 0]
        return " and ".join(missed), ranked[0]
    return None, None


def _profiles_folder() -> Path:
    """Return profiles/: in the package when installed, beside it in a clone."""
    packaged = Path(__file__).parent / "profiles"
    return packaged if packaged.is_dir() else Path(__file__).parent.parent / "profiles"


def _validated(model: type[Any], stored: dict[str, Any], where: str) -> Any:
    try:
        return model.model_validate(stored)
    except ValidationError as error:
        first = error.errors()[0]
        keys = [str(part) for part in first["loc"]]
        key = ".".join(keys)
        if first["type"] == "extra_forbidden":
            allowed = _keys_at(model, keys[:-1])
            close = difflib.get_close_matches(keys[-1], allowed, n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            message = f"{where} has an unknown key {key}{hint}; allowed are {', '.join(allowed)}."
        elif first["type"] == "missing":
            message = f"{where} lacks the key {key}."
        else:
            text = first["msg"][0].lower() + first["msg"][1:]
            message = f"{where}: {key} is {first['input']!r}; {text}."
        raise UsageError(message) from error


def _keys_at(model: type[BaseModel], keys: Sequence[str]) -> list[str]:
    for key in keys:
        annotation = model.model_fields[key].annotation
        options = get_args(annotation) or (annotation,)
        model = next(t for t in options if isinstance(t, type) and issubclass(t, BaseModel))
    return sorted(model.model_fields)
