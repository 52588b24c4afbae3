"""Each recipe of the quantizers on a graph of one table and one product."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from graphs import CONTRIB, operators, parse, run
from numpy.typing import NDArray

from m2dexport.errors import CheckpointError
from m2dexport.quantize.blockwise import quantize_blockwise
from m2dexport.quantize.codes import quantize_blocks, symmetric_int8
from m2dexport.quantize.dynamic import quantize_dynamic
from m2dexport.quantize.half import store_half
from m2dexport.quantize.standard import narrow_matrices, standardize_int8
from m2dexport.quantize.tables import quantize_tables, quantize_tables_int4

RNG = np.random.default_rng(0)
TABLE = RNG.standard_normal((128, 64)).astype(np.float32)
SQUARE = RNG.standard_normal((64, 80)).astype(np.float32)
TALL = RNG.standard_normal((72, 64)).astype(np.float32)  # 72 is not a multiple of 32
IDS = np.array([[3, 1, 4, 127, 0]])
TOKENS = RNG.standard_normal((2, 3, 64)).astype(np.float32)

LOOK_UP = """
look_up (int64[batch, s] input_ids) => (float[batch, s, 64] y)
{ y = Gather <axis = 0> (table, input_ids) }
"""
PRODUCT = """
product (float[batch, s, 64] x) => (float[batch, s, 80] y)
{ y = MatMul (x, weight) }
"""
SHARED = """
shared (float[batch, s, 64] x) => (float[batch, s, 80] y)
{
  one = MatMul (x, weight)
  two = MatMul (x, other)
  y = Sub (one, two)
}
"""


def look_up() -> ir.Model:
    return parse(LOOK_UP, table=TABLE)


def product(weight: NDArray[np.float32] = SQUARE) -> ir.Model:
    width, out = weight.shape
    text = PRODUCT.replace("64]", f"{width}]").replace("80]", f"{out}]")
    return parse(text, weight=weight)


def stored(model: ir.Model) -> dict[str, str]:
    """Return the types of the constants that something uses."""
    return {
        name: value.const_value.dtype.name.lower()
        for name, value in model.graph.initializers.items()
        if value.uses() and value.const_value is not None
    }


@pytest.mark.parametrize(
    ("dtype", "name"), [(ir.DataType.FLOAT16, "float16"), (ir.DataType.BFLOAT16, "bfloat16")]
)
def test_half_precision_stores_16_bits_and_computes_with_what_they_stand_for(dtype, name) -> None:
    table, weights = look_up(), product()
    for model in (table, weights):
        store_half(model.graph, dtype)
    assert stored(table) == {f"table.{name}": name}
    assert stored(weights) == {f"weight.{name}": name}
    assert operators(table) == {"Gather": 1, "Cast": 1}
    assert operators(weights) == {"MatMul": 1, "Cast": 1}
    rounded = TABLE.astype(dtype.numpy()).astype(np.float32)
    np.testing.assert_array_equal(run(table, input_ids=IDS), rounded[IDS])
    rounded = SQUARE.astype(dtype.numpy()).astype(np.float32)
    np.testing.assert_array_equal(run(weights, x=TOKENS), run(product(rounded), x=TOKENS))


def test_what_half_precision_cannot_hold_is_named() -> None:
    spoiled = SQUARE.copy()
    spoiled[2, 3] = 70000
    store_half(product(spoiled).graph, ir.DataType.BFLOAT16)
    with pytest.raises(CheckpointError, match="weight weight holds values beyond float16"):
        store_half(product(spoiled).graph, ir.DataType.FLOAT16)


def test_a_table_in_8_bits_has_a_scale_for_every_row() -> None:
    model = look_up()
    quantize_tables(model.graph)
    assert stored(model) == {"table.int8": "int8", "table.scale": "float"}
    assert operators(model) == {"Gather": 2, "Cast": 1, "Mul": 1}
    codes, scale = symmetric_int8(TABLE, axis=1)
    np.testing.assert_array_equal(run(model, input_ids=IDS), (codes * scale)[IDS])
    assert np.abs(codes * scale - TABLE).max() <= np.abs(TABLE).max() / 127


def test_a_table_in_4_bits_has_a_scale_and_an_offset_for_every_32_values() -> None:
    model = look_up()
    quantize_tables_int4(model.graph)
    types = {name: kind for name, kind in stored(model).items() if name.startswith("table.")}
    assert types == {"table.int4": "uint8", "table.scale": "float16", "table.offset": "float16"}
    assert model.graph.initializers["table.int4"].const_value.nbytes == TABLE.size // 2
    blocks = quantize_blocks(TABLE, 4)
    scale = blocks.scale.astype(np.float16).astype(np.float32)
    offset = (-blocks.zero.astype(np.float32) * blocks.scale).astype(np.float16).astype(np.float32)
    expected = (blocks.codes * scale + offset).reshape(TABLE.shape)
    np.testing.assert_allclose(run(model, input_ids=IDS), expected[IDS], atol=1e-6)


def test_a_table_whose_width_blocks_do_not_divide_is_stored_in_8_bits() -> None:
    model = parse(LOOK_UP.replace("64]", "72]"), table=np.tile(TALL.T, (2, 1)))
    quantize_tables_int4(model.graph)
    assert stored(model) == {"table.int8": "int8", "table.scale": "float"}


def test_a_product_in_blocks_is_one_node_that_multiplies_codes() -> None:
    exact = run(product(), x=TOKENS)
    errors = {}
    for bits, parts in ((8, {"int8", "scale"}), (4, {"int4", "scale", "zero"})):
        model = product()
        quantize_blockwise(model, bits)
        assert operators(model) == {"MatMulNBits": 1}
        assert model.opset_imports[CONTRIB] == 1
        assert stored(model).keys() == {f"weight.{part}" for part in parts}
        errors[bits] = np.square(run(model, x=TOKENS) - exact).mean() / np.square(exact).mean()
    # Rounding to 2 ** -8 and 2 ** -4 of a block's range of about four deviations, squared, over 12.
    assert 1e-6 < errors[8] < 3e-4
    assert 1e-3 < errors[4] < 3e-2


@pytest.mark.parametrize("weight", [SQUARE, TALL], ids=["whole blocks", "a block that is padded"])
@pytest.mark.parametrize("precision", ["int8-weight-only", "int4-weight-only"])
def test_openvino_widens_blocks_by_standard_operators(weight, precision) -> None:
    model = product(weight)
    narrow_matrices(model.graph, precision)
    assert {node.domain for node in model.graph} == {""}
    bits = 8 if precision == "int8-weight-only" else 4
    assert model.graph.initializers[f"weight.int{bits}"].const_value.dtype == ir.DataType.UINT8
    rows = weight.T
    blocks = quantize_blocks(np.ascontiguousarray(rows), bits)
    values = ((blocks.codes - blocks.zero.astype(np.float32)) * blocks.scale).reshape(len(rows), -1)
    x = RNG.standard_normal((2, 3, len(weight))).astype(np.float32)
    expected = x @ values[:, : len(weight)].T
    np.testing.assert_allclose(run(model, x=x), expected, atol=1e-4)


def test_dynamic_products_of_one_input_share_its_codes() -> None:
    model = parse(SHARED, weight=SQUARE, other=2 * SQUARE[::-1])
    exact = run(model, x=TOKENS)
    quantize_dynamic(model.graph)
    counts = {"DynamicQuantizeLinear": 1, "MatMulInteger": 2, "Cast": 2, "Mul": 4, "Sub": 1}
    assert operators(model) == counts
    low, high = TOKENS.min(), TOKENS.max()
    step = (high - low) / np.float32(255)
    zero = np.rint(-low / step)
    codes = np.clip(np.rint(TOKENS / step) + zero, 0, 255) - zero
    expected = np.zeros((), dtype=np.float64)
    for sign, weight in ((1, SQUARE), (-1, 2 * SQUARE[::-1])):
        values, scale = symmetric_int8(weight, axis=0)
        expected = expected + sign * (codes @ values.astype(np.float64)) * step * scale
    found = run(model, x=TOKENS)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)
    assert not np.allclose(found, exact, atol=1e-3)


INTEGER = f"""
integer (uint8[batch, s, 4] x) => (float[batch, s, 3] y)
<int8[4, 3] w = {{1, -2, 3, 40, 5, -60, 7, 8, 9, -10, 11, 12}}, float step = {{0.125}},
 float[3] scale = {{0.5, 0.25, 2.0}}, uint8 zero = {{128}}, int8[3] none = {{0, 0, 0}},
 float[3] bias = {{1.0, -2.0, 3.0}}>
{{ y = {CONTRIB}.MatMulIntegerToFloat (x, w, step, scale, zero, none, bias) }}
"""
SOFTMAX = """
softmax (float[batch, s, keys] x) => (float[batch, s, keys] y)
{ y = Softmax <axis = -1> (x) }
"""
BOOLEANS = """
booleans (int64[batch, s] mask) => (float[batch, s] y)
<int64 zero = {0}>
{
  masked = Equal (mask, zero)
  wide = Cast <to = 1> (masked)
  number = Cast <to = 1> (mask)
  y = Add (wide, number)
}
"""


@pytest.mark.parametrize("biased", [True, False])
def test_a_product_of_codes_becomes_one_of_what_they_stand_for(biased: bool) -> None:
    text = INTEGER if biased else INTEGER.replace("none, bias)", "none)")
    codes = RNG.integers(0, 256, (2, 5, 4)).astype(np.uint8)
    model = parse(text)
    before = run(model, x=codes)
    standardize_int8(model)
    counts = {"DequantizeLinear": 2, "MatMul": 1, **({"Add": 1} if biased else {})}
    assert operators(model) == counts
    assert CONTRIB not in model.opset_imports
    np.testing.assert_allclose(run(model, x=codes), before, atol=1e-5)


@pytest.mark.parametrize("keys", [1, 15, 16, 17])
def test_a_softmax_sees_masked_keys_up_to_a_whole_register(keys: int) -> None:
    x = RNG.standard_normal((2, 3, keys)).astype(np.float32)
    model = parse(SOFTMAX)
    before = run(model, x=x)
    standardize_int8(model)
    assert {"Softmax": 1, "Pad": 1, "Slice": 1}.items() <= operators(model).items()
    np.testing.assert_allclose(run(model, x=x), before, atol=1e-7)
    filled = next(node for node in model.graph if node.op_type == "Softmax")
    model.graph.outputs[:] = [filled.outputs[0]]
    filled.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    probabilities = run(model, x=x)
    assert probabilities.shape == (2, 3, -(-keys // 16) * 16)
    assert not probabilities[..., keys:].any()


def test_a_softmax_over_another_axis_is_left_alone() -> None:
    model = parse(SOFTMAX.replace("-1", "1"))
    standardize_int8(model)
    assert operators(model) == {"Softmax": 1}


def test_booleans_are_chosen_by_and_numbers_are_converted() -> None:
    mask = np.array([[1, 0, 1], [0, 0, 3]])
    model = parse(BOOLEANS)
    standardize_int8(model)
    assert operators(model) == {"Equal": 1, "Where": 1, "Cast": 1, "Add": 1}
    np.testing.assert_array_equal(run(model, mask=mask), (mask == 0) + mask.astype(np.float32))
