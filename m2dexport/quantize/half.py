"""Half precision: weights are stored in 16 bits and widened to float32 before use."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.tape import Tape

from m2dexport.errors import CheckpointError
from m2dexport.graph.edit import array_of, constant, large_weights, replace, table_users


def store_half(graph: ir.Graph, dtype: ir.DataType) -> None:
    """Store every large float32 constant as ``dtype``, and cast it back before it is used.

    onnxruntime folds the cast of a constant when it loads the graph, so it runs the float32 graph.
    Of an embedding table, it widens only the rows that a text uses.

    Raises:
        CheckpointError: if a value is outside the range of ``dtype``.
    """
    for value in large_weights(graph):
        stored = constant(graph, f"{value.name}.{dtype.name.lower()}", narrowed(value, dtype))
        for node in table_users(value):
            tape = Tape()
            rows = tape.op("Gather", [stored, node.inputs[1]], {"axis": 0})
            replace(graph, node, tape, tape.op("Cast", [rows], {"to": ir.DataType.FLOAT}))
        if value.uses():
            tape = Tape()
            wide = tape.op("Cast", [stored], {"to": ir.DataType.FLOAT})
            graph.insert_before(graph[0], tape.nodes)
            value.replace_all_uses_with(wide)


def narrowed(value: ir.Value, dtype: ir.DataType) -> NDArray[np.generic]:
    """Return a constant in 16 bits.

    Raises:
        CheckpointError: when a large one, a weight, is outside the range of ``dtype``.
    """
    array = array_of(value)
    with np.errstate(over="ignore"):
        values = array.astype(dtype.numpy())
    if not np.isfinite(values.astype(np.float32)).all():
        raise CheckpointError(
            f"weight {value.name} holds values beyond {dtype.name.lower()}; use bf16 or fp32."
        )
    return values
