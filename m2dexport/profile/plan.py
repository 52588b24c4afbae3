"""The plan of a sweep: which cells to measure, and how."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from m2dexport.checkpoint.open import Checkpoint
from m2dexport.cores import granted_threads
from m2dexport.engines import (
    DEFAULT_ENGINE,
    ENGINES,
    Compilation,
    Device,
    engine_maker,
    engine_runner,
)
from m2dexport.errors import UsageError
from m2dexport.precisions import Align, Isa, VectorPrecision, WeightPrecision
from m2dexport.profile.schema import LOCAL
from m2dexport.profile.settings import Optimize
from m2dexport.profile.target import Target
from m2dexport.quantize.recipes import require_precision
from m2dexport.strict import require_name
from m2dexport.vectors.tasks import Task, require_distinct

_SMALLEST_DIM = 32


@dataclass(frozen=True)
class Plan:
    """Which cells to measure, and how."""

    layers: tuple[int, ...]  # 0: the static model, which is always aligned
    dims: tuple[int, ...]
    weights: tuple[WeightPrecision, ...] = ("fp32", "fp16", "int8")
    vectors: tuple[VectorPrecision, ...] = ("float32", "int8", "ubinary")
    shapes: tuple[tuple[int, int], ...] = ((1, 16), (1, 64), (16, 32))  # first: the cells' p50
    target: str = LOCAL  # its name
    engine: str = DEFAULT_ENGINE
    device: Device = Device()  # what it leaves open is measured (``settings``)
    optimize: Optimize = "latency"  # what that is chosen by
    isa: Isa = "portable"  # processors that int8 weights are made for
    repeats: int | None = None  # timed rounds of each shape; None: by the time that they take
    align: tuple[Align, ...] = ("none", "full")  # of the depths below the full one
    align_texts: Iterable[str] | None = None  # what maps are fitted on; None: the shipped ones
    #: What engines for a GPU are compiled for; ``within_length`` adds the shapes.
    compilation: Compilation = Compilation()
    #: Layers, dim and precisions of the unquantized cell that all are compared with; ``settled``
    #: takes the checkpoint's full depth and width. None: the largest of the grid.
    reference: tuple[int, int, WeightPrecision, VectorPrecision] | None = None

    @property
    def compared_with(self) -> tuple[int, int, WeightPrecision, VectorPrecision]:
        """Layers, dim, weights and vectors of the reference cell."""
        largest = max(self.layers), max(self.dims), self.weights[0], self.vectors[0]
        return self.reference or largest

    @property
    def depths(self) -> tuple[int, ...]:
        """The depths of the transformer."""
        return tuple(layers for layers in self.layers if layers > 0)

    def alignments(self, layers: int, full: int) -> tuple[Align, ...]:
        """Return how a depth is measured: the full one as it is, the static model aligned."""
        if layers == full:
            return ("none",)
        return tuple(align for align in self.align if align == "full" or layers > 0)

    def aligned(self, full: int) -> tuple[int, ...]:
        """Return the depths that are measured with a map."""
        return tuple(n for n in self.layers if "full" in self.alignments(n, full))


def default_plan(checkpoint: Checkpoint) -> Plan:
    """Return the grid of all depths, 0 among them, and of the trained dims.

    Where those are unknown, the dims are powers of two from 32 upwards.
    """
    dims = {dim for _, dim in checkpoint.trained or ()}
    if not dims:
        dims = {_SMALLEST_DIM << i for i in range(16) if _SMALLEST_DIM << i < checkpoint.dim}
    return Plan(tuple(range(checkpoint.layers + 1)), tuple(sorted({*dims, checkpoint.dim})))


def plan_for(checkpoint: Checkpoint, target: Target) -> Plan:
    """Return the plan of a target; what its file leaves out is as in ``default_plan``.

    More threads than this process may use are cut to those, with a warning.
    """
    default = default_plan(checkpoint)
    align = target.grid.align or default.align
    return Plan(
        layers=target.grid.layers or (default.layers if "full" in align else default.depths),
        dims=target.grid.dims or default.dims,
        weights=target.grid.weights or default.weights,
        vectors=target.grid.vectors or default.vectors,
        align=align,
        shapes=target.latency.shapes if target.latency else default.shapes,
        engine=target.engine,
        isa=target.isa,
        compilation=compilation_for(target),
        device=Device(target.provider, granted_threads(target.threads), target.spin_us),
        optimize=target.optimize,
    )


def compilation_for(target: Target) -> Compilation:
    """Return what an engine for a target's GPU is compiled for."""
    shapes = target.latency.shapes if target.latency else ()
    return Compilation(gpus=target.gpus, shapes=shapes, compatible=target.compatible)


