"""Exact graph rewrites: the same function with the operators that onnxruntime runs fastest.

Every rewrite changes a model in place and returns how many matches it replaced, so that tests and
readers of the manifest can count them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnx_ir.tape import Tape

from m2dexport.graph.edit import CONTRIB, only_user, producer, replace, scalar_of
from m2dexport.graph.shapes import fix_reshapes, look_up_once

#: onnxruntime adds this to the score of a key that padding hides; lower is as good.
_HIDDEN = -1e4


def fuse_for_onnxruntime(model: ir.Model) -> dict[str, int]:
    """Apply every rewrite; return name -> number of matches replaced."""
    model.opset_imports[CONTRIB] = 1
    counts = {
        "MultiHeadAttention": fuse_attention(model),
        "Gelu": fuse_gelu(model),
        "Sum": write_sums(model),
        "Reshape": fix_reshapes(model),
        "Gather": look_up_once(model),
    }
    RemoveUnusedNodesPass()(model)
    return counts


def fuse_attention(model: ir.Model) -> int:
    """Replace textbook attention under a plain padding mask by one MultiHeadAttention.

    ::

        q ─Reshape─Transpose─Mul(scale)─┐
        k ─Reshape─Transpose────────────MatMul─Add(padding)─Softmax─┐
        v ─Reshape─Transpose────────────────────────────────────MatMul─Transpose─Reshape─>

    Attention with rotary positions, a bias or a causal or sliding pattern does not match.
    """
    attention_mask = next(value for value in model.graph.inputs if value.name == "attention_mask")
    key_padding: ir.Value | None = None
    replaced = 0
    for softmax in [node for node in model.graph if node.op_type == "Softmax"]:
        match = _match_attention(softmax, attention_mask)
        if match is None:
            continue
        query, key, value, heads, scale, end = match
        if key_padding is None:
            cast = ir.node("Cast", [attention_mask], {"to": ir.DataType.INT32})
            model.graph.insert_before(model.graph[0], cast)
            key_padding = cast.outputs[0]
        inputs = [query, key, value, None, key_padding]
        attributes = {"num_heads": heads, "scale": scale}
        _replace(model.graph, end, "MultiHeadAttention", inputs, attributes)
        replaced += 1
    return replaced


def fuse_gelu(model: ir.Model) -> int:
    """Replace ``x * 0.5 * (1 + erf(x / sqrt 2))`` by one Gelu, including its bias."""
    replaced = 0
    for node in [node for node in model.graph if node.op_type == "Mul"]:
        x = gelu_input(node)
        if x is not None:
            _replace(model.graph, node, "Gelu", [x])
            replaced += 1
    return replaced


def write_sums(model: ir.Model) -> int:
    """Write the sums that norms take as Sum instead of Add.

    onnxruntime fuses an Add with the LayerNormalization behind it into a SkipLayerNormalization,
    which takes several times as long (docs/performance.md#the-graph). It does not fuse a Sum.
    """
    written = 0
    for node in model.graph:
        users = node.outputs[0].consumers() if node.op_type == "Add" else ()
        if any(user.op_type == "LayerNormalization" for user in users):
            node.op_type = "Sum"
            written += 1
    return written


def gelu_input(node: ir.Node) -> ir.Value | None:
    """Return x if a node computes ``x * (0.5 * (1 + erf(x / sqrt 2)))``, else None."""
    for x, half in permutations(node.inputs) if node.op_type == "Mul" else ():
        plus_one = producer(_beside(producer(half, "Mul"), 0.5), "Add")
        erf = producer(_beside(plus_one, 1.0), "Erf")
        divide = producer(erf.inputs[0], "Div") if erf else None
        if divide and divide.inputs[0] is x and _is_scalar(divide.inputs[1], 2**0.5):
            return x
    return None


def _beside(node: ir.Node | None, scalar: float) -> ir.Value | None:
    """Return the other input of a node that takes two inputs, one a scalar constant."""
    for value, other in permutations(node.inputs) if node else ():
        if _is_scalar(value, scalar):
            return other
    return None


def _replace(
    graph: ir.Graph,
    last: ir.Node,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    attributes: Mapping[str, Any] | None = None,
) -> None:
    """Replace ``last``, the last node of a match, by one of onnxruntime's own operators."""
    tape = Tape()
    result = tape.op(op_type, inputs, attributes, domain=CONTRIB)
    replace(graph, last, tape, result)


def _match_attention(
    softmax: ir.Node, attention_mask: ir.Value
) -> tuple[ir.Value, ir.Value, ir.Value, int, float, ir.Node] | None:
    masked = producer(softmax.inputs[0], "Add") if _over_keys(softmax) else None
    scores = producer(masked.inputs[0], "MatMul") if masked else None
    weighted = only_user(softmax.outputs[0], "MatMul")
    if masked is None or scores is None or weighted is None:
        return None
    scaled = producer(scores.inputs[0], "Mul")
    scale = scalar_of(scaled.inputs[1]) if scaled else None
    if scaled is None or scale is None or not _is_padding(masked.inputs[1], attention_mask):
        return None
    query = _merged_heads(scaled.inputs[0], (0, 2, 1, 3))
    key = _merged_heads(scores.inputs[1], (0, 2, 3, 1))
    value = _merged_heads(weighted.inputs[1], (0, 2, 1, 3))
    transpose = only_user(weighted.outputs[0], "Transpose")
    end = only_user(transpose.outputs[0], "Reshape") if transpose else None
    if query is None or key is None or value is None or transpose is None or end is None:
        return None
    if tuple(transpose.attributes["perm"].as_ints()) != (0, 2, 1, 3):
        return None
    heads = scaled.inputs[0].shape[1] if scaled.inputs[0] and scaled.inputs[0].shape else None
    widths = {_width(side) for side in (query, key, value, end.outputs[0])}
    if len(widths) > 1 or None in widths or not isinstance(heads, int):
        return None
    return query, key, value, heads, scale, end


def _merged_heads(value: ir.Value | None, perm: tuple[int, ...]) -> ir.Value | None:
    """Return the (batch, sequence, heads * width) value that was split into heads, or None."""
    transpose = producer(value, "Transpose")
    if transpose is None or tuple(transpose.attributes["perm"].as_ints()) != perm:
        return None
    reshape = producer(transpose.inputs[0], "Reshape")
    return reshape.inputs[0] if reshape else None


def _over_keys(softmax: ir.Node) -> bool:
    return "axis" not in softmax.attributes or softmax.attributes["axis"].as_int() in (-1, 3)


def _width(value: ir.Value) -> ir.SymbolicDim | int | None:
    """Return the width of the heads together of (batch, sequence, heads * width), else None."""
    return value.shape[2] if value.shape is not None and len(value.shape) == 3 else None


def _is_padding(value: ir.Value | None, attention_mask: ir.Value) -> bool:
    """Return whether an additive mask is exactly ``(1 - attention_mask) * lowest``.

    It hides keys, the same ones from every query: its shape is (batch, 1, 1, key).
    """
    if value is None or value.shape is None or list(value.shape[1:3]) != [1, 1]:
        return False
    for op_type in ("Mul", "Sub", "Cast", "Unsqueeze", "Cast"):
        if op_type == "Cast" and value is attention_mask:
            return True
        node = producer(value, op_type)
        if node is None:
            return op_type == "Cast" and value is attention_mask
        if op_type == "Sub" and not _is_scalar(node.inputs[0], 1.0):
            return False
        if op_type == "Mul" and (scalar_of(node.inputs[1]) or 0.0) > _HIDDEN:
            return False
        value = node.inputs[1] if op_type == "Sub" else node.inputs[0]
    return value is attention_mask


def _is_scalar(value: ir.Value | None, expected: float) -> bool:
    number = scalar_of(value)
    return number is not None and bool(np.isclose(number, expected, rtol=1e-6))
