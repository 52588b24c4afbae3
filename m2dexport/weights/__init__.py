"""Weight precision: a float32 graph in, the same graph in fewer bits out, one module a recipe.

=================  =====================================================================
precision          weights, and what is computed with
=================  =====================================================================
fp32               as exported
fp16, bf16         stored in half, computed with in float32 (``half``)
int8               8 bits, and 8-bit activations whose scale depends on one token (``int8``)
=================  =====================================================================

Embedding tables are quantized per row in every integer precision (``tables``). LayerNorm, softmax,
pooling, heads after pooling and normalisation stay in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

WeightPrecision = Literal["fp32", "fp16", "int8"]
WEIGHT_PRECISIONS: tuple[WeightPrecision, ...] = get_args(WeightPrecision)


@dataclass(frozen=True)
class CalibrationTokens:
    """Tokenized calibration texts, for the precisions whose activations are measured beforehand."""

    ids: Sequence[Sequence[int]]  # of each text, specials included
    pad_id: int


def quantize_weights(
    model: ir.Model, precision: WeightPrecision, calibration: CalibrationTokens | None = None
) -> ir.Model:
    """Return a copy of a float32 graph with its weights in another precision.

    The graph's inputs and outputs keep their types.

    Args:
        model: a graph with one output or with one output per depth.
        precision: a weight precision; "fp32" returns a plain copy.
        calibration: what activations are measured on; the precisions that need it refuse None.
    """
    from m2dexport.weights import half, int8, tables

    model = model.clone()
    if precision == "fp16":
        half.store_half(model.graph, ir.DataType.FLOAT16)
    elif precision == "int8":
        int8.quantize_matmuls(model)
        tables.quantize_tables(model.graph)
    RemoveUnusedNodesPass()(model)
    return model
