"""The exported graph: every depth, the cut, the normalisation and the codes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
import transformers
from numpy.typing import NDArray
from tiny import LAYERS, TEXTS, tiny_checkpoint

from m2dexport.checkpoint.open import open_checkpoint
from m2dexport.engines.onnxruntime.make import runner
from m2dexport.errors import UsageError
from m2dexport.graph.export import graph_from_checkpoint
from m2dexport.graph.fuse import fuse_for_onnxruntime
from m2dexport.graph.vector import (
    coded_graph,
    depth_graph,
    full_width,
    serialize_graph,
    tail_bytes,
    vector_graph,
)
from m2dexport.precisions import VECTOR_PRECISIONS
from m2dexport.reference.pooler import Reference
from m2dexport.vectors import codecs


@pytest.fixture(scope="module")
def exported(bert: Path, all_depths) -> ir.Model:
    model = all_depths(bert).clone()
    fuse_for_onnxruntime(model)
    return model


@pytest.fixture(scope="module")
def tokens(bert: Path) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    batch = Reference(open_checkpoint(bert))._tokenizer(
        list(TEXTS), padding=True, truncation=True, max_length=24, return_tensors="np"
    )
    return batch["input_ids"], batch["attention_mask"]


def outputs(model: ir.Model, tokens: tuple[NDArray[np.int64], NDArray[np.int64]]) -> list:  # type: ignore[type-arg]
    return list(runner(model)(*tokens))


def test_one_graph_gives_every_depth_as_the_torch_original_does(bert, exported, tokens) -> None:
    expected = Reference(open_checkpoint(bert)).encode(TEXTS)
    for depth, vectors in enumerate(outputs(exported, tokens), start=1):
        np.testing.assert_allclose(vectors, expected[depth], atol=2e-5)


fused = pytest.mark.skipif(
    transformers.__version__ < "5", reason="transformers 4.57 fixes the attention of its encoders"
)


@fused
def test_a_one_depth_graph_computes_nothing_above_its_depth(exported, tokens) -> None:
    whole = outputs(exported, tokens)
    for depth in range(1, LAYERS + 1):
        part = depth_graph(exported, depth)
        np.testing.assert_array_equal(outputs(part, tokens)[0], whole[depth - 1])
        counts = Counter(node.op_type for node in part.graph)
        assert counts["MultiHeadAttention"] == depth
        assert counts["LayerNormalization"] == 1 + 2 * depth


@fused
def test_attention_and_gelu_of_every_layer_are_fused(bert, all_depths) -> None:
    model = all_depths(bert).clone()
    counts = fuse_for_onnxruntime(model)
    assert counts["MultiHeadAttention"] == counts["Gelu"] == LAYERS
    assert counts["Sum"] == 1 + 2 * LAYERS  # before each norm
    assert counts["Gather"] == 1  # the type of all tokens
    left = {node.op_type for node in model.graph}
    assert not left & {"Softmax", "Erf", "Reshape", "Expand", "GatherElements"}


def test_fusing_changes_no_vector(bert, all_depths, exported, tokens) -> None:
    plain = outputs(all_depths(bert), tokens)
    for before, after in zip(plain, outputs(exported, tokens), strict=True):
        np.testing.assert_allclose(after, before, atol=2e-5)


def test_causal_attention_is_left_unfused(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "m", "qwen3", config={"num_hidden_layers": 1})
    model = graph_from_checkpoint(open_checkpoint(folder))
    assert fuse_for_onnxruntime(model)["MultiHeadAttention"] == 0


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of one layer, and a head whose last operator is a GELU; read only."""
    head, config = [torch.nn.Linear(32, 8)], {"num_hidden_layers": 1}
    folder = tiny_checkpoint(tmp_path_factory.mktemp("one_layer") / "m", head=head, config=config)
    (dense,) = folder.glob("*_Dense/config.json")
    dense.write_text(dense.read_text().replace("activation.Tanh", "activation.GELU"))
    return folder


