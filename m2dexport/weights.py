"""Weight precision: fp16 storage, and an int8 whose vectors do not depend on their batch.

int8 quantizes three things:

* the weight of every MatMul inside the transformer, per output channel, symmetric;
* the input of those MatMuls, per token while running: ``scale = max|x| / 127`` over one token's
  channels. Scales per tensor, the usual choice, make a text's vector depend on the texts beside it
  (onnxruntime issue 10111);
* every embedding table, per row.

LayerNorm, softmax, pooling, heads after pooling and normalisation stay in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnx_ir.tape import Tape

from m2dexport.rewrites import CONTRIB

WeightPrecision = Literal["fp32", "fp16", "int8"]

#: Smaller constants (biases, norms) stay in float32: they decide little of the size.
_SMALL = 4096


@dataclass(frozen=True)
class Coverage:
    """How much of a graph's weights a precision really reached."""

    share: float  # of the float32 bytes of all constants, 0..1
    left: tuple[str, ...]  # constants of 4096 values or more that stayed in float32


def quantize_weights(model: ir.Model, weights: WeightPrecision) -> ir.Model:
    """Return a copy of a float32 graph with its weights in another precision.

    The graph's inputs and outputs keep their types; fp16 weights are stored as such and computed
    with in float32.
    """
    model = model.clone()
    if weights == "fp16":
        _store_fp16(model.graph)
    elif weights == "int8":
        model.opset_imports[CONTRIB] = 1
        _quantize_matmuls(model.graph)
        _quantize_tables(model.graph)
    RemoveUnusedNodesPass()(model)
    return model


def coverage(model: ir.Model, precision: WeightPrecision) -> Coverage:
    """Compute from the finished graph the share of weights that are stored below float32."""
    narrow = 0
    wide: dict[str, int] = {}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None:
            continue
        if tensor.dtype in (ir.DataType.INT8, ir.DataType.FLOAT16):
            narrow += tensor.size
        elif tensor.dtype == ir.DataType.FLOAT and not name.endswith(".scale"):
            wide[name] = tensor.size
    total = narrow + sum(wide.values())
    left = tuple(sorted(name for name, size in wide.items() if size >= _SMALL))
    return Coverage(1.0 if precision == "fp32" else narrow / total, left)


def _store_fp16(graph: ir.Graph) -> None:
    for value in _large_weights(graph):
        stored = _constant(graph, f"{value.name}.fp16", _array(value).astype(np.float16))
        for node in _table_users(value):
            # Only the rows that a text uses are widened.
            tape = Tape()
            rows = tape.op("Gather", [stored, node.inputs[1]], {"axis": 0})
            wide = tape.op("Cast", [rows], {"to": ir.DataType.FLOAT})
            _replace(graph, node, tape, wide)
        if value.uses():
            tape = Tape()
            wide = tape.op("Cast", [stored], {"to": ir.DataType.FLOAT})
            graph.insert_before(graph[0], tape.nodes)
            value.replace_all_uses_with(wide)


def _quantize_matmuls(graph: ir.Graph) -> None:
    zero_point = _constant(graph, "int8.activation_zero", np.array(128, dtype=np.uint8))
    one = _constant(graph, "int8.one", np.array(1, dtype=np.float32))
    quantized: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
    for node in list(graph):
        x, weight = (*node.inputs, None, None)[:2]
        if node.op_type != "MatMul" or x is None or weight is None or weight.const_value is None:
            continue
        if weight.const_value.size < _SMALL or x.shape is None or len(x.shape) != 3:
            continue
        if x not in quantized:
            quantized[x] = _quantize_tokens(graph, node, x, one, zero_point)
        codes, scale = quantized[x]
        values, weight_scale = _per_channel(_array(weight), axis=0)
        tape = Tape()
        product = tape.op(
            "MatMulIntegerToFloat",
            [
                codes,
                _constant(graph, f"{weight.name}.int8", values),
                one,
                _constant(graph, f"{weight.name}.scale", weight_scale[0]),
                zero_point,
            ],
            domain=CONTRIB,
        )
        result = tape.op("Mul", [product, scale])
        _replace(graph, node, tape, result)


def _quantize_tokens(
    graph: ir.Graph, before: ir.Node, x: ir.Value, one: ir.Value, zero_point: ir.Value
) -> tuple[ir.Value, ir.Value]:
    """Return uint8 codes (batch, sequence, width) and a float32 (batch, sequence, 1) scale."""
    tape = Tape()
    last_axis = _constant(graph, "int8.last_axis", np.array([-1], dtype=np.int64))
    largest = tape.op("ReduceMax", [tape.op("Abs", [x]), last_axis], {"keepdims": 1})
    step = _constant(graph, "int8.step", np.array(1 / 127, dtype=np.float32))
    tiny = _constant(graph, "int8.tiny", np.array(1e-12, dtype=np.float32))
    scale = tape.op("Max", [tape.op("Mul", [largest, step]), tiny])
    codes = tape.op("QuantizeLinear", [tape.op("Div", [x, scale]), one, zero_point])
    graph.insert_before(before, tape.nodes)
    return codes, scale


def _quantize_tables(graph: ir.Graph) -> None:
    for value in _large_weights(graph):
        nodes = _table_users(value)
        if not nodes:
            continue
        values, scale = _per_channel(_array(value), axis=1)
        table = _constant(graph, f"{value.name}.int8", values)
        scales = _constant(graph, f"{value.name}.scale", scale)
        for node in nodes:
            tape = Tape()
            row_scale = tape.op("Gather", [scales, node.inputs[1]], {"axis": 0})
            row = tape.op("Gather", [table, node.inputs[1]], {"axis": 0})
            wide = tape.op("Mul", [tape.op("Cast", [row], {"to": ir.DataType.FLOAT}), row_scale])
            _replace(graph, node, tape, wide)


def _per_channel(
    weight: NDArray[np.float32], axis: int
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Return symmetric int8 codes and the float32 scale that is constant along ``axis``."""
    scale = np.maximum(np.abs(weight).max(axis=axis, keepdims=True), 1e-12) / 127
    codes = np.clip(np.round(weight / scale), -127, 127).astype(np.int8)
    return codes, scale.astype(np.float32)


def _large_weights(graph: ir.Graph) -> list[ir.Value]:
    return [
        value
        for value in graph.initializers.values()
        if value.const_value is not None
        and value.const_value.dtype == ir.DataType.FLOAT
        and value.const_value.size >= _SMALL
        and value.uses()
    ]


def _table_users(value: ir.Value) -> list[ir.Node]:
    """Return the nodes that look rows up in a table."""
    users = [use.node for use in value.uses() if use.idx == 0]
    return [node for node in users if node.op_type == "Gather" and len(value.shape or ()) == 2]


def _replace(graph: ir.Graph, node: ir.Node, tape: Tape, result: ir.Value) -> None:
    """Put the tape's nodes in the place of ``node``, which nothing then uses."""
    graph.insert_before(node, tape.nodes)
    node.outputs[0].replace_all_uses_with(result)
    graph.remove(node, safe=True)


def _array(value: ir.Value) -> NDArray[np.float32]:
    assert value.const_value is not None
    return value.const_value.numpy().astype(np.float32)


def _constant(graph: ir.Graph, name: str, array: NDArray[Any]) -> ir.Value:
    if name in graph.initializers:
        return graph.initializers[name]
    tensor = ir.tensor(array, name=name)
    value = ir.Value(
        name=name,
        shape=ir.Shape(tensor.shape.numpy()),
        type=ir.TensorType(tensor.dtype),
        const_value=tensor,
    )
    graph.register_initializer(value)
    return value
