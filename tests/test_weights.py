"""Weight precisions: fidelity, independence of the batch, and what is really quantized."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from m2dexport.codecs import normalize
from m2dexport.data import calibration_texts
from m2dexport.engines import onnxruntime as engine
from m2dexport.graph import depth_graph, serialize_graph, vector_graph
from m2dexport.runtime import encode_tokens, load_tokenizer
from m2dexport.weights import quantize_weights
from m2dexport.weights.coverage import coverage

DEPTH = 2
TEXTS = calibration_texts()[:64]


@pytest.fixture(scope="module")
def shipped() -> tuple[ir.Model, list[list[int]]]:
    """The first two layers of the shipped checkpoint as a graph, and tokenized texts."""
    from m2dexport.checkpoint import open_checkpoint
    from m2dexport.export import graph_from_checkpoint
    from m2dexport.rewrites import fuse_for_onnxruntime

    checkpoint = open_checkpoint()
    model = graph_from_checkpoint(checkpoint, (DEPTH,))
    fuse_for_onnxruntime(model)
    tokenizer = load_tokenizer((checkpoint.path / "tokenizer.json").read_text(encoding="utf-8"))
    ids = [encoding.ids for encoding in tokenizer.encode_batch(list(TEXTS))]
    return vector_graph(depth_graph(model, DEPTH), checkpoint.dim), ids


def encode(model: ir.Model, ids: list[list[int]], batch_size: int) -> np.ndarray:  # type: ignore[type-arg]
    session = engine.load(serialize_graph(model), threads=1)
    vectors = encode_tokens(lambda *x: engine.run(session, *x)[0], ids, 0, batch_size)
    assert vectors is not None
    return vectors


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
    return (normalize(a) * normalize(b)).sum(axis=1)


def test_int8_vectors_stay_close_to_fp32(shipped) -> None:
    graph, ids = shipped
    expected = encode(graph, ids, 16)
    found = encode(quantize_weights(graph, "int8"), ids, 16)
    assert cosines(expected, found).min() > 0.99
    assert not np.array_equal(expected, found)


def test_fp16_stores_a_checkpoint_of_fp16_weights_without_loss(shipped) -> None:
    graph, ids = shipped
    found = encode(quantize_weights(graph, "fp16"), ids, 16)
    np.testing.assert_array_equal(found, encode(graph, ids, 16))


@pytest.mark.parametrize("weights", ["fp32", "fp16", "int8"])
def test_a_text_has_the_same_vector_alone_and_in_any_batch(shipped, weights) -> None:
    graph, ids = shipped
    model = quantize_weights(graph, weights)
    assert cosines(encode(model, ids, 1), encode(model, ids, len(ids))).min() >= 0.99999


@pytest.mark.parametrize(("weights", "factor"), [("fp16", 0.51), ("int8", 0.28)])
def test_files_shrink_as_the_precision_promises(shipped, weights, factor) -> None:
    graph, _ = shipped
    before = len(serialize_graph(graph))
    assert len(serialize_graph(quantize_weights(graph, weights))) < factor * before


@pytest.mark.parametrize("weights", ["fp16", "int8"])
def test_coverage_is_computed_from_the_finished_graph(shipped, weights) -> None:
    graph, _ = shipped
    done = coverage(quantize_weights(graph, weights), weights)
    assert done.share > 0.99
    assert done.left == ()
    # The same question put to a graph in which nothing was quantized names what was left.
    undone = coverage(graph, weights)
    assert undone.share == 0
    assert any("word_embeddings" in name for name in undone.left)


def test_quantizing_leaves_the_given_graph_as_it_was(shipped) -> None:
    graph, _ = shipped
    before = serialize_graph(graph)
    quantize_weights(graph, "int8")
    assert serialize_graph(graph) == before


def test_a_head_after_pooling_stays_in_float32(tmp_path: Path) -> None:
    import torch
    from tiny import tiny_checkpoint

    from m2dexport.checkpoint import open_checkpoint
    from m2dexport.export import graph_from_checkpoint

    head = [torch.nn.Linear(32, 512)]
    checkpoint = open_checkpoint(tiny_checkpoint(tmp_path / "m", head=head))
    model = quantize_weights(graph_from_checkpoint(checkpoint), "int8")
    wide = [n for n, v in model.graph.initializers.items() if v.dtype == ir.DataType.FLOAT]
    assert any("head" in name and name.endswith("weight") for name in wide)
