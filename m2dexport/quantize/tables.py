"""Embedding tables: 8 bits with a scale per row, or 4 bits with a scale and offset per block.

Standard operators widen only the rows that a text uses.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from m2dexport.graph.edit import array_of, constant, large_weights, replace, table_users
from m2dexport.quantize.codes import BLOCK, pack_halves, quantize_blocks, symmetric_int8


def quantize_tables(graph: ir.Graph) -> None:
    """Store every embedding table as symmetric int8 codes with a scale per row."""
    for value in large_weights(graph):
        nodes = table_users(value)
        if nodes:
            _store_int8(graph, value, nodes)


def quantize_tables_int4(graph: ir.Graph) -> None:
    """Store every embedding table as uint4 codes with a float16 scale and offset per block of 32.

    A table whose width is not a multiple of 32 is stored in int8.
    """
    for value in large_weights(graph):
        nodes = table_users(value)
        ranks = {len(n.inputs[1].shape) if n.inputs[1].shape is not None else None for n in nodes}  # type: ignore[union-attr]
        if nodes and array_of(value).shape[1] % BLOCK == 0 and None not in ranks:
            _store_int4(graph, value, nodes)
        elif nodes:
            _store_int8(graph, value, nodes)


def unpacked_halves(graph: ir.Graph, tape: Tape, packed: ir.Value) -> ir.Value:
    """Return the float32 codes (..., BLOCK) of bytes (..., BLOCK / 2) of ``codes.pack_halves``.

    With arithmetic instead of shifts: OpenVINO saturates a uint8 left shift to 255.
    """
    both = tape.op("Cast", [packed], {"to": ir.DataType.FLOAT})
    sixteen = constant(graph, "int4.sixteen", np.array(16, dtype=np.float32))
    high = tape.op("Floor", [tape.op("Div", [both, sixteen])])
    low = tape.op("Sub", [both, tape.op("Mul", [high, sixteen])])
    return tape.op("Concat", [low, high], {"axis": -1})


def _store_int8(graph: ir.Graph, value: ir.Value, nodes: list[ir.Node]) -> None:
    codes, scale = symmetric_int8(array_of(value), axis=1)
    table = constant(graph, f"{value.name}.int8", codes)
    scales = constant(graph, f"{value.name}.scale", scale)
    for node in nodes:
        tape = Tape()
        row_scale = tape.op("Gather", [scales, node.inputs[1]], {"axis": 0})
        row = tape.op("Gather", [table, node.inputs[1]], {"axis": 0})
        wide = tape.op("Mul", [tape.op("Cast", [row], {"to": ir.DataType.FLOAT}), row_scale])
        replace(graph, node, tape, wide)


def _store_int4(graph: ir.Graph, value: ir.Value, nodes: list[ir.Node]) -> None:
    blocks = quantize_blocks(array_of(value), 4)
    table = constant(graph, f"{value.name}.int4", pack_halves(blocks.codes))
    scale = constant(graph, f"{value.name}.scale", blocks.scale.astype(np.float16))
    offsets = (-blocks.zero.astype(np.float32) * blocks.scale).astype(np.float16)
    offset = constant(graph, f"{value.name}.offset", offsets)
    for node in nodes:
        ids = node.inputs[1]
        assert ids is not None and ids.shape is not None
        merged = np.array([0] * len(ids.shape) + [-1])
        tape = Tape()
        codes = tape.op("Gather", [table, ids], {"axis": 0})
        both = unpacked_halves(graph, tape, codes)
        step, start = (
            tape.op(
                "Cast", [tape.op("Gather", [part, ids], {"axis": 0})], {"to": ir.DataType.FLOAT}
            )
            for part in (scale, offset)
        )
        rows = tape.op("Add", [tape.op("Mul", [both, step]), start])
        wide = tape.op("Reshape", [rows, constant(graph, f"int4.rows{len(ids.shape)}", merged)])
        replace(graph, node, tape, wide)
