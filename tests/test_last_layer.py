"""The last layer computes the pooled token alone: the same vectors, from fewer rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from graphs import operators, parse, run
from tiny import TEXTS

from m2dexport import runtime
from m2dexport.build.build import build_artifact, quantize_artifact
from m2dexport.build.recipe import Recipe
from m2dexport.checkpoint.open import open_checkpoint
from m2dexport.data import calibration_texts
from m2dexport.engines.onnxruntime.make import files, quantize
from m2dexport.graph.last_layer import prune_last_layer, restore_last_layer
from m2dexport.quantize.activations import CalibrationTokens

RNG = np.random.default_rng(0)
IDS = RNG.integers(0, 50, (4, 6))
MASK = np.array([[1] * 6, [1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1], [1, 0, 0, 0, 0, 0]])
WEIGHTS = {
    "table": RNG.standard_normal((50, 8)).astype(np.float32),
    **{n: RNG.standard_normal((8, 8)).astype(np.float32) for n in ("q", "k", "v", "up", "down")},
    "weight": RNG.standard_normal(8).astype(np.float32),
    "bias": RNG.standard_normal(8).astype(np.float32),
    "positions": RNG.standard_normal((1, 6, 8)).astype(np.float32),
}
# A layer of one head, and the pooling of the last token as it is exported.
LAYER = """
layer (int64[batch, s] input_ids, int64[batch, s] attention_mask) => (float[batch, 8] vector)
<int64[1] first = {1}, int64[2] behind = {1, 2}, int64[3] wide = {1, 1, 8}, int64 zero = {0},
 int64 one = {1}, int64[4] heads = {0, 0, 1, 8}, int64[3] merged = {0, 0, 8}, float two = {2.0}>
{
  x = Gather <axis = 0> (table, input_ids)
  query = MatMul (x, q)
  key = MatMul (x, k)
  value = MatMul (x, v)
  query_split = Reshape (query, heads)
  query_heads = Transpose <perm = [0, 2, 1, 3]> (query_split)
  key_split = Reshape (key, heads)
  key_heads = Transpose <perm = [0, 2, 3, 1]> (key_split)
  value_split = Reshape (value, heads)
  value_heads = Transpose <perm = [0, 2, 1, 3]> (value_split)
  scores = MatMul (query_heads, key_heads)
  probabilities = Softmax <axis = -1> (scores)
  weighted = MatMul (probabilities, value_heads)
  tokens = Transpose <perm = [0, 2, 1, 3]> (weighted)
  attended = Reshape (tokens, merged)
  added = Add (attended, x)
  normed = LayerNormalization <axis = -1> (added, weight, bias)
  hidden = MatMul (normed, up)
  active = Relu (hidden)
  output = MatMul (active, down)
  state = Add (output, normed)
  size = Shape <start = 1, end = 2> (attention_mask)
  length = Squeeze (size)
  end = Add (length, one)
  order = Range (one, end, one)
  places = Mul (attention_mask, order)
  place = ArgMax <axis = 1, keepdims = 0> (places)
  index = Unsqueeze (place, behind)
  indices = Expand (index, wide)
  row = GatherElements <axis = 1> (state, indices)
  vector = Squeeze (row, first)
}
"""
ROW_WISE = 14  # operators of that layer that only queries, or what follows attention, pass through


def layer(*changes: tuple[str, str]) -> ir.Model:
    text = LAYER
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    return parse(text, **WEIGHTS)


def vectors(model: ir.Model) -> np.ndarray:  # type: ignore[type-arg]
    return run(model, input_ids=IDS, attention_mask=MASK)


def rows(model: ir.Model) -> dict[str, list[object]]:
    """Return of which values only the pooled token's row is taken, with their shapes."""
    made = (value for node in model.graph for value in node.outputs)
    return {
        str(value.name): list(value.shape or ())
        for value in made
        if str(value.name).endswith(".pooled")
    }


def test_queries_and_all_behind_attention_are_computed_for_one_token() -> None:
    model = layer()
    before = vectors(model)
    assert prune_last_layer(model) == ROW_WISE
    assert list(rows(model)) == ["x.pooled"]
    shapes = {
        str(value.name): value.shape[1]  # type: ignore[index]
        for node in model.graph
        for value in node.outputs
        if value.shape is not None and len(value.shape) == 3
    }
    one = {name for name, size in shapes.items() if str(size) == "pooled_token"}
    pruned = "x.pooled query attended added normed hidden active output state"
    assert one == set(pruned.split())
    assert {"x", "key", "value"} < set(shapes)
    np.testing.assert_allclose(vectors(model), before, atol=1e-6)


def test_pruning_again_changes_nothing() -> None:
    model = layer()
    prune_last_layer(model)
    once = operators(model)
    assert prune_last_layer(model) == 0
    assert operators(model) == once


@pytest.mark.parametrize("saved", [False, True])
def test_what_was_pruned_is_restored(saved: bool) -> None:
    model, plain = layer(), layer()
    prune_last_layer(model)
    if saved:
        model = ir.from_proto(ir.to_proto(model))
    restore_last_layer(model)
    assert operators(model) == operators(plain)
    shapes = [
        [v.shape for n in graph for v in n.outputs if v.name in ("query", "state", "attended")]
        for graph in (model.graph, plain.graph)
    ]
    assert shapes[0] == shapes[1]
    np.testing.assert_array_equal(vectors(model), vectors(plain))
    restore_last_layer(plain)
    assert operators(model) == operators(plain)


