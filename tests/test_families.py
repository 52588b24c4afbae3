"""Every family through to its ONNX graph, against vectors computed by hand, on ragged batches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import by_hand
import numpy as np
import onnx_ir as ir
import pytest
import torch
import transformers
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass
from packaging.version import Version
from sentence_transformers import SentenceTransformer
from tiny import FAMILIES, HIDDEN, TEXTS, edit_json, tiny_checkpoint

from m2dexport.build.build import build_artifact
from m2dexport.checkpoint import families
from m2dexport.checkpoint.open import Checkpoint, open_checkpoint
from m2dexport.checkpoint.tokenizer import open_tokenizer
from m2dexport.engines import Device
from m2dexport.engines.onnxruntime import run as engine
from m2dexport.graph.export import graph_from_checkpoint
from m2dexport.graph.fuse import fuse_for_onnxruntime
from m2dexport.graph.last_layer import prune_last_layer
from m2dexport.graph.vector import depth_graph, serialize_graph, vector_graph
from m2dexport.reference.backbone import Backbone
from m2dexport.reference.pooler import Reference
from m2dexport.runtime.bundle import write_bundle
from m2dexport.runtime.loading import load
from m2dexport.slice.slicing import Cut, slice_checkpoint

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
    tokenizer = open_tokenizer(checkpoint.path)
    batch = tokenizer(
        list(texts),
        padding=True,
        padding_side=side,
        truncation=True,
        max_length=checkpoint.max_length,
        return_tensors="np",
    )
    session = engine.load({"model.onnx": serialize_graph(graph)}, Device(threads=1), "portable")
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


def without_mean(graph: ir.Model) -> ir.Model:
    """Return a one-depth graph without what it pools beside one token."""
    gather = next(node for node in reversed(graph.graph) if node.op_type == "GatherElements")
    (squeeze,) = gather.outputs[0].consumers()
    graph.graph.outputs[:] = [squeeze.outputs[0]]
    RemoveUnusedNodesPass()(graph)
    return graph


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_graph_of_every_family_gives_the_vectors_computed_by_hand(
    model_type: str, tmp_path: Path
) -> None:
    if model_type not in transformers.CONFIG_MAPPING:
        pytest.skip("not in this transformers")
    modes = ["lasttoken"] if FAMILIES[model_type][1] == "decoder" else ["cls", "mean"]
    folder = tiny_checkpoint(tmp_path / "x", model_type, pooling=modes, config=SHALLOW[model_type])
    checkpoint = open_checkpoint(folder)
    model = graph_from_checkpoint(checkpoint)
    fuse_for_onnxruntime(model)
    sides = ("right",) if model_type in ABSOLUTE else ("right", "left")
    for depth in (1, 2):
        dim = checkpoint.dim - HIDDEN + DIM
        expected = by_hand.vectors(folder, TEXTS, depth, dim, modes)
        graph = vector_graph(depth_graph(model, depth), dim)
        assert_graph_agrees(graph, checkpoint, expected, sides=sides)
        one_token = vector_graph(without_mean(depth_graph(model, depth)), DIM)
        assert prune_last_layer(one_token) > 0
        expected = by_hand.vectors(folder, TEXTS, depth, DIM, modes[:1])
        assert_graph_agrees(one_token, checkpoint, expected, sides=sides)


def test_the_document_lists_the_families_of_the_table_and_of_the_tests() -> None:
    document = Path(__file__).parent.parent / "docs" / "families.md"
    table = document.read_text(encoding="utf-8").split("\n\n")[2]
    rows = [row.split("|")[1] for row in table.splitlines()[2:]]
    listed = {name.strip() for row in rows for name in row.split(",")}
    assert listed == set(families.FAMILIES) == set(FAMILIES)


STRETCHED: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("llama", {"factor": 2.0}),
    "yarn": ("qwen3", {"factor": 4.0, "original_max_position_embeddings": 16}),
    "dynamic": ("llama", {"factor": 2.0}),
    "longrope": ("phi3", {"short_factor": [1.5] * 4, "long_factor": [3.0] * 4}),
}


def rope(kind: str, settings: dict[str, Any]) -> dict[str, Any]:
    stretched = {"type" if kind == "longrope" else "rope_type": kind, **settings}
    # As 4.57 has it, which 5.x reads, too.
    return {"rope_scaling": stretched, "original_max_position_embeddings": 12}


@pytest.mark.parametrize("kind", STRETCHED)
def test_stretched_rotary_positions_are_kept(kind: str, tmp_path: Path) -> None:
    model_type, settings = STRETCHED[kind]
    config = {**SHALLOW[model_type], **rope(kind, settings)}
    folder = tiny_checkpoint(tmp_path / "x", model_type, config=config, pooling="lasttoken")
    checkpoint = open_checkpoint(folder)
    texts = TEXTS
    if kind == "longrope":
        assert checkpoint.max_length == 12
        assert "as stored for longrope" in checkpoint.assumed[0]
        texts = tuple(text for text in TEXTS if len(open_tokenizer(folder)(text).input_ids) <= 12)
        assert len(texts) > 1
    sub = slice_checkpoint(checkpoint, 1, DIM, tmp_path / "sub")
    assert sub.max_length == checkpoint.max_length
    expected = by_hand.vectors(folder, texts, 1, DIM, ["lasttoken"])
    if kind != "dynamic":
        plain = tiny_checkpoint(tmp_path / "plain", model_type, config=SHALLOW[model_type])
        unstretched = by_hand.vectors(plain, texts, 1, DIM, ["lasttoken"])
        assert np.abs(unstretched - expected).max() > 10 * CLOSE
    model = SentenceTransformer(str(sub.path), device="cpu")
    np.testing.assert_allclose(model.encode(list(texts)), expected, atol=CLOSE)
    if kind != "linear":  # which is as yarn is, to a graph
        graph = vector_graph(graph_from_checkpoint(sub, (1,)), DIM)
        assert_graph_agrees(graph, sub, expected, texts=texts)


def test_a_pass_that_fails_leaves_no_hook_behind(tmp_path: Path) -> None:
    backbone = Backbone(open_checkpoint(tiny_checkpoint(tmp_path / "x", "llama")), "sdpa")
    beyond, mask = torch.tensor([[10**6]]), torch.ones(1, 1, dtype=torch.int64)
    with pytest.raises(IndexError):
        backbone(beyond, mask)
    assert not backbone.transformer.norm._forward_pre_hooks


def test_an_enlarged_table_of_positions_is_kept_with_its_maximum_length(tmp_path: Path) -> None:
    """As in E5-4k: positions interpolated to more rows than the family was trained with."""
    config = {"max_position_embeddings": 300, "num_hidden_layers": 2}
    folder = tiny_checkpoint(tmp_path / "x", config=config)
    edit_json(folder / "sentence_bert_config.json", max_seq_length=300)
    edit_json(folder / "tokenizer_config.json", model_max_length=300)
    sub = slice_checkpoint(open_checkpoint(folder), 1, DIM, tmp_path / "sub")
    assert sub.max_length == 300
    texts = ["a cat " * 200, "the", "a cat " * 60]
    expected = by_hand.vectors(folder, texts, 1, DIM, ["mean"])
    model = SentenceTransformer(str(sub.path), device="cpu")
    assert model.max_seq_length == 300
    np.testing.assert_allclose(model.encode(texts), expected, atol=CLOSE)
    graph = vector_graph(graph_from_checkpoint(sub, (1,)), DIM)
    assert_graph_agrees(graph, sub, expected, sides=["right"], texts=texts)


ALIBI = {
    "bloom": {"hidden_size": HIDDEN, "n_layer": 2, "n_head": 4},
    "mpt": {"d_model": HIDDEN, "n_layers": 2, "n_heads": 4, "expansion_ratio": 2},
}


@pytest.mark.parametrize("model_type", ALIBI)
def test_alibi_agrees_under_either_padding(model_type: str, tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "x", "llama", pooling="lasttoken")
    tokenizer = open_tokenizer(folder)
    special = {"vocab_size": len(tokenizer), "pad_token_id": 0, "eos_token_id": 1}
    config = transformers.AutoConfig.for_model(model_type, **special, **ALIBI[model_type])
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.final_norm == "applied"
    assert f"model type {model_type!r} is not in the table" in checkpoint.assumed[0]
    sub = slice_checkpoint(checkpoint, 1, DIM, tmp_path / "sub")
    norm = model.get_submodule({"bloom": "ln_f", "mpt": "norm_f"}[model_type])
    rows = []
    for text in TEXTS:
        ids = tokenizer(text, truncation=True, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            state = norm(model(ids, output_hidden_states=True).hidden_states[1])
        rows.append(state[0, -1, :DIM].numpy())
    expected = by_hand.normalized(np.stack(rows))
    for side in ("left", "right"):
        encoder = SentenceTransformer(str(sub.path), device="cpu")
        encoder.tokenizer.padding_side = side
        np.testing.assert_allclose(encoder.encode(list(TEXTS)), expected, atol=CLOSE)
    whole = Reference(checkpoint).encode(TEXTS)[1][:, :DIM]
    np.testing.assert_allclose(by_hand.normalized(whole), expected, atol=CLOSE)
    if model_type == "bloom":
        graph = vector_graph(graph_from_checkpoint(sub, (1,)), DIM)
        assert_graph_agrees(graph, sub, expected)


@pytest.mark.parametrize("model_type", ["t5", "modernbert", "qwen3"])
def test_a_skipped_final_norm_is_skipped_in_the_graph_too(model_type: str, tmp_path: Path) -> None:
    if Version(transformers.__version__) < Version("5.18"):
        pytest.skip("this transformers always applies the final norm")
    folder = tiny_checkpoint(tmp_path / "x", model_type, config=SHALLOW[model_type])
    sub = slice_checkpoint(
        open_checkpoint(folder), 1, DIM, tmp_path / "sub", Cut(final_norm="skipped")
    )
    expected = by_hand.vectors(folder, TEXTS, 1, DIM, ["mean"], norm=False)
    graph = vector_graph(graph_from_checkpoint(sub, (1,)), DIM)
    assert_graph_agrees(graph, sub, expected)


@pytest.mark.parametrize(
    ("mode", "side", "end", "bidirectional"),
    [
        ("lasttoken", "left", True, False),
        ("lasttoken", "right", False, False),
        ("mean", "left", True, True),
    ],
)
def test_a_decoder_with_instructions_for_queries_is_bundled_as_it_embeds(
    mode: str, side: str, end: bool, bidirectional: bool, tmp_path: Path
) -> None:
    if bidirectional and Version(transformers.__version__) < Version("5.2"):
        pytest.skip("this transformers ignores is_causal")
    prompts = {"query": "Instruct: find\nQuery: ", "document": ""}
    config = {**SHALLOW["qwen3"], **({"is_causal": False} if bidirectional else {})}
    folder = tiny_checkpoint(
        tmp_path / "x", "qwen3", config=config, pooling=mode, padding_side=side, prompts=prompts
    )
    if not end:
        edit_json(folder / "tokenizer.json", post_processor=None)
    ids = open_tokenizer(folder)("the").input_ids
    assert (ids[-1] == open_tokenizer(folder).eos_token_id) == end
    checkpoint = open_checkpoint(folder)
    sub = slice_checkpoint(checkpoint, 1, DIM, tmp_path / "sub")
    build_artifact(checkpoint, 1, DIM, tmp_path / "artifact")
    write_bundle(tmp_path / "artifact", tmp_path / "x.m2d")
    encoder = load(tmp_path / "x.m2d")
    model = SentenceTransformer(str(sub.path), device="cpu")
    assert model.tokenizer.padding_side == side
    texts = [text for text in TEXTS if text]  # without an end token, an empty text is no token
    for name, prompt in prompts.items():
        expected = by_hand.vectors(folder, texts, 1, DIM, [mode], prompt=prompt)
        found = (model.encode(texts, prompt_name=name), encoder.encode(texts, prompt=name))
        for vectors in found:
            np.testing.assert_allclose(vectors, expected, atol=CLOSE)
