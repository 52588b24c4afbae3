"""The plan of a sweep: which cells to measure, and how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from m2dexport.checkpoint.open import Checkpoint
from m2dexport.cores import granted_threads
from m2dexport.engines import DEFAULT_ENGINE, Device, engine_maker, engine_runner
from m2dexport.errors import UsageError
from m2dexport.precisions import Isa, VectorPrecision, WeightPrecision
from m2dexport.profile.target import Target
from m2dexport.quantize.recipes import require_precision
from m2dexport.vectors.tasks import Task

_SMALLEST_DIM = 32


@dataclass(frozen=True)
class Plan:
    """Which cells to measure, and how."""

    layers: tuple[int, ...]
    dims: tuple[int, ...]
    weights: tuple[WeightPrecision, ...] = ("fp32", "fp16", "int8")
    vectors: tuple[VectorPrecision, ...] = ("float32", "int8", "ubinary")
    shapes: tuple[tuple[int, int], ...] = ((1, 16), (1, 64), (16, 32))  # first: the cells' p50
    engine: str = DEFAULT_ENGINE
    device: Device = Device()
    isa: Isa = "portable"  # processors that int8 weights are made for
    repeats: int = 30  # timed runs of each graph at each shape


def default_plan(checkpoint: Checkpoint) -> Plan:
    """Return the grid of all depths and of the trained dims, or powers of two from 32 upwards."""
    dims = {dim for _, dim in checkpoint.trained or ()}
    if not dims:
        dims = {_SMALLEST_DIM << i for i in range(16) if _SMALLEST_DIM << i < checkpoint.dim}
    return Plan(tuple(range(1, checkpoint.layers + 1)), tuple(sorted({*dims, checkpoint.dim})))


def plan_for(checkpoint: Checkpoint, target: Target) -> Plan:
    """Return the plan of a target; what its file leaves out is as in ``default_plan``.

    More threads than this process may use are cut to those, with a warning.
    """
    default = default_plan(checkpoint)
    return Plan(
        layers=target.grid.layers or default.layers,
        dims=target.grid.dims or default.dims,
        weights=target.grid.weights or default.weights,
        vectors=target.grid.vectors or default.vectors,
        shapes=target.latency.shapes if target.latency else default.shapes,
        engine=target.engine,
        isa=target.isa,
        device=Device(target.provider, granted_threads(target.threads), target.spin),
    )


def require_plan(checkpoint: Checkpoint, plan: Plan, tasks: Sequence[Task]) -> None:
    """Refuse a plan that lies outside a checkpoint, or evaluation data that cannot be told apart.

    Raises:
        UsageError: naming what is wrong.
        MissingExtra: when the engine is not installed.
    """
    known = engine_maker(plan.engine).PRECISIONS
    for weights in plan.weights:
        require_precision(weights, plan.engine, known)
    if "int8" in plan.weights and plan.isa not in known["int8"].isas:
        raise UsageError(f"isa {plan.isa} does not go with the engine {plan.engine}.")
    engine_runner(plan.engine).require_device(plan.device)
    if not tasks:
        raise UsageError("no evaluation data is given; pass --eval.")
    names = [task.name for task in tasks]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"two evaluation sets are named {name!r}; rename a file or folder.")
    for layers in plan.layers:
        if not 1 <= layers <= checkpoint.layers:
            raise UsageError(f"the checkpoint has 1 to {checkpoint.layers} layers, not {layers}.")
    for dim in plan.dims:
        if not 1 <= dim <= checkpoint.dim:
            raise UsageError(f"the checkpoint has 1 to {checkpoint.dim} dims, not {dim}.")


def within_length(plan: Plan, max_length: int) -> Plan:
    """Return a plan whose shapes are no longer than a model's maximum length, in tokens."""
    cut = dict.fromkeys((batch, min(length, max_length)) for batch, length in plan.shapes)
    return replace(plan, shapes=tuple(cut))