def require_plan(checkpoint: Checkpoint, plan: Plan, tasks: Sequence[Task]) -> None:
    """Refuse a plan that lies outside a checkpoint, or evaluation data that cannot be told apart.

    Raises:
        UsageError: naming what is wrong.
        MissingExtra: when the engine is not installed.
    """
    require_name(plan.target, "the target")
    known = engine_maker(plan.engine).PRECISIONS
    for weights in plan.weights:
        require_precision(weights, plan.engine, known)
    if "int8" in plan.weights and plan.isa not in known["int8"].isas:
        raise UsageError(f"isa {plan.isa} does not go with the engine {plan.engine}.")
    engine_runner(plan.engine).require_device(plan.device)
    if ENGINES[plan.engine].on_gpu:
        engine_maker(plan.engine).require_compilation(plan.compilation)
    if not tasks:
        raise UsageError("no evaluation data is given; pass --eval.")
    require_distinct(tasks)
    _require_depths(checkpoint, plan)
    for dim in plan.dims:
        if not 1 <= dim <= checkpoint.dim:
            raise UsageError(f"the checkpoint has 1 to {checkpoint.dim} dims, not {dim}.")


def _require_depths(checkpoint: Checkpoint, plan: Plan) -> None:
    if checkpoint.layers == 0 or checkpoint.alignment is not None:
        raise UsageError(
            f"{checkpoint.path} was made for one depth; profile the checkpoint that it was sliced "
            "from."
        )
    if "none" not in plan.align:
        raise UsageError('align must hold "none": aligned cells stand beside plain ones.')
    if 0 in plan.layers and "full" not in plan.align:
        raise UsageError("depth 0 is always aligned; add full to align, or leave 0 out of layers.")
    if not plan.depths:
        raise UsageError("depth 0 is measured beside others; name a depth of 1 or more, too.")
    for layers in plan.layers:
        if not 0 <= layers <= checkpoint.layers:
            raise UsageError(f"the checkpoint has 0 to {checkpoint.layers} layers, not {layers}.")


def settled(plan: Plan, checkpoint: Checkpoint) -> Plan:
    """Return a plan with what a checkpoint decides: how long shapes can be, and the reference.

    That is unquantized, or, where the engine runs no fp32, in the engine's own weights.
    """
    known = engine_maker(plan.engine).PRECISIONS
    weights: WeightPrecision = "fp32" if "fp32" in known else ENGINES[plan.engine].weights
    reference: tuple[int, int, WeightPrecision, VectorPrecision] = (
        *(checkpoint.layers, checkpoint.dim),
        *(weights, "float32"),
    )
    return replace(within_length(plan, checkpoint.max_length), reference=reference)


def within_length(plan: Plan, max_length: int) -> Plan:
    """Return a plan whose shapes are no longer than a model's maximum length, in tokens."""
    cut = dict.fromkeys((batch, min(length, max_length)) for batch, length in plan.shapes)
    shapes = tuple(cut)
    compilation = replace(plan.compilation, shapes=shapes, max_length=max_length)
    return replace(plan, shapes=shapes, compilation=compilation)
