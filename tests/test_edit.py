"""Finding and replacing in a graph: what rewrites and quantizers share."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from graphs import operators, parse, run
from onnx_ir.tape import Tape

from m2dexport.graph.edit import (
    SMALL,
    bias_of,
    constant,
    large_weights,
    only_user,
    producer,
    replace,
    scalar_of,
    table_users,
    weight_matmuls,
)

RNG = np.random.default_rng(0)
TABLE = RNG.standard_normal((128, 64)).astype(np.float32)
SQUARE = RNG.standard_normal((64, 64)).astype(np.float32)
ALMOST = RNG.standard_normal((64, 63)).astype(np.float32)  # 4,032 values
GRAPH = """
tokens (int64[batch, s] input_ids) => (float[batch, s, 64] y, float[batch, 64] pooled)
<float two = {2.0}, int64[1] first = {1}>
{
  rows = Gather <axis = 0> (table, input_ids)
  product = MatMul (rows, weight)
  y = Add (product, spread)
  narrow = MatMul (rows, small)
  squares = MatMul (weight, weight)
  mean = ReduceMean <keepdims = 0> (y, first)
  head = MatMul (mean, weight)
  pooled = Mul (head, two)
}
"""


def graph() -> ir.Model:
    spread = np.arange(64, dtype=np.float32)
    return parse(GRAPH, table=TABLE, weight=SQUARE, small=ALMOST, spread=spread)


def values(model: ir.Model) -> dict[str | None, ir.Value]:
    made = {output.name: output for node in model.graph for output in node.outputs}
    return {**made, **model.graph.initializers}


def test_a_value_is_followed_to_its_maker_and_to_its_only_user() -> None:
    found = values(graph())
    assert producer(found["rows"], "Gather") is found["rows"].producer()
    assert producer(found["rows"], "MatMul") is None
    assert producer(found["table"], "Gather") is None  # a constant, which nothing makes
    assert producer(None, "Gather") is None
    assert only_user(found["product"], "Add") is found["y"].producer()
    assert only_user(found["product"], "Mul") is None
    assert only_user(found["rows"], "MatMul") is None  # there are two


def test_a_bias_is_a_constant_of_one_axis_that_is_added() -> None:
    found = values(graph())
    product = found["product"].producer()
    assert product is not None
    assert bias_of(product) == (found["y"].producer(), found["spread"])
    head = found["head"].producer()
    assert head is not None
    assert bias_of(head) is None


def test_a_scalar_is_a_constant_of_one_value() -> None:
    found = values(graph())
    assert scalar_of(found["two"]) == 2
    assert scalar_of(found["first"]) == 1
    assert [scalar_of(value) for value in (found["spread"], found["rows"], None)] == [None] * 3


def test_a_constant_of_a_name_is_made_once() -> None:
    model = graph()
    made = constant(model.graph, "new", np.array([1, 2], dtype=np.int8))
    assert constant(model.graph, "new", np.array([3], dtype=np.int8)) is made
    assert (made.dtype, list(made.shape or ())) == (ir.DataType.INT8, [2])


def test_weights_are_large_tables_are_looked_up_and_products_are_of_tokens() -> None:
    model = graph()
    found = values(model)
    assert ALMOST.size < SMALL <= SQUARE.size
    assert {value.name for value in large_weights(model.graph)} == {"table", "weight"}
    assert table_users(found["table"]) == [found["rows"].producer()]
    assert table_users(found["weight"]) == []
    # Neither what is small, nor products of two constants, nor the head after pooling.
    products = weight_matmuls(model.graph)
    assert products == [(found["product"].producer(), found["rows"], found["weight"])]


def test_what_is_replaced_leaves_its_name_its_users_and_its_place_among_the_outputs() -> None:
    for name in ("product", "y"):
        model = graph()
        node = values(model)[name].producer()
        assert node is not None
        tape = Tape()
        replace(model.graph, node, tape, tape.op("Neg", [tape.op(node.op_type, node.inputs)]))
        assert operators(model)["Neg"] == 1
        assert [value.name for value in model.graph.outputs] == ["y", "pooled"]
        ids = np.array([[3, 1, 4]])
        sign = -1 if name == "product" else 1
        expected = sign * TABLE[ids] @ SQUARE + np.arange(64)
        expected *= -1 if name == "y" else 1
        np.testing.assert_allclose(run(model, input_ids=ids), expected, atol=1e-4)
