"""Checkpoints whose config.json names Python code of their own."""

from __future__ import annotations

import json
from pathlib import Path

import by_hand
import numpy as np
import pytest
from tiny import HIDDEN, LAYERS, TEXTS, edit_json, encode, tiny_checkpoint

from m2dexport.checkpoint.open import open_checkpoint
from m2dexport.checkpoint.tokenizer import open_tokenizer
from m2dexport.errors import CheckpointError
from m2dexport.graph.export import graph_from_checkpoint
from m2dexport.reference.pooler import Reference
from m2dexport.slice.slicing import slice_checkpoint

CLOSE = 2e-5
BOTH_WAYS = """
from transformers.models.qwen2 import modeling_qwen2 as base
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config

class Qwen2Model(base.Qwen2Model):
    config_class = Qwen2Config

    def __init__(self, config):
        config.is_causal = False  # every token sees every token
        super().__init__(config)
        for layer in self.layers:
            layer.self_attn.is_causal = False
"""


@pytest.fixture
def both_ways(tmp_path: Path) -> Path:
    """A qwen2 whose own code attends in both directions."""
    folder = tiny_checkpoint(tmp_path / "both-ways", "qwen2", pooling="lasttoken")
    (folder / "modeling_qwen.py").write_text(BOTH_WAYS)
    edit_json(folder / "config.json", auto_map={"AutoModel": "modeling_qwen.Qwen2Model"})
    return folder


def remove_auto_map(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["auto_map"]
    (folder / "config.json").write_text(json.dumps(config))


def test_a_model_with_code_of_its_own_is_refused_unless_it_is_trusted(both_ways: Path) -> None:
    with pytest.raises(CheckpointError, match=r"modeling_qwen\.Qwen2Model.*--trust-remote-code"):
        open_checkpoint(both_ways)
    remove_auto_map(both_ways)
    assert not open_checkpoint(both_ways).own_code


def test_trusted_code_is_what_is_sliced_and_exported(both_ways: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(both_ways, trust_remote_code=True)
    assert checkpoint.own_code
    expected = encode(both_ways, trust_remote_code=True)
    reference = Reference(checkpoint, [LAYERS]).encode(TEXTS)[LAYERS]
    np.testing.assert_allclose(by_hand.normalized(reference), expected, atol=CLOSE)
    sub = slice_checkpoint(checkpoint, LAYERS, HIDDEN, tmp_path / "sub")
    np.testing.assert_allclose(encode(sub.path, trust_remote_code=True), expected, atol=CLOSE)
    remove_auto_map(both_ways)
    assert np.abs(encode(both_ways) - expected).max() > 0.01  # transformers' own class is causal


def test_trusted_code_is_what_the_graph_computes(both_ways: Path) -> None:
    import onnxruntime

    from m2dexport.graph.vector import serialize_graph

    checkpoint = open_checkpoint(both_ways, trust_remote_code=True)
    model = graph_from_checkpoint(checkpoint, [2])
    session = onnxruntime.InferenceSession(serialize_graph(model))
    ids = open_tokenizer(both_ways)(TEXTS[0], return_tensors="np")["input_ids"]
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    (vector,) = session.run(None, feed)
    expected = Reference(checkpoint, [2]).encode([TEXTS[0]])[2]
    np.testing.assert_allclose(vector, expected, atol=1e-4)


def test_a_family_made_for_files_with_code_needs_no_trust(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "x", "nomic_bert")
    edit_json(folder / "config.json", auto_map={"AutoModel": "nomic-ai/code--modeling.Model"})
    checkpoint = open_checkpoint(folder)
    assert not checkpoint.own_code
    sub = slice_checkpoint(checkpoint, 2, 16, tmp_path / "sub")
    assert "auto_map" not in json.loads((sub.path / "config.json").read_text())
