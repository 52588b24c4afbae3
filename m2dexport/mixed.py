"""Mixed precision: which layers stay in float32, so that quality drops by so many points at most.

What is decided about is a unit (``weights.units``): the weights that share an input, such as those
of Q, K and V. All units are quantized once, each as if it were the only one; any of them can then
be put back.

1. A unit's **sensitivity** is how far texts' vectors turn when it alone is quantized.
2. The units that stay in float32 are the k most sensitive ones.
3. k is the smallest that a binary search finds to be within the limit. Quality need not fall evenly
   as k shrinks, so that a smaller k may do which was not looked at; the one taken was measured.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from m2dexport.errors import M2DError
from m2dexport.progress import OnProgress
from m2dexport.quality import Task, evaluate
from m2dexport.runtime import Encoder
from m2dexport.surgery import large_weights, table_users
from m2dexport.weights.units import restore, units_of

Floats = NDArray[np.float32]

#: Precisions that keep a layer in float32 on request; int8-static decides for itself.
MIXABLE = ("int8", "int8-dynamic", "int8-weight-only", "int4-weight-only")
#: Texts that sensitivities are measured on, at most.
_TEXTS = 256


@dataclass(frozen=True)
class QualityLimit:
    """How much quality quantized weights may cost, and what that is measured on."""

    max_drop: float  # points below fp32, of the mean of the tasks' main metrics
    tasks: tuple[Task, ...]


@dataclass(frozen=True)
class Unit:
    """The weights that share an input, and what quantizing them alone does."""

    name: str  # of the first weight
    weights: tuple[str, ...]
    share: float  # of the bytes of all weights in float32, 0..1
    sensitivity: float  # 1 - mean cosine; the embedding tables are quantized before and after
    kept: bool  # in float32


@dataclass(frozen=True)
class Mixture:
    """What was measured and decided. Qualities are points, of float32 vectors."""

    units: tuple[Unit, ...]  # most sensitive first
    tables_share: float  # of the bytes of all weights in float32, 0..1
    tables_sensitivity: float  # 1 - mean cosine, with nothing else quantized
    max_drop: float  # points
    fp32_quality: float
    quantized_quality: float  # with all units quantized
    mixed_quality: float

    @property
    def kept(self) -> frozenset[str]:
        """Names of the weights that stay in float32."""
        return frozenset(name for unit in self.units if unit.kept for name in unit.weights)


def mix_precision(
    original: ir.Model,
    quantized: ir.Model,
    load: Callable[[ir.Model], Encoder],
    texts: Sequence[str],
    limit: QualityLimit,
    on_progress: OnProgress = lambda *_: None,
) -> tuple[ir.Model, Mixture]:
    """Return a quantized graph with the units in float32 that the limit asks for, and the reasons.

    Args:
        original: the float32 graph, of one normalised output.
        quantized: what ``quantize_weights`` made of it.
        load: makes such a graph ready to run.
        texts: calibration texts, of which up to 256 measure sensitivities.
        limit: the drop of quality that is allowed, and the tasks that measure it.
        on_progress: told about every step.

    Raises:
        M2DError: when the embedding tables alone cost more quality than the limit allows.
    """
    weights = units_of(original.graph)

    def keeping(units: Sequence[str]) -> ir.Model:
        return restore(quantized, original, [name for unit in units for name in weights[unit]])

    def encode(graph: ir.Model) -> Floats:
        return load(graph).encode(texts[:: -(-len(texts) // _TEXTS)])

    tables_only = encode(keeping([*weights]))
    turns: dict[str, float] = {}
    for unit in weights:
        on_progress("measuring sensitivities", len(turns), len(weights))
        alone = encode(keeping([other for other in weights if other != unit]))
        turns[unit] = _turn(tables_only, alone)
    order = sorted(weights, key=lambda unit: -turns[unit])
    fp32 = _quality(load(original), limit.tasks)
    qualities: dict[int, float] = {}  # by how many units stay in float32

    def fits(count: int) -> bool:
        if count not in qualities:
            on_progress("choosing", len(qualities), 2 + len(order).bit_length())
            qualities[count] = _quality(load(keeping(order[:count])), limit.tasks)
        return fp32 - qualities[count] <= limit.max_drop

    count = fewest(fits, len(order))
    if count is None:
        raise _tables_cost_too_much(fp32 - qualities[len(order)], limit)
    share = _shares(original.graph)
    mixture = Mixture(
        units=tuple(
            Unit(unit, weights[unit], share(weights[unit]), turns[unit], kept=index < count)
            for index, unit in enumerate(order)
        ),
        tables_share=share(_tables(original.graph)),
        tables_sensitivity=_turn(encode(original), tables_only),
        max_drop=limit.max_drop,
        fp32_quality=fp32,
        quantized_quality=qualities[0],
        mixed_quality=qualities[count],
    )
    return keeping(order[:count]), mixture


def _tables_cost_too_much(drop: float, limit: QualityLimit) -> M2DError:
    return M2DError(
        f"quality drops by {drop:.2f} points when nothing but the embedding tables is quantized, "
        f"and --max-drop allows {limit.max_drop:g}; allow more, or choose other weights, such as "
        "fp16."
    )


def fewest(fits: Callable[[int], bool], most: int) -> int | None:
    """Return the smallest number of 0 to ``most`` that a binary search finds to fit, if any does.

    The number returned was asked about. Where more numbers fit, it is never larger.
    """
    if fits(0):
        return 0
    if not fits(most):
        return None
    return 1 + bisect_left(range(1, most), True, key=fits)


def _turn(one: Floats, other: Floats) -> float:
    """Return 1 - mean cosine of rows of length 1, without the cancellation of that formula."""
    return float(np.square(one.astype(np.float64) - other).sum(axis=1).mean() / 2)


def _quality(encoder: Encoder, tasks: Sequence[Task]) -> float:
    """Return the mean of the tasks' main metrics, in points."""
    prompts = encoder.spec.prompts
    points = []
    for task in tasks:
        vectors = [
            encoder.encode(part.texts, prompt=part.role if part.role in prompts else None)
            for part in task.texts()
        ]
        points.append(evaluate(task, vectors, encoder.spec.dim, "float32")[task.main_metric])
    return float(np.mean(points))


def _shares(graph: ir.Graph) -> Callable[[Sequence[str]], float]:
    """Return a function from names to their weights' share of the bytes of all in float32."""
    tensors = {name: value.const_value for name, value in graph.initializers.items()}
    sizes = {
        name: tensor.nbytes
        for name, tensor in tensors.items()
        if tensor is not None and tensor.dtype == ir.DataType.FLOAT
    }
    return lambda names: sum(sizes[name] for name in names) / sum(sizes.values())


def _tables(graph: ir.Graph) -> list[str]:
    return [str(value.name) for value in large_weights(graph) if table_users(value)]
