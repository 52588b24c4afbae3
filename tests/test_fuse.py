"""Rewrites for onnxruntime, each on a graph that has just what it looks for, or not quite."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from graphs import operators, parse, run
from onnx_ir.passes.common import RemoveUnusedNodesPass

from m2dexport.graph.fuse import fuse_attention, fuse_gelu, gelu_input, write_sums
from m2dexport.graph.shapes import fix_reshapes, look_up_once

# Two heads of width 4; what is exported for a layer under a plain padding mask.
ATTENTION = """
attention (float[batch, s, 8] q, float[batch, s, 8] k, float[batch, s, 8] v,
           int64[batch, s] attention_mask) => (float[batch, s, 8] y)
<int64[4] split = {0, 0, 2, 4}, int64[3] merge = {0, 0, 8}, int64[2] axes = {1, 2},
 float scale = {0.5}, float one = {1.0}, float lowest = {-3.4028235e38}>
{
  q_split = Reshape (q, split)
  q_heads = Transpose <perm = [0, 2, 1, 3]> (q_split)
  q_scaled = Mul (q_heads, scale)
  k_split = Reshape (k, split)
  k_heads = Transpose <perm = [0, 2, 3, 1]> (k_split)
  v_split = Reshape (v, split)
  v_heads = Transpose <perm = [0, 2, 1, 3]> (v_split)
  wide = Unsqueeze (attention_mask, axes)
  kept = Cast <to = 1> (wide)
  hidden = Sub (one, kept)
  mask = Mul (hidden, lowest)
  scores = MatMul (q_scaled, k_heads)
  masked = Add (scores, mask)
  probabilities = Softmax <axis = -1> (masked)
  weighted = MatMul (probabilities, v_heads)
  tokens = Transpose <perm = [0, 2, 1, 3]> (weighted)
  y = Reshape (tokens, merge)
}
"""

# Name -> what to put in the place of what.
OTHER_ATTENTION = {
    "a causal pattern beside the padding": (
        "mask = Mul (hidden, lowest)",
        "padding = Mul (hidden, lowest) size = Shape (padding) last = Gather (size, three)"
        " square = Concat <axis = 0> (last, last) full = Expand (lowest, square)"
        " pattern = Trilu <upper = 1> (full, one_int) mask = Min (padding, pattern)",
    ),
    "a sliding window alone": (
        "mask = Mul (hidden, lowest)",
        "size = Shape (k_heads) last = Gather (size, three) square = Concat <axis = 0> (last, last)"
        " full = Expand (lowest, square) above = Trilu <upper = 1> (full, two_int)"
        " below = Trilu <upper = 0> (full, minus_two) mask = Add (above, below)",
    ),
    "a bias of positions": (
        "masked = Add (scores, mask)",
        "length = Shape (scores) bias = ConstantOfShape <value = float[1] {0.25}> (length)"
        " biased = Add (scores, bias) masked = Add (biased, mask)",
    ),
    "rotary positions": (
        "q_scaled = Mul (q_heads, scale)",
        "left, right = Split <axis = -1, num_outputs = 2> (q_heads) minus = Neg (right)"
        " turned = Concat <axis = -1> (minus, left) rotated = Add (q_heads, turned)"
        " q_scaled = Mul (rotated, scale)",
    ),
    "queries that are not scaled": ("q_scaled = Mul (q_heads, scale)", "q_scaled = Neg (q_heads)"),
    "a softcap": (
        "masked = Add (scores, mask)",
        "capped = Tanh (scores) masked = Add (capped, mask)",
    ),
    "heads that come last in the result": (
        "tokens = Transpose <perm = [0, 2, 1, 3]> (weighted)",
        "tokens = Transpose <perm = [0, 2, 3, 1]> (weighted)",
    ),
    "values of other heads": (
        "v_heads = Transpose <perm = [0, 2, 1, 3]> (v_split)",
        "v_turned = Transpose <perm = [0, 3, 1, 2]> (v_split) v_heads = Reshape (v_turned, as_q)",
    ),
    "a mask that lowers scores by 1 only": ("lowest = {-3.4028235e38}", "lowest = {-1.0}"),
    "a mask that is 2 where a token is": ("one = {1.0}", "one = {2.0}"),
    "a mask of queries": ("axes = {1, 2}", "axes = {1, 3}"),
    "a mask of another input": ("(attention_mask, axes)", "(other_mask, axes)"),
    "a softmax over queries": ("Softmax <axis = -1>", "Softmax <axis = 2>"),
    "a result of one row per text": (
        "y = Reshape (tokens, merge)",
        "row = Reshape (tokens, flat) y = Reshape (row, rows)",
    ),
}
MORE_CONSTANTS = (
    ", int64[1] three = {3}, int64 one_int = {1}, int64 two_int = {2}, int64 minus_two = {-2},"
    " int64[4] as_q = {0, 2, -1, 4},"
    " int64[2] flat = {0, -1}, int64[3] rows = {0, -1, 8}>\n{"
)

GELU = """
gelu (float[batch, 6] x, float[batch, 6] z) => (float[batch, 6] y)
<float root = {1.4142135}, float one = {1.0}, float half = {0.5}>
{
  divided = Div (x, root)
  erf = Erf (divided)
  sum = Add (erf, one)
  halved = Mul (half, sum)
  y = Mul (x, halved)
}
"""


def fused(rewrite: Callable[[ir.Model], int], model: ir.Model) -> int:
    """Return how many matches there were, once what they have replaced is gone."""
    count = rewrite(model)
    RemoveUnusedNodesPass()(model)
    return count


def attention_inputs() -> dict[str, np.ndarray]:  # type: ignore[type-arg]
    rng = np.random.default_rng(0)
    inputs = {name: rng.standard_normal((3, 5, 8)).astype(np.float32) for name in "qkv"}
    return {**inputs, "attention_mask": np.array([[1] * 5, [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])}


def test_attention_under_a_padding_mask_becomes_one_node_of_the_same_result() -> None:
    model = parse(ATTENTION)
    before = run(model, **attention_inputs())
    assert fused(fuse_attention, model) == 1
    assert operators(model) == {"MultiHeadAttention": 1, "Cast": 1}
    np.testing.assert_allclose(run(model, **attention_inputs()), before, atol=1e-6)


def test_the_mask_is_converted_once_for_all_layers() -> None:
    head, nodes = ATTENTION.rstrip("}\n").split("{\n  q_split")
    layer = "  q_split" + nodes + "\n"
    mask = re.findall(r"^  (?:wide|kept|hidden|mask) = .*\n", layer, re.M)
    own = re.findall(r"^  (\w+) = ", "".join(set(layer.splitlines(True)) - set(mask)), re.M)
    above = "".join(line for line in layer.splitlines(True) if line not in mask)
    above = re.sub(rf"\b({'|'.join(own)})\b", r"\1_2", above).replace("(q,", "(y,")
    model = parse(head.replace(" y)", " y_2)") + "{\n" + layer + above + "}")
    before = run(model, **attention_inputs())
    assert fused(fuse_attention, model) == 2
    assert operators(model) == {"MultiHeadAttention": 2, "Cast": 1}
    np.testing.assert_allclose(run(model, **attention_inputs()), before, atol=1e-6)


@pytest.mark.parametrize("name", OTHER_ATTENTION)
def test_what_is_not_quite_attention_under_a_padding_mask_is_left_alone(name: str) -> None:
    old, new = OTHER_ATTENTION[name]
    assert old in ATTENTION
    text = ATTENTION.replace(old, new)
    text = text.replace(">\n{", MORE_CONSTANTS)
    text = text.replace("attention_mask) =>", "attention_mask, int64[batch, s] other_mask) =>")
    model = parse(text)
    RemoveUnusedNodesPass()(model)  # such as those of a mask that was replaced
    before = operators(model)
    assert fused(fuse_attention, model) == 0
    assert operators(model) == before


@pytest.mark.parametrize(
    "swapped",
    [
        [],
        [("(x, halved)", "(halved, x)")],
        [("(erf, one)", "(one, erf)"), ("(half, sum)", "(sum, half)")],
    ],
)
def test_a_gelu_in_any_order_of_factors_becomes_one_node_of_the_same_result(swapped) -> None:
    text = GELU
    for old, new in swapped:
        text = text.replace(old, new)
    model = parse(text)
    inputs = {name: np.linspace(-4, 4, 30, dtype=np.float32).reshape(5, 6) for name in "xz"}
    before = run(model, **inputs)
    assert fused(fuse_gelu, model) == 1
    assert operators(model) == {"Gelu": 1}
    np.testing.assert_allclose(run(model, **inputs), before, atol=1e-6)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("root = {1.4142135}", "root = {1.5}"),
        ("one = {1.0}", "one = {0.5}"),
        ("half = {0.5}", "half = {0.25}"),
        ("float half = {0.5}", "float[6] half = {0.5, 0.5, 0.5, 0.5, 0.5, 1.0}"),
        ("Erf", "Tanh"),
        ("Div (x, root)", "Div (z, root)"),
        ("Div (x, root)", "Div (root, x)"),
        ("Mul (x, halved)", "Mul (z, halved)"),
        ("Mul (x, halved)", "Add (x, halved)"),
    ],
)
def test_what_is_not_quite_a_gelu_is_left_alone(old: str, new: str) -> None:
    assert old in GELU
    model = parse(GELU.replace(old, new))
    before = operators(model)
    assert fused(fuse_gelu, model) == 0
    assert operators(model) == before


def test_the_input_of_a_gelu_is_told_and_of_nothing_else() -> None:
    nodes: list[ir.Node] = list(parse(GELU).graph)
    assert gelu_input(nodes[-1]).name == "x"  # type: ignore[union-attr]
    assert [gelu_input(node) for node in nodes[:-1]] == [None] * 4


def optimized(model: ir.Model, path: Path) -> Counter[str]:
    """Return what onnxruntime runs of a graph."""
    options = ort.SessionOptions()
    options.log_severity_level, options.optimized_model_filepath = 3, str(path)
    ort.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return operators(ir.load(path))


SUMS = """
sums (float[batch, s, 8] x, float[batch, s, 8] residual) => (float[batch, s, 8] y)
{
  product = MatMul (x, square)
  biased = Add (product, bias)
  added = Add (biased, residual)
  y = LayerNormalization <axis = -1> (added, weight, bias)
}
"""


def test_onnxruntime_fuses_no_sum_into_a_slower_operator(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    shapes = {"square": (8, 8), "bias": (8,), "weight": (8,)}
    weights = {
        name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()
    }
    inputs = {n: rng.standard_normal((2, 3, 8)).astype(np.float32) for n in ("x", "residual")}
    model = parse(SUMS, **weights)
    before = run(model, **inputs)
    assert "SkipLayerNormalization" in optimized(model, tmp_path / "a.onnx")
    assert write_sums(model) == 1
    assert "LayerNormalization" in optimized(model, tmp_path / "b.onnx")
    np.testing.assert_allclose(run(model, **inputs), before, atol=1e-6)
    assert write_sums(model) == 0


RESHAPES = """
reshapes (float[batch, s, 8] x) => (float[batch, heads, s, 4] y, float[batch, 8, t] z)
<int64[1] four = {4}, int64[1] eight = {8}, int64[1] two = {2}, int64[1] rest = {-1}>
{
  batch_size = Shape <start = 0, end = 1> (x)
  length = Shape <start = 1, end = 2> (x)
  split_to = Concat <axis = 0> (batch_size, length, two, four)
  split = Reshape <allowzero = 1> (x, split_to)
  y = Transpose <perm = [0, 2, 1, 3]> (split)
  turned_to = Concat <axis = 0> (batch_size, eight, rest)
  z = Reshape <allowzero = 1> (x, turned_to)
}
"""


def test_a_reshape_copies_the_sizes_that_are_where_they_were() -> None:
    model = parse(RESHAPES)
    shapes = {"split": ["batch", "s", 2, 4], "z": ["batch", 8, "t"]}
    for node in model.graph:
        if node.outputs[0].name in shapes:
            node.outputs[0].shape = ir.Shape(shapes[str(node.outputs[0].name)])
    x = np.random.default_rng(0).standard_normal((3, 5, 8)).astype(np.float32)
    before = run(model, x=x)
    assert fused(fix_reshapes, model) == 2
    assert operators(model) == {"Reshape": 2, "Transpose": 1}
    targets = [node.inputs[1] for node in model.graph if node.op_type == "Reshape"]
    assert [each.const_value.numpy().tolist() for each in targets] == [[0, 0, 2, 4], [0, 8, -1]]
    np.testing.assert_array_equal(run(model, x=x), before)


def test_a_reshape_of_two_new_sizes_is_left_alone() -> None:
    model = parse(RESHAPES)
    for node in model.graph:
        if node.op_type == "Reshape":
            node.outputs[0].shape = ir.Shape(["texts", "tokens", 2, 4])
    assert fix_reshapes(model) == 0


TYPES = """
types (int64[batch, s] input_ids) => (float[batch, s, 4] y)
{
  size = Shape (input_ids)
  types = Expand (one_zero, size)
  type_rows = Gather <axis = 0> (kinds, types)
  rows = Gather <axis = 0> (table, input_ids)
  y = Add (rows, type_rows)
}
"""


@pytest.mark.parametrize(("ids", "found"), [([[1]], 1), ([[0, 1, 0]], 0)])
def test_a_row_that_every_token_adds_is_looked_up_once(ids: list[list[int]], found: int) -> None:
    rng = np.random.default_rng(0)
    tables = {n: rng.standard_normal((5, 4)).astype(np.float32) for n in ("kinds", "table")}
    model = parse(TYPES, one_zero=np.array(ids), **tables)
    inputs = {"input_ids": np.array([[3, 1, 4], [0, 2, 2]])}
    before = run(model, **inputs)
    assert fused(look_up_once, model) == found
    assert operators(model)["Gather"] == 2 - found
    np.testing.assert_array_equal(run(model, **inputs), before)
