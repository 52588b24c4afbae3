"""Targets and budgets: where an artifact will run and what it may cost, from profiles/*.toml."""

from __future__ import annotations

import difflib
import reprlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from m2dexport.data import read_utf8, targets_folder
from m2dexport.engines import ENGINES, MOST_SPIN_US, Compatible
from m2dexport.errors import UsageError
from m2dexport.precisions import Align, Isa, VectorPrecision, WeightPrecision
from m2dexport.profile.schema import MEAN
from m2dexport.profile.settings import Optimize

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


#: Tokens of a timed run, padding included: 64 of the longest texts that most models take.
MAX_TOKENS = 1 << 18

_LINE = 200  # characters of foreign text in a message

_Count = Annotated[int, Field(strict=True, gt=0)]  # strict: TOML's true is not 1
_Depth = Annotated[int, Field(strict=True, ge=0)]
_Spin = Annotated[int, Field(strict=True, ge=0, le=MOST_SPIN_US)]
_Amount = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]


def _known_engine(name: str) -> str:
    if name not in ENGINES:
        raise ValueError(f"choose from {', '.join(ENGINES)}")
    return name


def _choices(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if not values:
        raise ValueError("name at least one, or leave the key out")
    if len(set(values)) < len(values):
        raise ValueError("name each only once")
    return values


def _bounded_shape(shape: tuple[int, int]) -> tuple[int, int]:
    if shape[0] * shape[1] > MAX_TOKENS:
        raise ValueError(f"batch times sequence may be {MAX_TOKENS} tokens at most")
    return shape


def _texts(value: Any) -> Any:
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise ValueError('give a list of texts, such as ["8.9", "12.0"]')
    return value


_T = TypeVar("_T")
_Choices = Annotated[tuple[_T, ...], AfterValidator(_choices)]
_Shape = Annotated[tuple[_Count, _Count], AfterValidator(_bounded_shape)]


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Budget(_Table):
    """What a deployment may cost and must give; a limit that is None does not count."""

    p50_ms: _Amount | None = None
    p95_ms: _Amount | None = None
    size_mb: _Amount | None = Field(None, description="10^6 bytes")
    memory_mb: _Amount | None = Field(None, description="10^6 bytes")
    vector_bytes: _Count | None = None
    min_quality: float | None = Field(None, strict=True, ge=0, le=100, description="points")
    metric: str = MEAN

    def limits(self) -> dict[str, float]:
        """Return the limits that count, by key."""
        return {key: value for key, value in self if key != "metric" and value is not None}


class Grid(_Table):
    """The cells to profile; None takes the default."""

    layers: _Choices[_Depth] | None = None  # 0: the static model
    dims: _Choices[_Count] | None = None
    weights: _Choices[WeightPrecision] | None = None
    vectors: _Choices[VectorPrecision] | None = None
    align: _Choices[Align] | None = None  # of the depths below the full one


class LatencyShapes(_Table):
    """The shapes to time; the first is the one that limits on latency mean."""

    shapes: _Choices[_Shape] = Field(description="(batch, sequence)")


class Target(_Table):
    """Where an artifact will run."""

    description: str
    engine: Annotated[str, AfterValidator(_known_engine)]
    provider: str | None = None
    threads: _Count | None = None
    optimize: Optimize = Field("latency", description="what the settings of sessions are chosen by")
    spin_us: _Spin | None = Field(
        None, description="microseconds at most that a core is burnt after a request; 0: none"
    )
    isa: Isa = Field("portable", description="processors that int8 weights are made for")
    gpus: Annotated[tuple[str, ...], BeforeValidator(_texts)] = Field(
        (), description="compute capabilities; none: all that are known"
    )
    compatible: tuple[Compatible, ...] = Field((), description="of TensorRT engines")
    grid: Grid = Grid()
    latency: LatencyShapes | None = None
    budget: Budget = Field(default_factory=lambda: Budget.model_validate({}))


def load_target(name: str | Path) -> Target:
    """Read a target.

    Args:
        name: the name of a shipped target, such as "edge-cpu", or a .toml file.

    Raises:
        UsageError: naming the file, the key and what is allowed.
    """
    path = Path(name)
    if path.suffix != ".toml":
        shipped = _shipped()
        if str(name) not in shipped:
            raise UsageError(
                f"{name} is neither a .toml file nor a shipped target; those are: "
                f"{', '.join(sorted(shipped))}."
            )
        path = shipped[str(name)]
    try:
        stored = tomllib.loads(read_utf8(path))
    except RecursionError as error:
        raise UsageError(f"{path} cannot be read as TOML: it is nested too deeply.") from error
    except ValueError as error:  # also of an integer with thousands of digits
        raise UsageError(f"{path} cannot be read as TOML: {str(error)[:_LINE]}.") from error
    target: Target = _validated(Target, stored, str(path))
    return target


def budget_from(
    target: str | Path | Mapping[str, Any] | None, *, unlimited: bool = False, **limits: Any
) -> Budget:
    """Return a target's budget with the limits that are given replaced.

    Args:
        target: its name or file, or its budget as a profile holds it; None: there is none.
        unlimited: whether a budget without any limit will do.
        limits: the limits that are given; None stands for none.

    Raises:
        UsageError: when a limit is not a positive number, or nothing is limited at all.
    """
    if isinstance(target, Mapping):
        base = budget_of(target).model_dump()
    else:
        base = load_target(target).budget.model_dump() if target else {}
    given = {key: value for key, value in limits.items() if value is not None}
    budget: Budget = _validated(Budget, {**base, **given}, "the budget")
    if not budget.limits() and not unlimited:
        raise UsageError("no limit is given; pass --target or a limit such as --p95-ms 5.")
    return budget


def budget_of(stored: Mapping[str, Any]) -> Budget:
    """Return a budget that a profile holds, whose numbers all are floats.

    Raises:
        UsageError: when it is none.
    """
    whole = {"vector_bytes": int(stored["vector_bytes"])} if "vector_bytes" in stored else {}
    budget: Budget = _validated(Budget, {**stored, **whole}, "the profile's budget")
    return budget


def is_shipped(name: str) -> bool:
    """Say whether a target of this name ships."""
    return name in _shipped()


def _shipped() -> dict[str, Path]:
    return {found.stem: found for found in targets_folder().glob("*.toml")}


def _validated(model: type[Any], stored: dict[str, Any], where: str) -> Any:
    try:
        return model.model_validate(stored)
    except ValidationError as error:
        first = error.errors()[0]
        keys = [str(part) for part in first["loc"]]
        key = ".".join(keys)[:_LINE]
        if first["type"] == "extra_forbidden":
            allowed = _keys_at(model, keys[:-1])
            close = difflib.get_close_matches(keys[-1], allowed, n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            message = f"{where} has an unknown key {key}{hint}; allowed are {', '.join(allowed)}."
        elif first["type"] == "missing":
            message = f"{where} lacks the key {key}."
        else:
            text = "it should be a table" if first["type"] == "model_type" else first["msg"]
            text = text.removeprefix("Value error, ")
            text = text[0].lower() + text[1:]
            message = f"{where}: {key} is {reprlib.repr(first['input'])}; {text}."
        raise UsageError(message) from error


def _keys_at(model: type[BaseModel], keys: Sequence[str]) -> list[str]:
    for key in keys:
        annotation = model.model_fields[key].annotation
        options = get_args(annotation) or (annotation,)
        model = next(t for t in options if isinstance(t, type) and issubclass(t, BaseModel))
    return sorted(model.model_fields)
