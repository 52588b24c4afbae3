"""OpenVINO: int8 in operators that it runs in 8 bits, and narrow weights that it widens at load.

Of the integer precisions, only int8 computes in 8 bits. It is what ``int8`` makes for onnxruntime,
in standard operators: OpenVINO's low precision transformations turn a MatMul of dequantized values
into a product of their codes. They, and its kernels, are kept from two things:

* They take every conversion from a narrow type to float32 for a dequantization, and move scales
  past it. The additive mask ``(1 - mask) * -3e38`` of boolean masks is one to them: moved past the
  scores, which are lost in it.
* A softmax over as many keys as fill no vector register adds in another order than one over more
  keys, which are masked. The last bit of float32 differs then, and that decides about a code here
  and there: at 6 layers, .0002 of cosine between a text alone and padded.

All other precisions are constants of 8 or 4 bits, and computed with in float32. OpenVINO's dynamic
quantization and NNCF's static one were measured, too, and left out (docs/openvino.md).
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from m2dexport.graph.edit import CONTRIB, array_of, constant, replace, weight_matmuls
from m2dexport.precisions import WeightPrecision
from m2dexport.quantize.codes import BLOCK, pack_halves, quantize_blocks
from m2dexport.quantize.tables import unpacked_halves

#: Float32 values in the widest vector register, that of AVX-512.
_REGISTER = 16


def narrow_matrices(graph: ir.Graph, precision: WeightPrecision) -> None:
    """Store the transformer's matrices in 8 or 4 bits, in place, where the precision says so."""
    if precision == "int8-weight-only":
        _store_blockwise(graph, 8)
    elif precision == "int4-weight-only":
        _store_blockwise(graph, 4)


def standardize_int8(model: ir.Model) -> None:
    """Put standard operators in the place of onnxruntime's in an int8 graph.

    The result is the same function, and its vectors do not depend on padding.
    """
    graph = model.graph
    for node in list(graph):
        if node.op_type == "MatMulIntegerToFloat":
            _use_dequantized(graph, node)
        elif node.op_type == "Softmax":
            _fill_registers(graph, node)
        elif _converts_booleans(node):
            _select(graph, node)
    model.opset_imports.pop(CONTRIB, None)


def _use_dequantized(graph: ir.Graph, node: ir.Node) -> None:
    """Multiply what codes stand for, in the place of a product of codes."""
    codes, weight, step, scale, zero = node.inputs[:5]
    bias = node.inputs[6] if len(node.inputs) > 6 else None
    tape = Tape()
    values = tape.op("DequantizeLinear", [codes, step, zero])
    matrix = tape.op("DequantizeLinear", [weight, scale], {"axis": 1})
    result = tape.op("MatMul", [values, matrix])
    replace(graph, node, tape, result if bias is None else tape.op("Add", [result, bias]))


def _fill_registers(graph: ir.Graph, softmax: ir.Node) -> None:
    """Let a softmax over the last axis see masked values up to the next multiple of 16."""
    x, probabilities = softmax.inputs[0], softmax.outputs[0]
    assert x is not None
    axis = softmax.attributes["axis"].as_int() if "axis" in softmax.attributes else -1
    if axis not in (-1, len(probabilities.shape or ()) - 1):
        return
    zero, last, sixteen = (
        constant(graph, f"softmax.{name}", np.array([value], dtype=np.int64))
        for name, value in (("zero", 0), ("last", -1), ("sixteen", _REGISTER))
    )
    masked = constant(graph, "softmax.masked", np.array(-np.inf, dtype=np.float32))
    tape = Tape()
    keys = tape.op("Shape", [x], {"start": -1})
    more = tape.op("Mod", [tape.op("Neg", [keys]), sixteen])
    ends = tape.op("Concat", [zero, more], {"axis": 0})
    filled = tape.op("Softmax", [tape.op("Pad", [x, ends, masked, last])], {"axis": -1})
    result = tape.op("Slice", [filled, zero, keys, last])
    replace(graph, softmax, tape, result)


def _converts_booleans(node: ir.Node) -> bool:
    if node.op_type != "Cast" or node.inputs[0] is None:
        return False
    to = node.attributes["to"].as_int()
    return node.inputs[0].dtype == ir.DataType.BOOL and to == ir.DataType.FLOAT


def _select(graph: ir.Graph, cast: ir.Node) -> None:
    """Choose 1 or 0 where a boolean was converted to float32."""
    one, zero = (
        constant(graph, f"select.{value}", np.array(value, dtype=np.float32)) for value in (1, 0)
    )
    tape = Tape()
    result = tape.op("Where", [cast.inputs[0], one, zero])
    replace(graph, cast, tape, result)


def _store_blockwise(graph: ir.Graph, bits: Literal[4, 8]) -> None:
    """Store the transformer's matrices as codes of ``quantize_blocks``: a scale every 32 values."""
    for weight in dict.fromkeys(weight for _, _, weight in weight_matmuls(graph)):
        rows = np.ascontiguousarray(array_of(weight).T)  # one row an output channel
        blocks = quantize_blocks(rows, bits)
        name = f"{weight.name}.int{bits}"
        tape = Tape()
        if bits == 8:
            wide = _widened(tape, constant(graph, name, blocks.codes))
        else:
            packed = constant(graph, name, pack_halves(blocks.codes))
            wide = unpacked_halves(graph, tape, packed)
        zero = _widened(tape, constant(graph, f"{weight.name}.zero", blocks.zero))
        scale = constant(graph, f"{weight.name}.scale", blocks.scale)
        values = tape.op("Mul", [tape.op("Sub", [wide, zero]), scale])
        shape = constant(graph, f"{weight.name}.shape", np.array([len(rows), -1]))
        flat = tape.op("Reshape", [values, shape])
        if rows.shape[1] % BLOCK:  # the last block is padded
            start, end, axis = (
                constant(graph, f"{weight.name}.{part}", np.array([value]))
                for part, value in (("start", 0), ("end", rows.shape[1]), ("axis", 1))
            )
            flat = tape.op("Slice", [flat, start, end, axis])
        wide = tape.op("Transpose", [flat], {"perm": [1, 0]})
        graph.insert_before(graph[0], tape.nodes)
        weight.replace_all_uses_with(wide)


def _widened(tape: Tape, codes: ir.Value) -> ir.Value:
    return tape.op("Cast", [codes], {"to": ir.DataType.FLOAT})
