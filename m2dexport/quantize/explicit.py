"""Integer weights for strongly typed engines: explicit Q/DQ nodes with symmetric codes.

TensorRT takes quantization from the graph alone: zero points are 0, products of codes are written
as products of what the codes stand for, and constants of 8 or 4 bits go through
``DequantizeLinear`` at once.

* ``int8-weight-only`` and ``int4-weight-only`` store the transformer's matrices with a scale per 32
  values and output channel, rounded so that errors cancel (``rounding.round_blocks``).
* ``int8`` also quantizes what the matrices multiply, by fixed scales (``int8.quantize_matmuls``).
  Where these would err too much, as behind a GELU with its rare huge values, the matrix stays
  weight-only.
* Embedding tables have a scale per 32 values of a row.

All scales are float16, so that what they make is, too.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.tape import Tape

from m2dexport.errors import UsageError
from m2dexport.graph.edit import (
    CONTRIB,
    array_of,
    constant,
    large_weights,
    replace,
    table_users,
    weight_matmuls,
)
from m2dexport.quantize.activations import CalibrationTokens, Load, collect_activations
from m2dexport.quantize.codes import BLOCK
from m2dexport.quantize.half import narrowed
from m2dexport.quantize.int8 import quantize_matmuls
from m2dexport.quantize.rounding import LEAST_SCALE, Bits, block_scale, largest_code, round_blocks

#: The first opset whose DequantizeLinear has blocks and 4-bit codes, and its IR version.
_OPSET, _IR_VERSION = 21, 10
_SMALLEST_BLOCK = 8


def store_weights(
    model: ir.Model, bits: Bits, calibration: CalibrationTokens | None, load: Load
) -> None:
    """Store the transformer's matrices and the embedding tables as codes, in place.

    Args:
        model: a float32 graph.
        bits: of a code.
        calibration: the texts that rounding is fitted to.
        load: what runs the graph on them; sums must not depend on the number of its threads.

    Raises:
        UsageError: when the calibration texts are missing or too few.
        CheckpointError: when a weight is outside the range of float16.
    """
    from threadpoolctl import threadpool_limits  # sets a variable when it is imported

    if calibration is None:
        raise UsageError(f"int{bits}-weight-only weights need calibration texts here.")
    graph = model.graph
    for value in large_weights(graph):
        narrowed(value, ir.DataType.FLOAT16)  # refused by name where the scales could not hold it
    products = weight_matmuls(graph)
    inputs = list(dict.fromkeys(x for _, x, _ in products))
    rows = collect_activations(model, inputs, calibration, load) if inputs else {}
    with threadpool_limits(limits=1, user_api="blas"):
        for node, x, weight in products:
            matrix = array_of(weight)
            codes, scale = round_blocks(matrix, rows[str(x.name)], bits, _block(len(matrix)))
            tape = Tape()
            wide = _dequantized(graph, tape, weight, codes, scale, bits, axis=0)
            graph.insert_before(node, tape.nodes)
            node.replace_input_with(1, wide)
    for value in large_weights(graph):
        if table_users(value):
            _store_table(graph, value, bits)
    model.opset_imports[""], model.ir_version = _OPSET, _IR_VERSION


def quantize_explicitly(model: ir.Model, calibration: CalibrationTokens | None, load: Load) -> None:
    """Quantize the transformer's matrices and, where fixed scales do, what they multiply, in place.

    Arguments and errors are those of ``int8.quantize_matmuls``.
    """
    quantize_matmuls(model, calibration, load, "vnni", per_token=False)
    store_weights(model, 8, calibration, load)
    for node in list(model.graph):
        if node.op_type == "QuantizeLinear":
            _use_symmetric(model.graph, node)
    model.opset_imports.pop(CONTRIB, None)


def _use_symmetric(graph: ir.Graph, quantize: ir.Node) -> None:
    """Write products of codes as products of what they stand for, with zero points of 0.

    What the codes stand for is moved to the size of the input's own values: float16 has little room
    for the small scales that the weights would have.
    """
    moved = quantize.inputs[0]
    add = moved.producer() if moved is not None else None
    scaled = add.inputs[0].producer() if add is not None and add.inputs[0] is not None else None
    assert moved is not None and add is not None and scaled is not None
    factor, centre = scaled.inputs[1], add.inputs[1]
    assert factor is not None and centre is not None and scaled.inputs[0] is not None
    moved.shape, moved.type = scaled.inputs[0].shape, ir.TensorType(ir.DataType.FLOAT)
    unit = np.float32(1 / np.median(array_of(factor)))
    for value in (factor, centre):
        value.const_value = ir.tensor(array_of(value) * unit, name=value.name)
    step = constant(graph, f"{factor.name}.step", np.array(unit))
    zero = constant(graph, "int8.zero", np.array(0, dtype=np.int8))
    tape = Tape()
    codes = tape.op("QuantizeLinear", [moved, step, zero])
    values = tape.op("DequantizeLinear", [codes, step, zero])
    graph.insert_before(quantize, tape.nodes)
    values.shape, values.type = moved.shape, ir.TensorType(ir.DataType.FLOAT)
    for node in [use.node for use in quantize.outputs[0].uses()]:
        _use_dequantized(graph, node, values, unit)
    graph.remove(quantize, safe=True)


def _use_dequantized(graph: ir.Graph, node: ir.Node, values: ir.Value, unit: np.float32) -> None:
    """Multiply values by a matrix, in the place of a product of their codes."""
    weight, scale = node.inputs[1], node.inputs[3]
    bias = node.inputs[6] if len(node.inputs) > 6 else None
    assert weight is not None and scale is not None
    channels = np.maximum(array_of(scale) / unit, LEAST_SCALE).astype(np.float16)  # also of zeros
    narrow = constant(graph, f"{scale.name}.16", channels)
    tape = Tape()
    matrix = tape.op("DequantizeLinear", [weight, narrow], {"axis": 1})
    matrix.shape, matrix.type = weight.shape, ir.TensorType(ir.DataType.FLOAT16)
    result = tape.op("MatMul", [values, matrix])
    replace(graph, node, tape, result if bias is None else tape.op("Add", [result, bias]))


def _store_table(graph: ir.Graph, value: ir.Value, bits: Bits) -> None:
    """Store an embedding table with a scale per block of a row, rounded to nearest."""
    table = array_of(value)
    block = _block(table.shape[1])
    rows = table.T  # blocks run along the first axis of what ``block_scales`` takes
    scale = np.stack([block_scale(rows[i : i + block], bits) for i in range(0, len(rows), block)])
    wide = np.repeat(scale.astype(np.float32), block, axis=0)
    largest = largest_code(bits)
    codes = np.clip(np.round(rows / wide), -largest, largest).astype(np.int8)
    tape = Tape()
    codes, scale = np.ascontiguousarray(codes.T), np.ascontiguousarray(scale.T)
    dequantized = _dequantized(graph, tape, value, codes, scale, bits, axis=1)
    graph.insert_before(graph[0], tape.nodes)
    for node in table_users(value):
        node.replace_input_with(0, dequantized)


def _dequantized(
    graph: ir.Graph,
    tape: Tape,
    value: ir.Value,
    codes: NDArray[np.int8],
    scale: NDArray[np.float16],
    bits: Bits,
    axis: int,
) -> ir.Value:
    """Return what block-wise codes stand for, in the shape of the constant ``value``."""
    stored = codes if bits == 8 else codes.astype(ml_dtypes.int4)
    inputs = [
        constant(graph, f"{value.name}.int{bits}", stored),
        constant(graph, f"{value.name}.scale", scale),
    ]
    block = codes.shape[axis] // scale.shape[axis]
    wide = tape.op("DequantizeLinear", inputs, {"axis": axis, "block_size": block})
    wide.shape, wide.type = value.shape, ir.TensorType(ir.DataType.FLOAT16)
    return wide


def _block(size: int) -> int:
    """Return how many of ``size`` values share a scale: ``BLOCK``, or the next number that fits."""
    fits = [block for block in range(BLOCK, _SMALLEST_BLOCK - 1, -1) if size % block == 0]
    return fits[0] if fits else size
