"""What all recipes share: what a precision requires, a graph that may be changed, its tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from m2dexport.errors import CheckpointError, UsageError
from m2dexport.precisions import WEIGHT_PRECISIONS, Isa, WeightPrecision
from m2dexport.quantize.tables import quantize_tables, quantize_tables_int4

#: The type that half precisions are stored in.
HALF: Mapping[str, ir.DataType] = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}


@dataclass(frozen=True)
class Requirement:
    """What weights of one precision require of an engine, and what they must then reach."""

    oldest: str  # version of the engine that runs them, such as "1.22"
    #: Smallest mean cosine of the probes' vectors to those of torch: what is lower is a broken
    #: graph. Sound ones lose less (docs/quantization.md), and more with more layers. None: the
    #: vectors must be equal up to float rounding.
    floor: float | None
    calibrated: bool = False  # fitted to calibration texts
    isas: tuple[Isa, ...] = ("portable",)  # processors that they can be made for
    mixable: bool = False  # any of them can be put back into float32
    faithful: bool = False  # some are put back where vectors would miss ``mixed.FLOOR``
    batch_dependent: bool = False  # a text's vector depends on the texts beside it
    made_by: tuple[str, ...] = ()  # packages that decide the codes, for the record


def require_precision(
    weights: str, engine: str, known: Mapping[WeightPrecision, Requirement]
) -> None:
    """Refuse weights that are unknown, or that an engine does not run.

    Args:
        weights: the precision asked for.
        engine: the engine's name, for the message.
        known: the ``PRECISIONS`` of its ``make``.

    Raises:
        UsageError: naming those that it runs.
    """
    if weights not in known:
        runs = "is unknown" if weights not in WEIGHT_PRECISIONS else f"does not run on {engine}"
        raise UsageError(f"--weights {weights!r} {runs}; choose from {', '.join(known)}.")


def changeable(model: ir.Model) -> ir.Model:
    """Return a copy of a float32 graph that a recipe may change.

    Raises:
        CheckpointError: when a weight holds NaN.
    """
    model = model.clone()
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or tensor.dtype != ir.DataType.FLOAT:
            continue
        if np.isnan(tensor.numpy()).any():
            raise CheckpointError(f"weight {name} holds NaN; repair or retrain the checkpoint.")
    return model


def with_tables(model: ir.Model, weights: WeightPrecision) -> ir.Model:
    """Quantize the embedding tables as a precision says, in place, and drop what is unused."""
    if weights == "int4-weight-only":
        quantize_tables_int4(model.graph)
    elif weights.startswith("int8"):
        quantize_tables(model.graph)
    return without_unused(model)


def without_unused(model: ir.Model) -> ir.Model:
    """Return a graph after dropping the nodes and constants that nothing uses, in place."""
    RemoveUnusedNodesPass()(model)
    return model
