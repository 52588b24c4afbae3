from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import by_hand
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from sentence_transformers import SentenceTransformer
from tiny import HIDDEN, LAYERS, TEXTS, tiny_checkpoint

from m2dexport.checkpoint.open import open_checkpoint
from m2dexport.errors import CheckpointError
from m2dexport.slice.slicing import slice_checkpoint

RANK = 4


def to_pickle(folder: Path) -> None:
    """Store every safetensors file of a checkpoint as torch would have done."""
    for path in list(folder.rglob("model.safetensors")):
        torch.save(safetensors.torch.load_file(path), path.parent / "pytorch_model.bin")
        path.unlink()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pickled_weights_convert_to_the_same_checkpoint(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    head = [torch.nn.Linear(HIDDEN, 8)]
    folder = tiny_checkpoint(tmp_path / "x", head=head, dtype=dtype)
    before = open_checkpoint(folder).weights_sha256
    to_pickle(folder)
    untouched = sorted(folder.rglob("*"))
    with pytest.raises(CheckpointError, match="pass --allow-pickle"):
        open_checkpoint(folder)
    checkpoint = open_checkpoint(folder, allow_pickle=True)
    assert checkpoint.weights_sha256 == before
    assert sorted(folder.rglob("*")) == untouched
    slice_checkpoint(checkpoint, 2, 4, tmp_path / "sub")


def test_a_pickle_that_runs_code_is_not_run(tmp_path: Path) -> None:
    class Intruder:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "intruder was here",)

    folder = tiny_checkpoint(tmp_path / "x")
    (folder / "model.safetensors").unlink()
    torch.save({"embeddings": Intruder()}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="holds more than tensors"):
        open_checkpoint(folder, allow_pickle=True)
    assert not (tmp_path / "intruder was here").exists()
    assert not list((tmp_path / "cache").iterdir())


def lora(
    folder: Path,
    base: Path,
    modules: Mapping[str, tuple[int, int]],
    *,
    config: Mapping[str, Any] | None = None,
    replaced: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """Write an adapter as PEFT would and return what it adds per module, before scaling."""
    torch.manual_seed(3)
    tensors, added = {}, {}
    for module, (rows, columns) in modules.items():
        up, down = torch.randn(rows, RANK), torch.randn(RANK, columns)
        tensors[f"base_model.model.{module}.lora_A.weight"] = down
        tensors[f"base_model.model.{module}.lora_B.weight"] = up
        added[module] = up @ down
    tensors.update({f"base_model.model.{n}": t for n, t in (replaced or {}).items()})
    folder.mkdir()
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(base),
        "lora_alpha": 2,
        "r": RANK,
        **(config or {}),
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return added


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
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "lora_alpha": 3}))
    assert open_checkpoint(adapter).path != first
    assert open_checkpoint(base).layers == LAYERS


@pytest.mark.parametrize(
    ("module", "config", "message"),
    [
        ("layers.9.self_attn.q_proj", {}, "'layers.9.self_attn.q_proj.weight', which its base"),
        ("layers.0.mlp.up_proj", {}, "does not fit its base model"),
        ("layers.0.self_attn.q_proj", {"peft_type": "IA3"}, "is a IA3 adapter"),
        ("layers.0.self_attn.q_proj", {"use_dora": True}, "use_dora is set"),
        ("layers.0.self_attn.q_proj", {"base_model_name_or_path": "./gone"}, "does not exist"),
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
