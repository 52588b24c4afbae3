"""Where a checkpoint's files say one thing and its loaders do another, the files are believed."""

from __future__ import annotations

import io
import json
import logging
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import by_hand
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from click.testing import CliRunner
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Router
from sentence_transformers.sentence_transformer import modules as st
from tiny import HIDDEN, LAYERS, TEXTS, tiny_checkpoint
from tokenizers import Tokenizer

from m2dexport.checkpoint.open import open_checkpoint
from m2dexport.checkpoint.tokenizer import open_tokenizer
from m2dexport.cli import cli
from m2dexport.errors import CheckpointError
from m2dexport.graph.export import graph_from_checkpoint
from m2dexport.reference.pooler import Reference
from m2dexport.slice.slicing import Cut, slice_checkpoint

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


def edit_json(path: Path, **changes: Any) -> None:
    stored = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**stored, **changes}))


def encode(folder: Path, **options: Any) -> np.ndarray[Any, Any]:
    vectors: np.ndarray[Any, Any] = SentenceTransformer(
        str(folder), device="cpu", **options
    ).encode(list(TEXTS))
    return vectors


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


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


TABLE = "embeddings.word_embeddings.weight"
POSITIONS = "embeddings.position_embeddings.weight"
QUERY = "encoder.layer.0.attention.self.query.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(POSITIONS), rf"lacks 1 of the weights .* such as {POSITIONS}"),
        (lambda t: t.pop(TABLE), rf"lacks 1 of the weights .* such as {TABLE}"),
        (lambda t: t.update({TABLE: t[TABLE][:7].clone()}), rf"{TABLE} of shape \(7, 32\)"),
        (lambda t: t.update({QUERY: t[QUERY].to(torch.int8)}), rf"stores {QUERY} as I8"),
    ],
)
def test_a_checkpoint_that_does_not_fill_its_model_is_refused_by_every_command(
    change: Callable[[dict[str, torch.Tensor]], object], message: str, tmp_path: Path
) -> None:
    folder = tiny_checkpoint(tmp_path / "x")
    change_weights(folder, change)
    for command in ("inspect", "slice --layers 2 --dim 8 --out", "build --layers 2 --dim 8 --out"):
        arguments = [*command.split(), *([str(tmp_path / "out")] if "--out" in command else [])]
        result = CliRunner().invoke(cli, [*arguments, "--model", str(folder)])
        assert result.exit_code == 1
        assert re.search(f"{re.escape(str(folder))}.*{message}", " ".join(result.output.split()))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["nomic_bert", "gte", "t5", "albert", "phi3", "modernbert"])
