"""int8, and fp16 beside it, on the checkpoint that ships: fidelity, what is quantized, kernels."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper
from tiny import tiny_checkpoint

from m2dexport.batches import encode_tokens
from m2dexport.checkpoint.open import open_checkpoint
from m2dexport.data import calibration_texts
from m2dexport.engines import Device
from m2dexport.engines.onnxruntime import run as engine
from m2dexport.engines.onnxruntime.make import quantize, runner
from m2dexport.errors import UsageError
from m2dexport.graph.export import graph_from_checkpoint
from m2dexport.graph.fuse import fuse_for_onnxruntime
from m2dexport.graph.vector import depth_graph, serialize_graph
from m2dexport.precisions import ISAS, Isa, WeightPrecision
from m2dexport.quantize.activations import CalibrationTokens
from m2dexport.quantize.coverage import coverage
from m2dexport.quantize.int8 import quantize_matmuls
from m2dexport.quantize.saturation import isa_of
from m2dexport.runtime.tokenizer import load_tokenizer
from m2dexport.vectors.codecs import normalize

DEPTH = 2
TEXTS = calibration_texts()[:64]
CALIBRATED_ON = calibration_texts()[64:300]
Shipped = tuple[ir.Model, list[list[int]], CalibrationTokens]


@pytest.fixture(scope="module")
def shipped(original) -> Shipped:
    """The first two layers of the shipped checkpoint as a graph, texts, and calibration texts."""
    exported = original(None, DEPTH, 384)
    tokenizer = load_tokenizer(exported.tokenizer_json)
    ids, calibration = (
        [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]
        for texts in (TEXTS, CALIBRATED_ON)
    )
    return exported.graph, ids, CalibrationTokens(calibration, 0)


@pytest.fixture(scope="module")
def quantized(shipped: Shipped) -> Callable[..., ir.Model]:
    """From weights and isa to that graph in them, quantized once; read only."""
    graph, _, calibration = shipped

    @cache
    def made(weights: WeightPrecision, isa: Isa) -> ir.Model:
        return quantize(graph, weights, calibration, isa)

    return lambda weights, isa="portable": made(weights, isa)


def encode(model: ir.Model, ids: list[list[int]], batch_size: int) -> np.ndarray:  # type: ignore[type-arg]
    session = engine.load({"model.onnx": serialize_graph(model)}, Device(threads=1), "portable")
    vectors = encode_tokens(lambda *x: engine.run(session, *x)[0], ids, 0, batch_size)
    assert vectors is not None
    return vectors


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
    return (normalize(a) * normalize(b)).sum(axis=1)


def test_int8_vectors_stay_close_to_fp32(shipped, quantized) -> None:
    graph, ids, _ = shipped
    expected = encode(graph, ids, 16)
    found = encode(quantized("int8"), ids, 16)
    # Scales by the largest value alone, and plain rounding, leave a mean of 0.997 here.
    assert cosines(expected, found).mean() > 0.999
    assert cosines(expected, found).min() > 0.998
    assert not np.array_equal(expected, found)


def test_fp16_stores_a_checkpoint_of_fp16_weights_without_loss(shipped, quantized) -> None:
    graph, ids, _ = shipped
    found = encode(quantized("fp16"), ids, 16)
    np.testing.assert_array_equal(found, encode(graph, ids, 16))


def test_a_text_has_the_same_vector_by_itself_and_in_any_batch(shipped, quantized) -> None:
    ids, model = shipped[1], quantized("int8")
    assert cosines(encode(model, ids, 1), encode(model, ids, len(ids))).min() >= 0.99999


@pytest.mark.parametrize(("weights", "factor"), [("fp16", 0.51), ("int8", 0.28)])
def test_files_shrink_as_the_precision_promises(shipped, quantized, weights, factor) -> None:
    before = len(serialize_graph(shipped[0]))
    assert len(serialize_graph(quantized(weights))) < factor * before


@pytest.mark.parametrize("weights", ["fp16", "int8"])
def test_coverage_is_computed_from_the_finished_graph(shipped, quantized, weights) -> None:
    done = coverage(quantized(weights), weights)
    assert done.share > (0.97 if weights == "int8" else 0.99)
    assert all(name.endswith(".spikes") for name in done.left)
    # The same question put to a graph in which nothing was quantized names what was left.
    undone = coverage(shipped[0], weights)
    assert undone.share == 0
    assert any("word_embeddings" in name for name in undone.left)


def test_quantizing_again_gives_the_same_bytes_and_leaves_the_given_graph(
    shipped, quantized
) -> None:
    graph, _, calibration = shipped
    before = serialize_graph(graph)
    again = quantize(graph, "int8", calibration)
    assert serialize_graph(again) == serialize_graph(quantized("int8"))
    assert serialize_graph(graph) == before


def test_a_head_after_pooling_stays_in_float32(tmp_path: Path) -> None:
    head, config = [torch.nn.Linear(32, 512)], {"num_hidden_layers": 1}
    checkpoint = open_checkpoint(tiny_checkpoint(tmp_path / "m", head=head, config=config))
    texts = CalibrationTokens([list(range(5, 5 + n)) for n in range(4, 30)], 0)
    model = quantize(graph_from_checkpoint(checkpoint), "int8", texts)
    wide = [n for n, v in model.graph.initializers.items() if v.dtype == ir.DataType.FLOAT]
    assert any("head" in name and name.endswith("weight") for name in wide)


def test_plain_8_bits_are_finer_and_need_vnni(shipped, quantized) -> None:
    graph, ids, _ = shipped
    exact = encode(graph, ids, 16)
    errors = {}
    for isa in ISAS:
        assert isa_of(quantized("int8", isa).graph) == isa
        errors[isa] = 1 - cosines(exact, encode(quantized("int8", isa), ids, 16)).mean()
    assert errors["vnni"] < errors["portable"]
    for precision in ("int8-weight-only", "int4-weight-only", "fp16"):
        assert isa_of(quantized(precision).graph) == "portable"
    assert isa_of(quantized("int8-dynamic").graph) == "vnni"


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("saturates", [False, True])
def test_exact_kernels_are_asked_for_where_products_do_saturate(
    shipped, monkeypatch, isa, saturates
) -> None:
    monkeypatch.setattr(engine, "_saturates", lambda: saturates)
    options = engine.load(
        {"model.onnx": serialize_graph(shipped[0])}, Device(), isa
    ).get_session_options()
    entry = "session.x64quantprecision"
    if isa == "vnni" and saturates:
        assert options.get_session_config_entry(entry) == "1"
    else:
        with pytest.raises(RuntimeError, match=entry):  # its way to say that it is not set
            options.get_session_config_entry(entry)


def test_a_processor_is_asked_by_a_product_of_codes() -> None:
    types = {"a": TensorProto.UINT8, "b": TensorProto.INT8, "y": TensorProto.INT32}
    values = {name: helper.make_tensor_value_info(name, t, None) for name, t in types.items()}
    node = helper.make_node("MatMulInteger", ["a", "b"], ["y"])
    graph = helper.make_graph([node], "product", [values["a"], values["b"]], [values["y"]])
    opsets = [helper.make_opsetid("", 18)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    assert onnx.load_from_string(engine._PRODUCT) == model
    assert engine._saturates() in (False, True)  # by the processor


def test_a_depth_is_quantized_alike_in_the_graph_of_all_depths_and_alone(
    shipped, shallow, all_depths
) -> None:
    """So that the profile, which quantizes all depths together, measures what is deployed."""
    _, ids, calibration = shipped
    model = all_depths(shallow.path).clone()
    fuse_for_onnxruntime(model)
    together = depth_graph(quantize(model, "int8", calibration), 1)
    alone = quantize(depth_graph(model, 1), "int8", calibration)
    np.testing.assert_allclose(
        encode(together, ids[:20], 20), encode(alone, ids[:20], 20), atol=1e-5
    )


def test_calibration_texts_that_are_too_few_are_refused(shipped) -> None:
    graph, ids, _ = shipped
    with pytest.raises(UsageError, match="int8 weights need 256 or more"):
        quantize_matmuls(graph.clone(), CalibrationTokens(ids[:2], 0), runner, "portable")
    with pytest.raises(UsageError, match="need calibration texts"):
        quantize(graph, "int8")
