"""Groups of weights that can stay in float32 one by one, and how to restore them."""

from __future__ import annotations

import hashlib
from collections.abc import Collection

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnx_ir.tape import Tape

from m2dexport.graph.edit import array_of, bias_of, constant, replace, weight_matmuls


def units_of(graph: ir.Graph) -> dict[str, tuple[str, ...]]:
    """Return the transformer's weights by unit: the weights of MatMuls with the same input.

    Returns:
        The first weight's name -> the names of all, in graph order: Q, K and V are one unit. A
        weight that several layers share belongs to one unit.
    """
    first: dict[ir.Value, str] = {}
    units: dict[str, dict[str, None]] = {}
    for _, x, weight in weight_matmuls(graph):
        unit = units.setdefault(first.setdefault(x, str(weight.name)), {})
        unit[str(weight.name)] = None
    return {name: tuple(weights) for name, weights in units.items()}


def restore(quantized: ir.Model, original: ir.Model, kept: Collection[str]) -> ir.Model:
    """Return a copy of a quantized graph with some of its weights restored.

    Args:
        quantized: ``original``, quantized.
        original: the float32 graph.
        kept: names of weights; their MatMuls, and the biases after them, become the original's.
    """
    model = quantized.clone()
    graph = model.graph
    values = {value.name: value for value in graph.inputs}
    values |= {value.name: value for node in graph for value in node.outputs}
    for node, x, weight in weight_matmuls(original.graph):
        if weight.name not in kept:
            continue
        tape = Tape()
        end, result = node, tape.op("MatMul", [values[x.name], _copy(graph, weight)])
        # The original's names are distinct; a new one could clash with a later weight.
        result.name = node.outputs[0].name
        bias = bias_of(node)
        if bias is not None:
            end, addend = bias
            result = tape.op("Add", [result, _copy(graph, addend)])
        name = end.outputs[0].name
        changed = values[name].producer()
        assert changed is not None
        replace(graph, changed, tape, result)
        values[name] = result
    RemoveUnusedNodesPass()(model)
    return model


def sha256_of_weights(graph: ir.Graph, names: Collection[str]) -> str | None:
    """Return a hash of the weights' values, regardless of their names; None if there are none."""
    hashes = sorted(
        hashlib.sha256(array_of(value).tobytes()).hexdigest()
        for name, value in graph.initializers.items()
        if name in names
    )
    return hashlib.sha256("".join(hashes).encode()).hexdigest() if hashes else None


def _copy(graph: ir.Graph, weight: ir.Value) -> ir.Value:
    assert weight.const_value is not None
    return constant(graph, str(weight.name), weight.const_value.numpy())