def test_a_head_that_ends_in_a_gelu_is_exported(one_layer, all_depths) -> None:
    model = all_depths(one_layer).clone()
    assert fuse_for_onnxruntime(model)["Gelu"] >= 1
    (value,) = model.graph.outputs
    assert (value.name, value.shape[1]) == ("depth_1", 8)
    assert value.producer().op_type == "Gelu"
    onnx.checker.check_model(ir.to_proto(model))


@pytest.mark.parametrize("dim", [1, 12, 20, 32])
def test_the_vector_is_cut_before_it_is_normalised(exported, tokens, dim: int) -> None:
    pooled = outputs(depth_graph(exported, 2), tokens)[0]
    vectors = outputs(vector_graph(depth_graph(exported, 2), dim), tokens)[0]
    np.testing.assert_allclose(vectors, codecs.truncate(pooled, dim), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("dim", [12, 32])
@pytest.mark.parametrize("precision", VECTOR_PRECISIONS)
def test_the_graph_encodes_bit_for_bit_as_the_codec_does(exported, tokens, dim, precision) -> None:
    graph = vector_graph(depth_graph(exported, 3), dim)
    vectors = outputs(graph, tokens)[0]
    # Ranges narrower than the vectors: values outside must saturate, not wrap.
    ranges = codecs.Ranges(
        np.full(dim, -0.2, dtype=np.float32), np.linspace(0.1, 0.3, dim, dtype=np.float32)
    )
    codes = outputs(coded_graph(graph, precision, ranges), tokens)[0]
    expected = codecs.encode_vectors(vectors, precision, ranges)
    assert codes.dtype == expected.dtype
    np.testing.assert_array_equal(codes, expected)


@pytest.mark.parametrize("dim", [7, 32])
def test_a_cut_vector_can_be_had_at_its_full_width(exported, tokens, dim: int) -> None:
    one_depth = depth_graph(exported, 2)
    whole = full_width(vector_graph(one_depth, dim))
    np.testing.assert_array_equal(
        outputs(whole, tokens)[0], outputs(vector_graph(one_depth, 32), tokens)[0]
    )


def test_int8_vectors_without_ranges_are_refused(exported) -> None:
    with pytest.raises(UsageError, match="calibration texts"):
        coded_graph(vector_graph(depth_graph(exported, 1), 8), "int8", None)


def test_the_file_has_two_inputs_one_output_and_loads_in_old_onnxruntimes(exported) -> None:
    graph = vector_graph(depth_graph(exported, 1), 8)
    proto = ir.from_proto(ir.to_proto(graph))
    assert [value.name for value in proto.graph.inputs] == ["input_ids", "attention_mask"]
    assert [value.name for value in proto.graph.outputs] == ["sentence_embedding"]
    assert proto.ir_version == 8
    assert proto.opset_imports[""] == 18


def test_the_same_checkpoint_is_the_same_bytes(one_layer, all_depths) -> None:
    again = graph_from_checkpoint(open_checkpoint(one_layer))
    assert serialize_graph(again) == serialize_graph(all_depths(one_layer))


@pytest.mark.parametrize("precision", VECTOR_PRECISIONS)
def test_tail_bytes_predict_what_cut_and_codec_add(exported, precision) -> None:
    dim, width = 12, 32
    ranges = codecs.Ranges(np.full(dim, -0.2, np.float32), np.full(dim, 0.2, np.float32))
    one_depth = depth_graph(exported, 2)
    plain = len(serialize_graph(vector_graph(one_depth, width)))
    full = len(serialize_graph(coded_graph(vector_graph(one_depth, dim), precision, ranges)))
    predicted = tail_bytes(width, dim, precision)
    if precision in codecs.LEVELS:
        predicted -= len(ranges.to_json()) + dim * 2 * 8  # the file, whose digits vary
    assert abs(full - plain - predicted) < 300
