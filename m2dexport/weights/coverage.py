"""How much of a graph's weights a precision really reached: read off the finished graph."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from m2dexport.surgery import SMALL
from m2dexport.weights import WeightPrecision

_NARROW = (ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@dataclass(frozen=True)
class Coverage:
    """What was quantized and what was not."""

    share: float  # of the values of all constants, 0..1: how many are stored below float32
    left: tuple[str, ...]  # constants of 4096 values or more that stayed in float32


def coverage(model: ir.Model, precision: WeightPrecision) -> Coverage:
    """Compute from the finished graph the share of weights that are stored below float32."""
    narrow = 0
    wide: dict[str, int] = {}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None:
            continue
        if tensor.dtype in _NARROW:
            narrow += tensor.size
        elif tensor.dtype == ir.DataType.FLOAT and not name.endswith(".scale"):
            wide[name] = tensor.size
    total = narrow + sum(wide.values())
    left = tuple(sorted(name for name, size in wide.items() if size >= SMALL))
    return Coverage(1.0 if precision == "fp32" else narrow / total, left)
