"""A checkpoint's tokenizer: the ids that it stores are those that all loaders give."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import by_hand
import numpy as np
import pytest
import transformers
from click.testing import CliRunner
from tiny import TEXTS, edit_json, encode, tiny_checkpoint
from tokenizers import Tokenizer

from m2dexport.checkpoint.open import open_checkpoint
from m2dexport.checkpoint.tokenizer import open_tokenizer
from m2dexport.cli import cli
from m2dexport.errors import CheckpointError
from m2dexport.reference.pooler import Reference
from m2dexport.slice.slicing import slice_checkpoint

CLOSE = 2e-5


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
    edit_json(folder / "tokenizer.json", post_processor=None)
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
