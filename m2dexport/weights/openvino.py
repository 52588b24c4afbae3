"""Narrow weights for OpenVINO: constants of 8 or 4 bits in standard operators, widened at load.

Products are computed in float32. 8-bit activations were measured, too, and left out
(docs/quantization.md): OpenVINO's dynamic quantization makes a text's vector depend on its batch,
and NNCF's static quantization costs a hundredth of cosine.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.tape import Tape

from m2dexport.surgery import array_of, constant, weight_matmuls
from m2dexport.weights import WeightPrecision
from m2dexport.weights.codes import BLOCK, Floats, pack_halves, quantize_blocks
from m2dexport.weights.tables import unpacked_halves


def narrow_matrices(graph: ir.Graph, precision: WeightPrecision) -> None:
    """Store the transformer's matrices in one of OpenVINO's integer precisions, in place."""
    if precision == "int4-weight-only":
        _store_blockwise(graph, 4)
    elif precision == "int8-weight-only":
        _store_blockwise(graph, 8)
    if precision.startswith("int"):
        _store_per_channel(graph)


def _store_per_channel(graph: ir.Graph) -> None:
    """Store the transformer's matrices as uint8 codes, a scale and zero point an output channel.

    Zero points matter: the largest weights of a channel often lie on one side.
    """
    for weight in _matrices(graph):
        codes, scale, zero_point = _quantized(array_of(weight))
        inputs = [
            constant(graph, f"{weight.name}.uint8", codes),
            constant(graph, f"{weight.name}.scale", scale),
            constant(graph, f"{weight.name}.zero", zero_point),
        ]
        tape = Tape()
        _replace(graph, weight, tape, tape.op("DequantizeLinear", inputs, {"axis": 1}))


def _store_blockwise(graph: ir.Graph, bits: Literal[4, 8]) -> None:
    """Store the transformer's matrices as codes of ``quantize_blocks``: a scale every 32 values.

    A matrix whose input width is no multiple of 32 is left.
    """
    for weight in _matrices(graph):
        rows = np.ascontiguousarray(array_of(weight).T)  # one row an output channel
        if rows.shape[1] % BLOCK:
            continue
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
        shape = constant(graph, f"{weight.name}.shape", np.array(rows.shape))
        flat = tape.op("Reshape", [values, shape])
        _replace(graph, weight, tape, tape.op("Transpose", [flat], {"perm": [1, 0]}))


def _matrices(graph: ir.Graph) -> list[ir.Value]:
    return list(dict.fromkeys(weight for _, _, weight in weight_matmuls(graph)))


def _replace(graph: ir.Graph, weight: ir.Value, tape: Tape, wide: ir.Value) -> None:
    graph.insert_before(graph[0], tape.nodes)
    weight.replace_all_uses_with(wide)


def _widened(tape: Tape, codes: ir.Value) -> ir.Value:
    return tape.op("Cast", [codes], {"to": ir.DataType.FLOAT})


def _quantized(weight: Floats) -> tuple[NDArray[np.uint8], Floats, NDArray[np.uint8]]:
    """Return uint8 codes (in, out), and the float32 scale and uint8 zero point of each column."""
    low = np.minimum(weight.min(axis=0), 0)
    high = np.maximum(weight.max(axis=0), 0)
    scale = np.maximum(high - low, np.float32(1e-12)) / np.float32(255)
    zero_point = np.round(-low / scale)
    codes = np.clip(np.round(weight / scale) + zero_point, 0, 255).astype(np.uint8)
    return codes, scale, zero_point.astype(np.uint8)
