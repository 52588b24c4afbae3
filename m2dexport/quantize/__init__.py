"""Weight precision: a float32 graph in, the same graph in fewer bits out, one module a recipe.

=================  =====================================================================
precision          weights, and what is computed with
=================  =====================================================================
fp32               as exported
fp16, bf16         stored in half, computed with in float32 (``half``)
int8               8 bits, and 8-bit activations of fixed scale or one token's own (``int8``)
int8-dynamic       8 bits, and 8-bit activations scaled per batch, while running (``dynamic``)
int8-static        8 bits, and 8-bit activations of fixed scale, by NNCF (``static``)
int8-weight-only   8 bits and a scale for every 32 values (``blockwise``)
int4-weight-only   4 bits and a scale for every 32 values, tables too (``blockwise``)
=================  =====================================================================

Embedding tables are quantized per row in every integer precision (``tables``). LayerNorm, softmax,
pooling, heads after pooling and normalisation stay in float32.

OpenVINO computes with float32 activations in every precision but int8, which is the same as on
onnxruntime (``openvino``), and lacks int8-dynamic and int8-static.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from m2dexport.errors import CheckpointError, UsageError
from m2dexport.precisions import WEIGHT_PRECISIONS, Isa, WeightPrecision

#: Engine -> the precisions that are fitted to calibration texts.
CALIBRATED: Mapping[str, tuple[WeightPrecision, ...]] = {
    "onnx": ("int8", "int8-static"),
    "openvino": ("int8",),
}

#: Engine -> the precisions that it runs, and the oldest version of it that does.
ENGINE_PRECISIONS: Mapping[str, Mapping[WeightPrecision, str]] = {
    "onnx": {**dict.fromkeys(WEIGHT_PRECISIONS, "1.17"), "int8-weight-only": "1.22"},
    "openvino": dict.fromkeys(
        ("fp32", "fp16", "bf16", "int8", "int8-weight-only", "int4-weight-only"), "2026.4"
    ),
}

_HALF = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}


@dataclass(frozen=True)
class CalibrationTokens:
    """Tokenized calibration texts, for the precisions whose activations are measured beforehand."""

    ids: Sequence[Sequence[int]]  # of each text, specials included
    pad_id: int


def require_precision(precision: str, engine: str) -> None:
    """Refuse weights that are unknown, or that an engine does not run.

    Raises:
        UsageError: naming those that it runs.
    """
    known = ENGINE_PRECISIONS[engine]
    if precision not in known:
        runs = "is unknown" if precision not in WEIGHT_PRECISIONS else f"does not run on {engine}"
        raise UsageError(f"--weights {precision!r} {runs}; choose from {', '.join(known)}.")


def quantize_weights(
    model: ir.Model,
    precision: WeightPrecision,
    calibration: CalibrationTokens | None = None,
    *,
    engine: str = "onnx",
    isa: Isa = "portable",
) -> ir.Model:
    """Return a copy of a float32 graph with its weights in another precision.

    The graph's inputs and outputs keep their types.

    Args:
        model: a graph with one output or with one output per depth.
        precision: a weight precision; "fp32" returns a plain copy.
        calibration: what activations are measured on; the precisions that need it refuse None.
        engine: the engine that will run it; "openvino" takes a graph of standard operators alone.
        isa: of int8 on onnxruntime: "portable" makes codes whose products no processor saturates,
            "vnni" finer ones, which are exact at full speed with VNNI alone.

    Raises:
        CheckpointError: when a weight holds NaN, or does not fit fp16.
        UsageError: when the engine does not run the precision, or the calibration texts that it
            needs are missing or too few.
        MissingExtra: when the package that makes a precision is not installed.
    """
    from m2dexport.quantize import blockwise, dynamic, half, int8, openvino, static, tables

    require_precision(precision, engine)
    model = model.clone()
    _require_numbers(model.graph)
    if precision in ("fp16", "bf16"):
        half.store_half(model.graph, _HALF[precision])
    elif precision == "int8":
        if calibration is None:
            raise UsageError("int8 weights need calibration texts.")
        int8.quantize_matmuls(model, calibration, isa)
        if engine == "openvino":
            openvino.standardize_int8(model)
    elif engine == "openvino":
        openvino.narrow_matrices(model.graph, precision)
    elif precision == "int8-dynamic":
        dynamic.quantize_dynamic(model.graph)
    elif precision == "int8-static":
        model = static.quantize_static(model, calibration)
    elif precision == "int8-weight-only":
        blockwise.quantize_blockwise(model, 8)
    elif precision == "int4-weight-only":
        blockwise.quantize_blockwise(model, 4)
    if precision == "int4-weight-only":
        tables.quantize_tables_int4(model.graph)
    elif precision.startswith("int8"):
        tables.quantize_tables(model.graph)
    RemoveUnusedNodesPass()(model)
    return model


def _require_numbers(graph: ir.Graph) -> None:
    for name, value in graph.initializers.items():
        tensor = value.const_value
        if tensor is None or tensor.dtype != ir.DataType.FLOAT:
            continue
        if np.isnan(tensor.numpy()).any():
            raise CheckpointError(f"weight {name} holds NaN; repair or retrain the checkpoint.")
