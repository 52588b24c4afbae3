"""Small operations on ONNX graphs, shared by rewrites and quantizers: find, add, replace."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.tape import Tape

#: The domain of onnxruntime's own operators ("contrib ops").
CONTRIB = "com.microsoft"

#: Smaller constants (biases, norms) hardly count in a graph's size.
SMALL = 4096


def producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """Return the node that produces a value, if it has the given type."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op_type else None


def only_user(value: ir.Value, op_type: str) -> ir.Node | None:
    """Return the only node that uses a value, if there is just one and it has the given type."""
    users = [use.node for use in value.uses()]
    return users[0] if len(users) == 1 and users[0].op_type == op_type else None


def bias_of(node: ir.Node) -> tuple[ir.Node, ir.Value] | None:
    """Return the Add of a one-axis constant that is a node's only user, and that constant."""
    add = only_user(node.outputs[0], "Add")
    for value in add.inputs if add is not None else ():
        if value is not None and value.const_value is not None and len(value.shape or ()) == 1:
            assert add is not None
            return add, value
    return None


def scalar_of(value: ir.Value | None) -> float | None:
    """Return a one-element constant as a number, None for anything else."""
    tensor = value.const_value if value is not None else None
    return float(tensor.numpy().item()) if tensor is not None and tensor.size == 1 else None


def array_of(value: ir.Value) -> NDArray[np.float32]:
    """Return a constant's values as float32."""
    assert value.const_value is not None
    return value.const_value.numpy().astype(np.float32)


def constant(graph: ir.Graph, name: str, array: NDArray[Any]) -> ir.Value:
    """Return the graph's constant of this name, creating it from ``array`` if needed."""
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


def large_weights(graph: ir.Graph) -> list[ir.Value]:
    """Return the float32 constants of at least ``SMALL`` values that something uses."""
    return [
        value
        for value in graph.initializers.values()
        if value.const_value is not None
        and value.const_value.dtype == ir.DataType.FLOAT
        and value.const_value.size >= SMALL
        and value.uses()
    ]


def table_users(value: ir.Value) -> list[ir.Node]:
    """Return the nodes that look up rows of a two-axis constant: an embedding table's users."""
    users = [use.node for use in value.uses() if use.idx == 0]
    return [node for node in users if node.op_type == "Gather" and len(value.shape or ()) == 2]


def weight_matmuls(graph: ir.Graph) -> list[tuple[ir.Node, ir.Value, ir.Value]]:
    """Return node, input and weight of every MatMul of tokens with a large constant.

    These are the transformer's; values after pooling do not have a sequence axis.
    """
    found = []
    for node in graph:
        x, weight = (*node.inputs, None, None)[:2]
        if node.op_type != "MatMul" or x is None or weight is None or weight.const_value is None:
            continue
        if weight.const_value.size < SMALL or len(weight.shape or ()) != 2:
            continue
        if x.shape is not None and len(x.shape) == 3:
            found.append((node, x, weight))
    return found


def replace(graph: ir.Graph, node: ir.Node, tape: Tape, result: ir.Value) -> None:
    """Replace ``node`` by the tape's nodes; its users then use ``result``.

    The result takes over the name of the replaced value, so it can still be found by name, its
    shape and type where it has none, and its place among the graph's outputs.
    """
    replaced = node.outputs[0]
    if result.shape is None:
        result.shape, result.type = replaced.shape, replaced.type
    graph.insert_before(node, tape.nodes)
    graph.outputs[:] = [result if value is replaced else value for value in graph.outputs]
    replaced.replace_all_uses_with(result)
    graph.remove(node, safe=True)
    result.name = replaced.name