STOPS = {
    "a sum over the tokens before": (
        (
            "hidden = MatMul (normed, up)",
            "summed = CumSum (normed, one) hidden = MatMul(summed,up)",
        ),
        ["summed.pooled", "normed.pooled"],
    ),
    "a value that another token needs, too": (
        (
            "state = Add (output, normed)",
            "mean = ReduceMean <keepdims = 1> (output, first) both = Add (output, mean)"
            " state = Add (both, normed)",
        ),
        ["output.pooled", "normed.pooled"],
    ),
    "a mask of queries and keys": (
        (
            "probabilities = Softmax <axis = -1> (scores)",
            "floats = Cast <to = 1> (attention_mask) of_keys = Unsqueeze (floats, behind)"
            " of_queries = Transpose <perm = [0, 1, 3, 2]> (of_keys)"
            " pairs = Mul (of_keys, of_queries) masked = Add (scores, pairs)"
            " probabilities = Softmax <axis = -1> (masked)",
        ),
        ["of_keys.pooled", "x.pooled"],
    ),
    "a table of positions": (
        ("added = Add (attended, x)", "placed = Identity(positions) added = Add(attended, placed)"),
        ["placed.pooled", "x.pooled"],
    ),
}


@pytest.mark.parametrize("name", STOPS)
def test_the_row_is_taken_of_what_all_tokens_need(name: str) -> None:
    change, taken = STOPS[name]
    model = layer(change)
    before = vectors(model)
    assert prune_last_layer(model) > 0
    assert sorted(rows(model)) == sorted(taken)
    assert all("pooled_token" in str(shape) for shape in rows(model).values())
    np.testing.assert_allclose(vectors(model), before, atol=1e-6)


LEFT_ALONE = {
    "pooling of all tokens": [
        ("row = GatherElements <axis = 1> (state, indices)", "row = ReduceMean (state, first)")
    ],
    "two poolings of one state": [
        (
            "vector = Squeeze (row, first)",
            "one_row = Squeeze (row, first)"
            " all = ReduceMean <keepdims = 0> (state, first) vector = Add (one_row, all)",
        )
    ],
    "a second output": [
        ("(float[batch, 8] vector)", "(float[batch, 8] vector, float[batch, s, 8] active)")
    ],
    "a choice of another kind": [("ArgMax <axis = 1", "ArgMin <axis = 1")],
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_what_does_not_pool_one_token_is_left_alone(name: str) -> None:
    model = layer(*LEFT_ALONE[name])
    before = operators(model)
    assert prune_last_layer(model) == 0
    assert operators(model) == before


def test_quantizing_an_artifact_of_one_pooled_token_is_building_it_quantized(
    small, artifact, tmp_path: Path
) -> None:
    few = calibration_texts()[:100]
    recipe = Recipe(weights="int8", vectors="int8", min_coverage=0.5, calibration=few)
    folder = small("qwen3")
    built = build_artifact(open_checkpoint(folder), 2, 64, tmp_path / "built", recipe)
    fp32 = artifact(folder, 2, 64).path
    quantized = quantize_artifact(fp32, tmp_path / "quantized", recipe)
    assert quantized.spec.space_id == built.spec.space_id
    codes = [runtime.load(each.path).encode(list(TEXTS)) for each in (built, quantized)]
    np.testing.assert_array_equal(*codes)
    for path in (fp32, built.path):
        stored = ir.load(path / "model.onnx").graph
        assert any(str(value.name).endswith(".pooled") for node in stored for value in node.outputs)


@pytest.mark.parametrize("weights", ["fp16", "int8", "int4-weight-only"])
def test_the_vectors_of_every_precision_are_kept(small, original, weights) -> None:
    texts = CalibrationTokens([list(range(5, 5 + n)) for n in range(4, 30)], 0)
    model = quantize(original(small("qwen3"), 2, 64).graph, weights, texts)
    pruned = model.clone()
    assert prune_last_layer(pruned) > 20
    assert files(model) == files(pruned)
    inputs = {"input_ids": IDS + 5, "attention_mask": MASK}
    np.testing.assert_allclose(run(pruned, **inputs), run(model, **inputs), atol=1e-5)


def test_scales_of_a_whole_batch_are_left_to_all_its_tokens(small, original) -> None:
    model = quantize(original(small("qwen3"), 2, 64).graph, "int8-dynamic")
    pruned = model.clone()
    assert prune_last_layer(pruned) > 0
    scaled = [node for node in pruned.graph if node.op_type == "DynamicQuantizeLinear"]
    assert not any("pooled" in str(node.inputs[0].shape) for node in scaled)  # type: ignore[union-attr]
    inputs = {"input_ids": IDS + 5, "attention_mask": MASK}
    np.testing.assert_allclose(run(pruned, **inputs), run(model, **inputs), atol=1e-5)
