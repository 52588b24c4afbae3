"""Vector precision: codes equal to sentence-transformers', in numpy and in the graph."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tiny_artifact import unit_vectors

from m2dexport.engines import Device
from m2dexport.engines.onnxruntime import run as engine
from m2dexport.errors import UsageError
from m2dexport.graph.vector import coded_graph, serialize_graph
from m2dexport.precisions import BIT_ORDERS, VECTOR_PRECISIONS, BitOrder, VectorPrecision
from m2dexport.vectors.codecs import (
    CODEC_VERSION,
    MIN_CALIBRATION_TEXTS,
    Ranges,
    bytes_per_vector,
    calibrate_ranges,
    clipping_rate,
    cosines,
    decode_vectors,
    encode_vectors,
    held_out_clipping_rate,
    normalize,
    ranges_from_json,
    truncate,
)

Floats = NDArray[np.float32]
GOLDEN = json.loads((Path(__file__).parent / "golden" / "codecs.json").read_text())


def float_graph(dim: int) -> ir.Model:
    """A graph whose inputs are ignored but for their batch: it puts out ``vectors`` as they are."""
    vector = ir.Value(
        name="vectors", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["batch", dim])
    )
    node = ir.node("Identity", [vector])
    node.outputs[0].type, node.outputs[0].shape = vector.type, vector.shape
    graph = ir.Graph([vector], node.outputs, nodes=[node], opset_imports={"": 18}, name="float")
    return ir.Model(graph, ir_version=8)


def graph_codes(
    vectors: Floats, precision: VectorPrecision, ranges: Ranges | None, bit_order: BitOrder
) -> NDArray[np.generic]:
    model = coded_graph(float_graph(vectors.shape[1]), precision, ranges, bit_order)
    model.graph.inputs[0].shape = ir.Shape(["batch", "sequence"])
    session = engine.load({"model.onnx": serialize_graph(model)}, Device(threads=1), "portable")
    codes: NDArray[np.generic] = session.run(None, {"vectors": vectors})[0]
    return codes


@pytest.mark.parametrize("case", GOLDEN["cases"])
def test_codes_are_those_of_sentence_transformers(case: dict[str, list[list[float]]]) -> None:
    assert GOLDEN["made_with"].startswith("sentence-transformers 6.2")
    vectors = np.array(case["vectors"], dtype=np.float32)
    ranges = Ranges(*np.array(case["ranges"], dtype=np.float32))
    for precision in ("int8", "ubinary", "binary"):
        codes = encode_vectors(vectors, precision, ranges)
        np.testing.assert_array_equal(codes, case[precision])
    uint8 = encode_vectors(vectors, "int8", ranges).astype(np.int16) + 128
    np.testing.assert_array_equal(uint8, case["uint8"])


@pytest.mark.parametrize("case", GOLDEN["cases"])
def test_codes_of_this_version_are_pinned(case: dict[str, list[list[float]]]) -> None:
    """Codes that are stored must mean the same for as long as the version does not change."""
    assert GOLDEN["codec"] == CODEC_VERSION
    vectors = np.array(case["vectors"], dtype=np.float32)
    ranges = Ranges(*np.array(case["ranges"], dtype=np.float32))
    for precision in ("int8-symmetric", "int4"):
        codes = encode_vectors(vectors, precision, ranges)
        np.testing.assert_array_equal(codes, case[precision])
    little = encode_vectors(vectors, "ubinary", bit_order="little")
    np.testing.assert_array_equal(little, case["ubinary/little"])


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 6), st.integers(0, 1000), st.sampled_from(BIT_ORDERS))
def test_the_graph_and_numpy_give_the_same_codes(
    dim: int, texts: int, seed: int, bit_order: BitOrder
) -> None:
    vectors = unit_vectors(seed, texts, dim)
    low = vectors.min(axis=0) - np.float32(0.1)
    ranges = Ranges(low, low + np.float32(0.15))  # narrow: some values are clipped
    for precision in VECTOR_PRECISIONS:
        expected = encode_vectors(vectors, precision, ranges, bit_order)
        found = graph_codes(vectors, precision, ranges, bit_order)
        np.testing.assert_array_equal(found, expected)
        assert found.dtype == expected.dtype
        assert found[0].nbytes == bytes_per_vector(dim, precision)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 70), st.integers(1, 8), st.integers(0, 1000))
def test_a_single_text_has_the_code_it_has_in_a_batch(dim: int, texts: int, seed: int) -> None:
    vectors = unit_vectors(seed, texts, dim)
    low = np.full(dim, -0.5, dtype=np.float32)
    ranges = Ranges(low, -low)
    for precision in VECTOR_PRECISIONS:
        batch = encode_vectors(vectors, precision, ranges)
        alone = [encode_vectors(vectors[i : i + 1], precision, ranges) for i in range(texts)]
        np.testing.assert_array_equal(batch, np.concatenate(alone))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 70), st.integers(0, 1000), st.sampled_from(BIT_ORDERS))
def test_codes_decode_to_what_encodes_to_them(dim: int, seed: int, bit_order: BitOrder) -> None:
    vectors = unit_vectors(seed, 5, dim)
    ranges = Ranges(np.full(dim, -0.4, np.float32), np.full(dim, 0.5, np.float32))
    for precision in VECTOR_PRECISIONS:
        codes = encode_vectors(vectors, precision, ranges, bit_order)
        decoded = decode_vectors(codes, precision, dim, ranges, bit_order)
        assert decoded.dtype == np.float32
        again = encode_vectors(decoded, precision, ranges, bit_order)
        np.testing.assert_array_equal(again, codes)


def test_signs_of_binary_codes_are_compared_by_hamming_distance() -> None:
    vectors = unit_vectors(0, 20, 37)
    for precision in ("ubinary", "binary"):
        signs = decode_vectors(encode_vectors(vectors, precision), precision, 37)
        distance = ((vectors[:, None] > 0) != (vectors[None] > 0)).sum(axis=2)
        np.testing.assert_array_equal(signs @ signs.T, 37 - 2 * distance)


def test_symmetric_codes_are_compared_as_they_are() -> None:
    """An int8 index takes products of codes; of ranged codes, these have little to say."""
    vectors = unit_vectors(0, 200, 64) + np.float32(0.1)  # dims of real models are not centred
    vectors = normalize(vectors)
    exact = vectors @ vectors.T
    ranges = calibrate_ranges(vectors)
    error = {}
    for precision in ("int8-symmetric", "int8"):
        codes = normalize(encode_vectors(vectors, precision, ranges).astype(np.float32))
        error[precision] = np.abs(codes @ codes.T - exact).max()
    assert error["int8-symmetric"] < 0.02
    assert error["int8"] > 0.1


@pytest.mark.parametrize("dim", [32, 384, 1024])
def test_symmetric_codes_lose_as_much_as_their_rounding_predicts(dim: int) -> None:
    vectors = unit_vectors(0, 200, dim)
    decoded = decode_vectors(encode_vectors(vectors, "int8-symmetric"), "int8-symmetric", dim)
    loss = 1 - (normalize(decoded) * vectors).sum(axis=1).mean()
    assert loss == pytest.approx(dim / 24 / 127**2, rel=0.1)


@pytest.mark.parametrize("dim", [1, 7, 8, 9, 12, 64])
def test_bits_of_dims_not_divisible_by_8_are_padded_with_zeros(dim: int) -> None:
    vectors = unit_vectors(dim, 4, dim)
    codes = encode_vectors(vectors, "ubinary")
    assert codes.shape == (4, bytes_per_vector(dim, "ubinary"))
    bits = np.unpackbits(codes, axis=1)
    np.testing.assert_array_equal(bits[:, :dim], vectors > 0)
    assert not bits[:, dim:].any()


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_decoded_values_are_within_half_a_step(precision: VectorPrecision) -> None:
    vectors = unit_vectors(0, 300, 16)
    ranges = calibrate_ranges(vectors)
    decoded = decode_vectors(encode_vectors(vectors, precision, ranges), precision, 16, ranges)
    # The largest value of a dim is the highest level, whose middle lies half a step above it.
    assert (np.abs(decoded - vectors) <= 0.51 * ranges.step(precision)).all()


def test_values_outside_the_ranges_are_clipped_not_wrapped() -> None:
    ranges = Ranges(np.full(2, -0.5, np.float32), np.full(2, 0.5, np.float32))
    vectors = np.array([[-1.0, 1.0], [0.0, 0.2]], dtype=np.float32)
    assert encode_vectors(vectors, "int8", ranges)[0].tolist() == [-128, 127]
    assert encode_vectors(vectors, "int4", ranges)[0].tolist() == [0x0F]
    assert encode_vectors(2 * vectors, "int8-symmetric")[0].tolist() == [-127, 127]
    assert clipping_rate(vectors, ranges) == 0.5


def test_held_out_clipping_is_not_that_of_the_texts_that_made_the_ranges() -> None:
    vectors = unit_vectors(0, 500, 16)
    assert clipping_rate(vectors, calibrate_ranges(vectors)) == 0
    # Of 500 values, each of the 100 held out is among the two extremes of 401 now and then.
    assert 0.002 < held_out_clipping_rate(vectors) < 0.01


def test_truncating_normalizes_after_the_cut_and_leaves_zeros() -> None:
    vectors = unit_vectors(0, 3, 12)
    vectors[1, :5] = 0
    cut = truncate(vectors, 5)
    np.testing.assert_allclose(np.linalg.norm(cut, axis=1), [1, 0, 1], atol=1e-6)
    np.testing.assert_allclose(cut[0] * np.linalg.norm(vectors[0, :5]), vectors[0, :5], atol=1e-6)


def test_ranges_survive_json_exactly() -> None:
    ranges = calibrate_ranges(unit_vectors(0, 200, 9))
    again = ranges_from_json(ranges.to_json())
    assert again.sha256() == ranges.sha256()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"codec": 1, "low": [0]}',
        '{"low": [0], "high": [1]}',
        '{"codec": 1, "low": [0], "high": [1, 2]}',
        '{"codec": 1, "low": [NaN], "high": [1]}',
        '{"codec": 1, "low": [1], "high": [0]}',
    ],
)
def test_damaged_ranges_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="ranges"):
        ranges_from_json(text)


def test_ranges_of_a_later_codec_are_refused_by_its_version() -> None:
    with pytest.raises(UsageError, match="codec version 2 and this m2dexport reads version 1"):
        ranges_from_json('{"codec": 2, "low": [0], "high": [1]}')


def test_codes_of_another_kind_are_refused() -> None:
    codes = encode_vectors(unit_vectors(0, 2, 16), "ubinary")
    for precision, dim in (("ubinary", 24), ("binary", 16), ("float32", 16)):
        with pytest.raises(UsageError, match="not 2 of uint8"):
            decode_vectors(codes, precision, dim)


@pytest.mark.parametrize("precision", VECTOR_PRECISIONS)
def test_vectors_without_a_code_are_refused(precision: VectorPrecision) -> None:
    vectors = unit_vectors(0, 4, 8)
    vectors[2, 5] = np.inf
    with pytest.raises(UsageError, match="vector 2 holds NaN or infinite values"):
        encode_vectors(vectors, precision, Ranges(-np.ones(8, np.float32), np.ones(8, np.float32)))


def test_ranges_of_another_dim_are_refused() -> None:
    ranges = calibrate_ranges(unit_vectors(0, 200, 9))
    vectors = unit_vectors(0, 2, 8)
    for code in (encode_vectors, graph_codes):
        for precision in ("int8", "int4"):
            with pytest.raises(UsageError, match="9 dims and the vectors 8"):
                code(vectors, precision, ranges, "big")
            with pytest.raises(UsageError, match=f"{precision} vectors need ranges"):
                code(vectors, precision, None, "big")


def test_calibration_refuses_few_constant_and_broken_vectors() -> None:
    vectors = unit_vectors(0, 200, 4)
    with pytest.raises(UsageError, match="too few"):
        calibrate_ranges(vectors[: MIN_CALIBRATION_TEXTS - 1])
    constant = vectors.copy()
    constant[:, 2] = 0.5
    with pytest.raises(UsageError, match="dim 2 is constant"):
        calibrate_ranges(constant)
    broken = vectors.copy()
    broken[7, 1] = np.nan
    with pytest.raises(UsageError, match="NaN"):
        calibrate_ranges(broken)


def test_the_cosine_of_each_row_is_that_of_its_direction() -> None:
    first = np.array([[3, 4], [1e-20, 0], [1, 1], [0, 0]], dtype=np.float32)
    second = np.array([[4, 3], [1e-20, 0], [-2, -2], [1, 0]], dtype=np.float32)
    np.testing.assert_allclose(cosines(first, second), [0.96, 1, -1, 0], atol=1e-15)
    turned = np.array([[1, 2.0**-20]], dtype=np.float32)
    turn = 1 - cosines(turned, np.array([[1, 0]], dtype=np.float32))
    np.testing.assert_allclose(turn, 2.0**-41, rtol=1e-3)  # which float32 would round to 0