def test_a_missing_weight_is_seen_under_the_names_of_every_family(
    name: str, tmp_path: Path
) -> None:
    folder = tiny_checkpoint(tmp_path / "x", name)
    kinds = r"(mlp\.(fc2|down_proj|Wo)|wo|ffn_output|DenseReluDense\.wo)\.weight$"

    def drop(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[next(n for n in sorted(tensors) if re.search(kinds, n))]

    change_weights(folder, drop)
    with pytest.raises(CheckpointError, match=r"lacks 1 of the weights"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers of 1000000000, where 10,000 is the most"),
        ({"vocab_size": 0}, "vocab_size of 0, which is below 1"),
        ({"hidden_size": -32}, "below 1|cannot read"),
        ({"intermediate_size": 47}, "do not fit each other|of shape"),
    ],
)
def test_a_size_that_cannot_be_is_refused_before_a_model_is_built(
    changes: dict[str, int], message: str, tmp_path: Path
) -> None:
    folder = tiny_checkpoint(tmp_path / "x", "albert")
    edit_json(folder / "config.json", **changes)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("bert", {"model_max_length": 24}),  # transformers takes the class of the model type
        ("xlm-roberta", {"tokenizer_class": "RobertaTokenizer", "model_max_length": 24}),
    ],
)
def test_a_stored_tokenizer_that_transformers_would_rebuild_keeps_its_ids(
    model_type: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    donor = tiny_checkpoint(tmp_path / "donor", "xlm-roberta")
    parent = tiny_checkpoint(tmp_path / "parent", model_type)
    (parent / "tokenizer.json").write_bytes((donor / "tokenizer.json").read_bytes())
    names = json.loads((donor / "tokenizer_config.json").read_text())
    specials = {k: v for k, v in names.items() if k.endswith("_token")}
    (parent / "tokenizer_config.json").write_text(json.dumps({**specials, **settings}))
    stored = Tokenizer.from_file(str(parent / "tokenizer.json"))
    ids = [stored.encode(text).ids for text in TEXTS]
    assert [transformers.AutoTokenizer.from_pretrained(parent)(t).input_ids for t in TEXTS] != ids
    checkpoint = open_checkpoint(parent)
    (sentence,) = checkpoint.assumed
    assert "token ids are those of" in sentence
    assert "sentence-transformers" in sentence
    assert [open_tokenizer(parent)(text).input_ids for text in TEXTS] == ids
    sub = slice_checkpoint(checkpoint, 2, 16, tmp_path / "sub")
    assert not sub.assumed
    assert [transformers.AutoTokenizer.from_pretrained(sub.path)(t).input_ids for t in TEXTS] == ids


def test_an_end_token_that_only_the_settings_ask_for_is_added(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "x", "qwen3", pooling="lasttoken")
    stored = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**stored, "post_processor": None}))
    edit_json(folder / "tokenizer_config.json", add_eos_token=True)
    end = transformers.AutoTokenizer.from_pretrained(folder).eos_token_id
    assert transformers.AutoTokenizer.from_pretrained(folder)("the").input_ids[-1] != end
    checkpoint = open_checkpoint(folder)
    assert "every text ends in the end token" in checkpoint.assumed[0]
    assert open_tokenizer(folder)("the").input_ids[-1] == end
    sub = slice_checkpoint(checkpoint, 2, 16, tmp_path / "sub")
    assert transformers.AutoTokenizer.from_pretrained(sub.path)("the").input_ids[-1] == end
    long = transformers.AutoTokenizer.from_pretrained(sub.path)(TEXTS[3], truncation=True)
    assert long.input_ids[-1] == end
    reference = Reference(checkpoint, [2]).encode(TEXTS)[2][:, :16]
    np.testing.assert_allclose(encode(sub.path), by_hand.normalized(reference), atol=CLOSE)


def test_text_that_is_cut_on_its_left_is_refused_with_the_reason(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "x")
    edit_json(folder / "tokenizer_config.json", truncation_side="left")
    with pytest.raises(CheckpointError, match=r"drops its beginning \(truncation_side is left"):
        open_checkpoint(folder)


def test_a_token_beyond_the_table_is_said_when_the_checkpoint_is_opened(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "x")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<image>"])
    tokenizer.save_pretrained(folder)
    result = CliRunner().invoke(cli, ["inspect", "--model", str(folder)])
    assert result.exit_code == 0
    assert "no text holds '<image>', which the tokenizer numbers 200" in result.output


def test_a_sentencepiece_model_names_the_package_that_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_checkpoint(tmp_path / "x", "xlm-roberta")
    (folder / "tokenizer.json").rename(folder / "sentencepiece.bpe.model")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(CheckpointError, match=r"pip install sentencepiece"):
        open_checkpoint(folder)


def test_a_stale_index_beside_the_weights_is_not_read(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "x", shard_size="20KB")
    fresh = tiny_checkpoint(tmp_path / "fresh", seed=1)
    (fresh / "model.safetensors").rename(folder / "model.safetensors")
    checkpoint = open_checkpoint(folder)
    assert "model.safetensors.index.json beside it is not read" in checkpoint.assumed[0]
    reference = Reference(checkpoint, [LAYERS]).encode(TEXTS)[LAYERS]
    np.testing.assert_allclose(by_hand.normalized(reference), encode(folder), atol=CLOSE)
    assert not slice_checkpoint(checkpoint, 2, 16, tmp_path / "sub").assumed


