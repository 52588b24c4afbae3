"""Depth 0 as a graph: look token vectors up, and add them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.tape import Tape

from m2dexport.checkpoint.static import TABLE
from m2dexport.graph.edit import constant
from m2dexport.graph.export import IR_VERSION, OPSET
from m2dexport.graph.vector import depth_output


def static_graph(table: NDArray[np.float32]) -> ir.Model:
    """Return the graph of a static model.

    Args:
        table: float32 (tokens, dim).

    Returns:
        A graph from int64 ``input_ids`` and ``attention_mask`` of (batch, sequence) to the output
        ``depth_0``: float32 (batch, dim), the sum of the tokens' rows. Its table has one more row,
        of zeros, for padding: the vector of a text without tokens is zero.
    """
    dim = table.shape[1]
    ids, mask = (
        ir.Value(
            name=name,
            shape=ir.Shape(["batch", "sequence"]),
            type=ir.TensorType(ir.DataType.INT64),
        )
        for name in ("input_ids", "attention_mask")
    )
    graph = ir.Graph([ids, mask], [], nodes=[], opset_imports={"": OPSET}, name="static")
    padded = np.concatenate([table, np.zeros((1, dim), np.float32)])
    one = constant(graph, "static.axis", np.array([1]))
    tape = Tape(graph)
    tokens = tape.op("Gather", [constant(graph, TABLE, padded), ids], {"axis": 0})
    kept = tape.op("Unsqueeze", [tape.op("Cast", [mask], {"to": ir.DataType.FLOAT}), one])
    total = tape.op("Squeeze", [tape.op("MatMul", [kept, tokens]), one])
    total.name = depth_output(0)
    total.shape, total.type = ir.Shape(["batch", dim]), ir.TensorType(ir.DataType.FLOAT)
    graph.outputs.append(total)
    return ir.Model(graph, ir_version=IR_VERSION)
