"""LoRA adapters: merged into their base model as peft would, or refused with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import by_hand
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from sentence_transformers import SentenceTransformer
from tiny import HIDDEN, LAYERS, RANK, TEXTS, edit_json, lora, tiny_checkpoint

from m2dexport.checkpoint.open import open_checkpoint
from m2dexport.errors import CheckpointError
from m2dexport.slice.slicing import slice_checkpoint

QUERY = "layers.0.self_attn.q_proj"
SQUARE = {QUERY: (HIDDEN, HIDDEN)}


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 2 / RANK),
        ({"use_rslora": True}, 2 / RANK**0.5),
        ({"alpha_pattern": {"q_proj": 6}}, 6 / RANK),
    ],
)
@pytest.mark.parametrize("prefix", ["", "model."])
def test_an_adapter_is_merged_before_slicing(
    prefix: str, config: dict[str, Any], scale: float, tmp_path: Path
) -> None:
    base = tiny_checkpoint(tmp_path / "base", "llama", pooling="lasttoken", shard_size="20KB")
    name = f"{prefix}layers.1.self_attn.q_proj"
    added = lora(tmp_path / "adapter", base, {name: (HIDDEN, HIDDEN)}, config=config)
    checkpoint = open_checkpoint(tmp_path / "adapter")
    assert "the adapter was merged into" in checkpoint.assumed[0]
    by_torch = tiny_checkpoint(tmp_path / "by_torch", "llama", pooling="lasttoken")
    model = transformers.AutoModel.from_pretrained(by_torch)
    with torch.no_grad():
        model.layers[1].self_attn.q_proj.weight += scale * added[name]
    model.save_pretrained(by_torch)
    sub = slice_checkpoint(checkpoint, 3, 16, tmp_path / "sub")
    vectors = SentenceTransformer(str(sub.path), device="cpu").encode(list(TEXTS))
    expected = by_hand.vectors(by_torch, TEXTS, 3, 16, ["lasttoken"])
    np.testing.assert_allclose(vectors, expected, atol=2e-5)
    plain = by_hand.vectors(base, TEXTS, 3, 16, ["lasttoken"])
    assert np.abs(plain - expected).max() > 0.01


def test_an_adapter_brings_its_own_modules_and_whole_tensors(tmp_path: Path) -> None:
    base = tiny_checkpoint(tmp_path / "base", "llama", pooling=None)
    donor = tiny_checkpoint(tmp_path / "donor", "llama", pooling="mean", prompts={"query": "q: "})
    norm = torch.full((HIDDEN,), 2.0)
    lora(
        tmp_path / "adapter",
        base,
        {"layers.0.mlp.up_proj": (48, HIDDEN)},
        replaced={"norm.weight": norm},
    )
    (donor / "1_Pooling").rename(tmp_path / "adapter" / "1_Pooling")
    (donor / "2_Normalize").rename(tmp_path / "adapter" / "2_Normalize")
    for name in ("modules.json", "config_sentence_transformers.json"):
        (donor / name).rename(tmp_path / "adapter" / name)
    checkpoint = open_checkpoint(tmp_path / "adapter")
    assert checkpoint.pooling.modes == ("mean",)
    assert checkpoint.prompts == {"query": "q: "}
    model = transformers.AutoModel.from_pretrained(checkpoint.path)
    assert torch.equal(model.norm.weight, norm)


def test_merging_keeps_the_base_models_type(tmp_path: Path) -> None:
    base = tiny_checkpoint(tmp_path / "base", "llama", dtype=torch.bfloat16)
    name = "layers.0.self_attn.q_proj"
    added = lora(tmp_path / "adapter", base, {name: (HIDDEN, HIDDEN)})
    checkpoint = open_checkpoint(tmp_path / "adapter")
    merged = transformers.AutoModel.from_pretrained(checkpoint.path, dtype="auto")
    plain = transformers.AutoModel.from_pretrained(base, dtype="auto")
    weight = plain.get_submodule(name).weight.float() + 0.5 * added[name]
    assert torch.equal(merged.get_submodule(name).weight, weight.to(torch.bfloat16))


def test_a_merged_adapter_is_found_again_until_it_changes(tmp_path: Path) -> None:
    base = tiny_checkpoint(tmp_path / "base", "llama")
    adapter = tmp_path / "adapter"
    lora(adapter, base, {"layers.0.self_attn.q_proj": (HIDDEN, HIDDEN)})
    first = open_checkpoint(adapter).path
    assert open_checkpoint(adapter).path == first
    edit_json(adapter / "adapter_config.json", lora_alpha=3)
    assert open_checkpoint(adapter).path != first
    assert open_checkpoint(base).layers == LAYERS


@pytest.mark.parametrize(
    ("module", "config", "message"),
    [
        ("layers.9.self_attn.q_proj", {}, "'layers.9.self_attn.q_proj.weight', which its base"),
        ("layers.0.mlp.up_proj", {}, "does not fit its base model"),
        ("layers.0.self_attn.q_proj", {"peft_type": "IA3"}, "is a IA3 adapter"),
        ("layers.0.self_attn.q_proj", {"use_dora": True}, "use_dora is set"),
        (
            "layers.0.self_attn.q_proj",
            {"base_model_name_or_path": "./gone"},
            r"adapter_config\.json names a base model that is not at hand: \./gone does not exist",
        ),
        (QUERY, {"base_model_name_or_path": "."}, "leads back to the same adapter"),
        (QUERY, {"lora_alpha": float("nan")}, "has a lora_alpha of nan"),
        (QUERY, {"lora_alpha": "much"}, "has no lora_alpha that is a number"),
        (QUERY, {"alpha_pattern": {"(": 1}}, "has no lora_alpha that is a number"),
    ],
)
def test_an_adapter_that_cannot_be_merged_is_refused(
    module: str, config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    base = tiny_checkpoint(tmp_path / "base", "llama")
    lora(tmp_path / "adapter", base, {module: (HIDDEN, HIDDEN)}, config=config)
    with pytest.raises(Exception, match=message):
        open_checkpoint(tmp_path / "adapter")
    cache = tmp_path / "cache"
    assert not cache.exists() or not list(cache.iterdir())


def test_adapters_that_name_each_other_are_refused(tmp_path: Path) -> None:
    lora(tmp_path / "one", tmp_path / "two", SQUARE)
    lora(tmp_path / "two", tmp_path / "one", SQUARE)
    with pytest.raises(CheckpointError, match="leads back to the same adapter"):
        open_checkpoint(tmp_path / "one")


def test_matrices_of_different_ranks_are_refused(tmp_path: Path) -> None:
    lora(tmp_path / "adapter", tiny_checkpoint(tmp_path / "base", "llama"), SQUARE)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(path)
    name = f"base_model.model.{QUERY}.lora_A.weight"
    safetensors.torch.save_file({**tensors, name: tensors[name][:3].clone()}, path)
    with pytest.raises(CheckpointError, match=r"\(32, 4\) and \(3, 32\), have no rank in common"):
        open_checkpoint(tmp_path / "adapter")


@pytest.mark.parametrize("place", ["adapter/models/base", "models/base"])
def test_a_relative_base_is_found_from_the_adapters_folder(place: str, tmp_path: Path) -> None:
    """Training ran in the adapter's own folder, or in one that holds both."""
    lora(tmp_path / "adapter", Path("models/base"), SQUARE)
    tiny_checkpoint(tmp_path / place, "llama")
    assert f"merged into {tmp_path / place}" in open_checkpoint(tmp_path / "adapter").assumed[0]


def test_a_pickled_adapter_is_read_where_pickles_are_allowed(tmp_path: Path) -> None:
    base = tiny_checkpoint(tmp_path / "base", "llama")
    adapter = tmp_path / "adapter"
    lora(adapter, base, SQUARE)
    expected = open_checkpoint(adapter).weights_sha256
    tensors = safetensors.torch.load_file(adapter / "adapter_model.safetensors")
    torch.save(tensors, adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin is a pickle.*--allow-pickle"):
        open_checkpoint(adapter)
    assert open_checkpoint(adapter, allow_pickle=True).weights_sha256 == expected


def test_a_whole_model_under_the_names_of_peft_is_refused(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "x", "llama")
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors[f"{QUERY}.base_layer.weight"] = tensors.pop(f"{QUERY}.weight")
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"under peft's names, .* what merge_and_unload"):
        open_checkpoint(folder)
