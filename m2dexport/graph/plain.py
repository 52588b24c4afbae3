"""Standard ONNX operators in the place of onnxruntime's own: the way back from ``fuse``.

Converters of other runtimes know no operator outside the standard, and some read its newer forms
wrongly, so norms of vectors are written in their parts, too.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnx_ir.tape import Tape

from m2dexport.graph.edit import CONTRIB, constant, replace

_HEADS = (0, 2, 1, 3)  # (batch, sequence, heads, width) <-> (batch, heads, sequence, width)
_LOWEST = np.finfo(np.float32).min


def write_plainly(model: ir.Model) -> list[str]:
    """Write a graph in standard operators, in place, as far as there are any for it.

    Attention under a padding mask and GELU become what ``fuse`` made them of, and ReduceL2 the root
    of a sum of squares: MNN ignores axes that it is given as an input.

    Args:
        model: a graph for onnxruntime.

    Returns:
        The operators that are left outside the standard, sorted; none if it is plain now.
    """
    for node in list(model.graph):
        write = _WRITTEN.get((node.domain, node.op_type))
        if write is not None:
            tape = Tape()
            replace(model.graph, node, tape, write(model.graph, tape, node))
    RemoveUnusedNodesPass()(model)
    left = sorted({f"{node.domain}.{node.op_type}" for node in model.graph if node.domain})
    if not left:
        model.opset_imports.pop(CONTRIB, None)
    return left


def _attention(graph: ir.Graph, tape: Tape, node: ir.Node) -> ir.Value:
    heads, scale = (
        node.attributes["num_heads"].as_int(),
        np.float32(node.attributes["scale"].as_float()),
    )
    query, key, value = (
        _split(graph, tape, node.inputs[i], heads, (0, 2, 3, 1) if i == 1 else _HEADS)
        for i in range(3)
    )
    scaled = tape.op("Mul", [query, _number(graph, f"attention.scale_{scale:g}", scale)])
    scores = tape.op("Add", [tape.op("MatMul", [scaled, key]), _padding(graph, tape, node)])
    weights = tape.op("Softmax", [scores], {"axis": -1})
    mixed = tape.op("Transpose", [tape.op("MatMul", [weights, value])], {"perm": _HEADS})
    return tape.op("Reshape", [mixed, _numbers(graph, "attention.joined", [0, 0, -1])])


def _split(
    graph: ir.Graph, tape: Tape, value: ir.Value | None, heads: int, perm: tuple[int, ...]
) -> ir.Value:
    shape = _numbers(graph, f"attention.{heads}_heads", [0, 0, heads, -1])
    return tape.op("Transpose", [tape.op("Reshape", [value, shape])], {"perm": perm})


def _padding(graph: ir.Graph, tape: Tape, node: ir.Node) -> ir.Value:
    """Return what is added to scores: 0 for keys that count, the lowest number for padding."""
    kept = tape.op("Cast", [node.inputs[4]], {"to": ir.DataType.FLOAT})
    hidden = tape.op("Sub", [_number(graph, "attention.one", np.float32(1)), kept])
    added = tape.op("Mul", [hidden, _number(graph, "attention.hidden", _LOWEST)])
    return tape.op("Unsqueeze", [added, _numbers(graph, "attention.axes", [1, 2])])


def _gelu(graph: ir.Graph, tape: Tape, node: ir.Node) -> ir.Value:
    x = node.inputs[0]
    root = _number(graph, "gelu.root", np.float32(2**0.5))
    erf = tape.op("Erf", [tape.op("Div", [x, root])])
    plus_one = tape.op("Add", [erf, _number(graph, "gelu.one", np.float32(1))])
    half = tape.op("Mul", [plus_one, _number(graph, "gelu.half", np.float32(0.5))])
    return tape.op("Mul", [x, half])


def _norm(graph: ir.Graph, tape: Tape, node: ir.Node) -> ir.Value:
    x, axes = node.inputs
    kept = {"keepdims": node.attributes["keepdims"].as_int()}
    squares = tape.op("Mul", [x, x])
    return tape.op("Sqrt", [tape.op("ReduceSum", [squares, axes], kept)])


def _number(graph: ir.Graph, name: str, number: np.float32) -> ir.Value:
    return constant(graph, name, np.array(number, dtype=np.float32))


def _numbers(graph: ir.Graph, name: str, numbers: list[int]) -> ir.Value:
    values: NDArray[np.int64] = np.array(numbers, dtype=np.int64)
    return constant(graph, name, values)


_WRITTEN: dict[tuple[str, str], Callable[[ir.Graph, Tape, ir.Node], ir.Value]] = {
    (CONTRIB, "MultiHeadAttention"): _attention,
    (CONTRIB, "Gelu"): _gelu,
    ("", "ReduceL2"): _norm,
}
