"""Embedding tables: 8 bits a value and one float32 scale a row, widened row by row."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from m2dexport.surgery import array_of, constant, large_weights, replace, table_users


def quantize_tables(graph: ir.Graph) -> None:
    """Store every embedding table as symmetric int8 codes with a scale per row."""
    for value in large_weights(graph):
        nodes = table_users(value)
        if not nodes:
            continue
        rows = array_of(value)
        scale = (np.maximum(np.abs(rows).max(axis=1, keepdims=True), 1e-12) / 127).astype(
            np.float32
        )
        codes = np.clip(np.round(rows / scale), -127, 127).astype(np.int8)
        table = constant(graph, f"{value.name}.int8", codes)
        scales = constant(graph, f"{value.name}.scale", scale)
        for node in nodes:
            tape = Tape()
            row_scale = tape.op("Gather", [scales, node.inputs[1]], {"axis": 0})
            row = tape.op("Gather", [table, node.inputs[1]], {"axis": 0})
            wide = tape.op("Mul", [tape.op("Cast", [row], {"to": ir.DataType.FLOAT}), row_scale])
            replace(graph, node, tape, wide)
