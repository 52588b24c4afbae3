"""What sentence-transformers stores beside a model: similarity, routes, and the model card."""

from __future__ import annotations

import re
from pathlib import Path

import by_hand
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Router
from sentence_transformers.sentence_transformer import modules as st
from tiny import HIDDEN, LAYERS, TEXTS, edit_json, encode, tiny_checkpoint

from m2dexport.checkpoint.open import open_checkpoint
from m2dexport.cli import cli
from m2dexport.errors import CheckpointError
from m2dexport.slice.slicing import Cut, slice_checkpoint

CLOSE = 2e-5


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
