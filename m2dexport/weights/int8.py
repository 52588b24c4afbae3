"""int8 weights and activations, whose vectors do not depend on their batch."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.tape import Tape

from m2dexport.surgery import CONTRIB, SMALL, array_of, constant, replace


def quantize_matmuls(model: ir.Model) -> None:
    """Replace every MatMul of the transformer by one of 8-bit codes.

    * weights: per output channel, symmetric;
    * activations: per token while running, ``scale = max|x| / 127`` over one token's channels.
      Scales per tensor, the usual choice, make a text's vector depend on the texts beside it
      (onnxruntime issue 10111).
    """
    model.opset_imports[CONTRIB] = 1
    graph = model.graph
    zero_point = constant(graph, "int8.activation_zero", np.array(128, dtype=np.uint8))
    one = constant(graph, "int8.one", np.array(1, dtype=np.float32))
    quantized: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
    for node in list(graph):
        x, weight = (*node.inputs, None, None)[:2]
        if node.op_type != "MatMul" or x is None or weight is None or weight.const_value is None:
            continue
        if weight.const_value.size < SMALL or x.shape is None or len(x.shape) != 3:
            continue
        if x not in quantized:
            quantized[x] = _quantize_tokens(graph, node, x, one, zero_point)
        codes, scale = quantized[x]
        values, weight_scale = _per_channel(array_of(weight), axis=0)
        tape = Tape()
        product = tape.op(
            "MatMulIntegerToFloat",
            [
                codes,
                constant(graph, f"{weight.name}.int8", values),
                one,
                constant(graph, f"{weight.name}.scale", weight_scale[0]),
                zero_point,
            ],
            domain=CONTRIB,
        )
        result = tape.op("Mul", [product, scale])
        replace(graph, node, tape, result)


def _quantize_tokens(
    graph: ir.Graph, before: ir.Node, x: ir.Value, one: ir.Value, zero_point: ir.Value
) -> tuple[ir.Value, ir.Value]:
    """Return uint8 codes (batch, sequence, width) and a float32 (batch, sequence, 1) scale."""
    tape = Tape()
    last_axis = constant(graph, "int8.last_axis", np.array([-1], dtype=np.int64))
    largest = tape.op("ReduceMax", [tape.op("Abs", [x]), last_axis], {"keepdims": 1})
    step = constant(graph, "int8.step", np.array(1 / 127, dtype=np.float32))
    tiny = constant(graph, "int8.tiny", np.array(1e-12, dtype=np.float32))
    scale = tape.op("Max", [tape.op("Mul", [largest, step]), tiny])
    codes = tape.op("QuantizeLinear", [tape.op("Div", [x, scale]), one, zero_point])
    graph.insert_before(before, tape.nodes)
    return codes, scale


def _per_channel(
    weight: NDArray[np.float32], axis: int
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Return symmetric int8 codes and the float32 scale that is constant along ``axis``."""
    scale = np.maximum(np.abs(weight).max(axis=axis, keepdims=True), 1e-12) / 127
    codes = np.clip(np.round(weight / scale), -127, 127).astype(np.int8)
    return codes, scale.astype(np.float32)
