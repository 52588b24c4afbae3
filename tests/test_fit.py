"""The weights of a checkpoint, held against the model that its config.json describes."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Callable
from pathlib import Path

import by_hand
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from click.testing import CliRunner
from sentence_transformers import SentenceTransformer
from tiny import LAYERS, TEXTS, edit_json, encode, tiny_checkpoint

from m2dexport.checkpoint.open import open_checkpoint
from m2dexport.cli import cli
from m2dexport.errors import CheckpointError
from m2dexport.reference.pooler import Reference
from m2dexport.slice.slicing import slice_checkpoint

CLOSE = 2e-5


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


def test_a_stale_index_beside_the_weights_is_not_read(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "x", shard_size="20KB")
    fresh = tiny_checkpoint(tmp_path / "fresh", seed=1)
    (fresh / "model.safetensors").rename(folder / "model.safetensors")
    checkpoint = open_checkpoint(folder)
    assert "model.safetensors.index.json beside it is not read" in checkpoint.assumed[0]
    reference = Reference(checkpoint, [LAYERS]).encode(TEXTS)[LAYERS]
    np.testing.assert_allclose(by_hand.normalized(reference), encode(folder), atol=CLOSE)
    assert not slice_checkpoint(checkpoint, 2, 16, tmp_path / "sub").assumed


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
