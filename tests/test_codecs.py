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

from m2dexport.codecs import (
    MIN_CALIBRATION_TEXTS,
    Ranges,
    VectorPrecision,
    bytes_per_vector,
    calibrate_ranges,
    clipping_rate,
    decode_int8,
    encode_vectors,
    normalize,
    ranges_from_json,
    truncate,
)
from m2dexport.engines import onnxruntime as engine
from m2dexport.errors import UsageError
from m2dexport.graph import coded_graph, serialize_graph

Floats = NDArray[np.float32]
GOLDEN = json.loads((Path(__file__).parent / "golden" / "codecs.json").read_text())


def unit_vectors(seed: int, texts: int, dim: int) -> Floats:
    rng = np.random.default_rng(seed)
    return normalize(rng.standard_normal((texts, dim)).astype(np.float32))


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
    vectors: Floats, precision: VectorPrecision, ranges: Ranges | None
) -> NDArray[np.generic]:
    model = coded_graph(float_graph(vectors.shape[1]), precision, ranges)
    model.graph.inputs[0].shape = ir.Shape(["batch", "sequence"])
    session = engine.load(serialize_graph(model), threads=1)
    codes: NDArray[np.generic] = session.run(None, {"vectors": vectors})[0]
    return codes


@pytest.mark.parametrize("case", GOLDEN["cases"])
def test_codes_are_those_of_sentence_transformers(case: dict[str, list[list[float]]]) -> None:
    assert GOLDEN["made_with"].startswith("sentence-transformers 6.2")
    vectors = np.array(case["vectors"], dtype=np.float32)
    ranges = Ranges(*np.array(case["ranges"], dtype=np.float32))
    np.testing.assert_array_equal(encode_vectors(vectors, "int8", ranges), case["int8"])
    np.testing.assert_array_equal(encode_vectors(vectors, "ubinary"), case["ubinary"])


def test_codes_have_the_dtype_of_their_precision() -> None:
    vectors = unit_vectors(0, 3, 12)
    ranges = calibrate_ranges(unit_vectors(1, 200, 12))
    assert encode_vectors(vectors, "float32").dtype == np.float32
    assert encode_vectors(vectors, "int8", ranges).dtype == np.int8
    assert encode_vectors(vectors, "ubinary").dtype == np.uint8


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 6), st.integers(0, 1000))
def test_the_graph_and_numpy_give_the_same_codes(dim: int, texts: int, seed: int) -> None:
    vectors = unit_vectors(seed, texts, dim)
    low = vectors.min(axis=0) - np.float32(0.1)
    ranges = Ranges(low, low + np.float32(0.15))  # narrow: some values are clipped
    for precision in ("int8", "ubinary"):
        expected = encode_vectors(vectors, precision, ranges)
        np.testing.assert_array_equal(graph_codes(vectors, precision, ranges), expected)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 70), st.integers(1, 8), st.integers(0, 1000))
def test_a_single_text_has_the_code_it_has_in_a_batch(dim: int, texts: int, seed: int) -> None:
    vectors = unit_vectors(seed, texts, dim)
    low = np.full(dim, -0.5, dtype=np.float32)
    ranges = Ranges(low, -low)
    for precision in ("int8", "ubinary"):
        batch = encode_vectors(vectors, precision, ranges)
        alone = [encode_vectors(vectors[i : i + 1], precision, ranges) for i in range(texts)]
        np.testing.assert_array_equal(batch, np.concatenate(alone))


@pytest.mark.parametrize("dim", [1, 7, 8, 9, 12, 64])
def test_bits_of_dims_not_divisible_by_8_are_padded_with_zeros(dim: int) -> None:
    vectors = unit_vectors(dim, 4, dim)
    codes = encode_vectors(vectors, "ubinary")
    assert codes.shape == (4, bytes_per_vector(dim, "ubinary"))
    bits = np.unpackbits(codes, axis=1)
    np.testing.assert_array_equal(bits[:, :dim], vectors > 0)
    assert not bits[:, dim:].any()


def test_decoded_int8_is_within_half_a_step() -> None:
    vectors = unit_vectors(0, 300, 16)
    ranges = calibrate_ranges(vectors)
    decoded = decode_int8(encode_vectors(vectors, "int8", ranges), ranges)
    # The largest value of a dim is level 255, whose middle lies half a step above it.
    assert (np.abs(decoded - vectors) <= 0.51 * ranges.step).all()


def test_values_outside_the_ranges_are_clipped_not_wrapped() -> None:
    ranges = Ranges(np.full(2, -0.5, np.float32), np.full(2, 0.5, np.float32))
    vectors = np.array([[-1.0, 1.0], [0.0, 0.2]], dtype=np.float32)
    assert encode_vectors(vectors, "int8", ranges)[0].tolist() == [-128, 127]
    assert clipping_rate(vectors, ranges) == 0.5


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
        '{"low": [0]}',
        '{"low": [0], "high": [1, 2]}',
        '{"low": [NaN], "high": [1]}',
        '{"low": [1], "high": [0]}',
    ],
)
def test_damaged_ranges_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="ranges"):
        ranges_from_json(text)


def test_ranges_of_another_dim_are_refused() -> None:
    ranges = calibrate_ranges(unit_vectors(0, 200, 9))
    with pytest.raises(UsageError, match="9 dims and the vectors 8"):
        encode_vectors(unit_vectors(0, 2, 8), "int8", ranges)
    with pytest.raises(UsageError, match="need ranges"):
        encode_vectors(unit_vectors(0, 2, 8), "int8")


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
