"""Every family through to its ONNX graph, against vectors computed by hand, on ragged batches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import by_hand
import numpy as np
import onnx_ir as ir
import pytest
import transformers
from numpy.typing import NDArray
from tiny import FAMILIES, TEXTS, tiny_checkpoint

from m2dexport.checkpoint import Checkpoint, open_checkpoint
from m2dexport.engines import onnxruntime as engine
from m2dexport.export import graph_from_checkpoint
from m2dexport.graph import depth_graph, serialize_graph, vector_graph
from m2dexport.rewrites import fuse_for_onnxruntime
from m2dexport.tokenizer import load_tokenizer

CLOSE = 1e-4
DIM = 20
#: Learned positions count from the first column: under left padding no two batches agree.
ABSOLUTE = ("bert", "electra", "distilbert", "albert")
#: Two layers each: the time of an export grows with depth.
SHALLOW = {
    model_type: {
        "n_layers"
        if model_type == "distilbert"
        else "num_layers"
        if kind == "t5"
        else "num_hidden_layers": 2
    }
    for model_type, (_, kind) in FAMILIES.items()
}
SHALLOW["gemma3_text"]["layer_types"] = ["sliding_attention", "full_attention"]


def run_graph(graph: ir.Model, checkpoint: Checkpoint, texts: Sequence[str], side: str) -> NDArray:  # type: ignore[type-arg]
    tokenizer = load_tokenizer(checkpoint.path)
    batch = tokenizer(
        list(texts),
        padding=True,
        padding_side=side,
        truncation=True,
        max_length=checkpoint.max_length,
        return_tensors="np",
    )
    session = engine.load(serialize_graph(graph), threads=1)
    return engine.run(session, batch["input_ids"], batch["attention_mask"])[0]


def assert_graph_agrees(
    graph: ir.Model,
    checkpoint: Checkpoint,
    expected: NDArray[np.float32],
    *,
    sides: Sequence[str] = ("right", "left"),
    texts: Sequence[str] = TEXTS,
) -> None:
    """Compare ragged batches, padded on either side, and each text alone."""
    for side in sides:
        vectors = run_graph(graph, checkpoint, texts, side)
        np.testing.assert_allclose(vectors, expected, atol=CLOSE, err_msg=side)
    alone = [run_graph(graph, checkpoint, [text], "right")[0] for text in texts]
    np.testing.assert_allclose(np.stack(alone), expected, atol=CLOSE)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_graph_of_every_family_gives_the_vectors_computed_by_hand(
    model_type: str, tmp_path: Path
) -> None:
    if model_type not in transformers.CONFIG_MAPPING:
        pytest.skip("not in this transformers")
    mode = "lasttoken" if FAMILIES[model_type][1] == "decoder" else "mean"
    folder = tiny_checkpoint(tmp_path / "x", model_type, pooling=mode, config=SHALLOW[model_type])
    checkpoint = open_checkpoint(folder)
    model = graph_from_checkpoint(checkpoint)
    fuse_for_onnxruntime(model)
    sides = ("right",) if model_type in ABSOLUTE else ("right", "left")
    for depth in (1, 2):
        expected = by_hand.vectors(folder, TEXTS, depth, DIM, [mode])
        graph = vector_graph(depth_graph(model, depth), DIM)
        assert_graph_agrees(graph, checkpoint, expected, sides=sides)