def test_a_dot_product_model_keeps_its_norms_unless_told_otherwise(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "x", "distilbert", normalize=False)
    edit_json(folder / "config_sentence_transformers.json", similarity_fn_name="dot")
    checkpoint = open_checkpoint(folder)
    assert checkpoint.similarity == "dot"
    assert checkpoint.keeps_norms
    shown = CliRunner().invoke(cli, ["inspect", "--model", str(folder)]).output
    assert re.search(r"similarity\s+dot", shown)
    assert "vectors are compared by dot and not normalised" in shown
    sub = slice_checkpoint(checkpoint, LAYERS, HIDDEN, tmp_path / "sub")
    assert sub.keeps_norms
    vectors = encode(folder)
    np.testing.assert_allclose(encode(sub.path), vectors, atol=1e-4)
    assert np.abs(np.linalg.norm(vectors, axis=1) - 1).max() > 0.1
    assert SentenceTransformer(str(sub.path), device="cpu").similarity_fn_name == "dot"
    unit = slice_checkpoint(checkpoint, LAYERS, HIDDEN, tmp_path / "unit", Cut(normalize=True))
    assert unit.normalized
    np.testing.assert_allclose(encode(unit.path), by_hand.normalized(vectors), atol=CLOSE)


def test_a_similarity_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "x")
    edit_json(folder / "config_sentence_transformers.json", similarity_fn_name="hamming")
    with pytest.raises(CheckpointError, match="compares vectors by 'hamming', which is none of"):
        open_checkpoint(folder)


def test_the_advice_for_a_router_makes_checkpoints_that_embed_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    routes = {}
    for seed, name in enumerate(("query", "document")):
        torch.manual_seed(seed)
        head = [torch.nn.Linear(HIDDEN, 16)]
        folder = tiny_checkpoint(tmp_path / f"{name}-parts", head=head, normalize=False, seed=seed)
        routes[name] = list(SentenceTransformer(str(folder), device="cpu"))
    router = Router.for_query_document(routes["query"], routes["document"])
    model = SentenceTransformer(modules=[router, st.Normalize()], device="cpu")
    model.save(str(tmp_path / "router"))
    with pytest.raises(CheckpointError, match="make a checkpoint of each route") as raised:
        open_checkpoint(tmp_path / "router")
    monkeypatch.chdir(tmp_path)
    exec(str(raised.value).partition("in Python: ")[2].removesuffix("."), {})
    for name, expected in (
        ("query", model.encode_query(list(TEXTS))),
        ("document", model.encode_document(list(TEXTS))),
    ):
        checkpoint = open_checkpoint(tmp_path / name)
        assert checkpoint.dim == 16
        sub = slice_checkpoint(checkpoint, LAYERS, 16, tmp_path / f"{name}-sub")
        np.testing.assert_allclose(encode(sub.path), expected, atol=CLOSE)


def test_the_card_of_an_older_sentence_transformers_gives_the_grid(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "x", "modernbert")
    config = {"loss": "MatryoshkaLoss", "n_layers_per_step": 1, "matryoshka_dims": [32, 8]}
    (folder / "README.md").write_text(
        "## Training\n**Loss**:\n\n"
        "`sentence_transformers.losses.Matryoshka2dLoss.Matryoshka2dLoss` with parameters:\n"
        f"  ```\n  {config}\n  ```\n\nParameters of the fit()-Method:\n```\n{{}}\n```\n"
    )
    checkpoint = open_checkpoint(folder)
    assert checkpoint.trained == tuple((n, d) for n in (1, 2, 3, 4) for d in (8, 32))
    assert "--final-norm skipped" in checkpoint.assumed[0]


@pytest.mark.parametrize("model_type", ["bert", "mpnet"])
def test_loading_a_slice_without_a_pooler_reports_nothing(model_type: str, tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "x", model_type)
    change_weights(folder, lambda t: [t.pop(n) for n in list(t) if n.startswith("pooler.")])
    sub = slice_checkpoint(open_checkpoint(folder), 2, 16, tmp_path / "sub")
    transformers.utils.logging.set_verbosity_warning()
    said = io.StringIO()
    handler = logging.StreamHandler(said)
    transformers.utils.logging.add_handler(handler)
    try:
        SentenceTransformer(str(folder), device="cpu")
        assert "pooler" in said.getvalue()
        said.truncate(0)
        SentenceTransformer(str(sub.path), device="cpu")
        assert "pooler" not in said.getvalue()
    finally:
        transformers.utils.logging.remove_handler(handler)
        transformers.utils.logging.set_verbosity_error()
