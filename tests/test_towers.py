"""Text towers: what they embed is what the whole model gives for text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import by_hand
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from numpy.typing import NDArray
from scipy.special import erf, softmax
from sentence_transformers import SentenceTransformer
from test_families import CLOSE, assert_graph_agrees
from tiny import FAMILIES, HIDDEN, LAYERS, TEXTS, lora, tiny_checkpoint, tiny_tokenizer

from m2dexport.checkpoint.open import open_checkpoint
from m2dexport.errors import CheckpointError
from m2dexport.graph.export import graph_from_checkpoint
from m2dexport.graph.vector import vector_graph
from m2dexport.reference.pooler import Reference
from m2dexport.slice.slicing import slice_checkpoint

TEXT = {**FAMILIES["qwen2"][0], "vocab_size": len(tiny_tokenizer("decoder"))}
VISION: dict[str, dict[str, Any]] = {
    "qwen2_vl": {"depth": 1, "embed_dim": 16, "hidden_size": HIDDEN, "num_heads": 2},
    "qwen2_5_vl": {
        **{"depth": 1, "hidden_size": 16, "num_heads": 2, "out_hidden_size": HIDDEN},
        **{"intermediate_size": 16, "fullatt_block_indexes": [0]},
    },
    "qwen3_vl": {
        **{"depth": 1, "hidden_size": 16, "num_heads": 2, "out_hidden_size": HIDDEN},
        **{"intermediate_size": 16, "deepstack_visual_indexes": [0]},
    },
}
PATCHES = {
    **{"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1},
    **{"num_attention_heads": 2, "image_size": 8, "patch_size": 4},
}
AXES = {"type": "mrope", "mrope_section": [1, 1, 2]}
WHOLE: dict[str, dict[str, Any]] = {
    "qwen2_vl": {"text_config": {**TEXT, "rope_scaling": AXES}},
    "qwen2_5_vl": {"text_config": {**TEXT, "rope_scaling": AXES}},
    "qwen3_vl": {"text_config": {**TEXT, "rope_scaling": {**AXES, "rope_type": "default"}}},
    "gemma3": {
        "text_config": {**TEXT, **FAMILIES["gemma3_text"][0]},
        "vision_config": {"model_type": "siglip_vision_model", **PATCHES},
        "mm_tokens_per_image": 4,
    },
    "llava": {"vision_config": {"model_type": "clip_vision_model", **PATCHES}},
    "llava_next": {"vision_config": {"model_type": "clip_vision_model", **PATCHES}},
    "mistral3": {"vision_config": {"model_type": "pixtral", **PATCHES}},
}
TYPES = {"llava": "llama", "llava_next": "mistral", "mistral3": "mistral"}


def whole_checkpoint(folder: Path, model_type: str) -> Path:
    """Write a tiny vision-language checkpoint that pools the last token."""
    tiny_checkpoint(folder, "qwen2", pooling="lasttoken")  # its tokenizer and modules
    settings = dict(WHOLE[model_type])
    settings.setdefault("vision_config", VISION.get(model_type))
    if model_type in TYPES:
        settings["text_config"] = {**TEXT, "model_type": TYPES[model_type]}
    config = transformers.AutoConfig.for_model(model_type, **settings)
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.3 if parameter.ndim == 1 else 1.5 * parameter.shape[-1] ** -0.5
            parameter.add_(torch.randn_like(parameter) * spread)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("model_type", WHOLE)
def test_a_text_tower_embeds_as_the_whole_model_does(model_type: str, tmp_path: Path) -> None:
    if model_type not in transformers.CONFIG_MAPPING:
        pytest.skip("not in this transformers")
    if model_type == "qwen3_vl" and transformers.__version__ < "5":
        pytest.skip("AutoModel of 4.57 leaves a saved qwen3_vl at random weights")
    folder = whole_checkpoint(tmp_path / "whole", model_type)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.layers == LAYERS
    assert f"the text tower of this {model_type} model was taken" in checkpoint.assumed[0]
    sub = slice_checkpoint(checkpoint, 3, 20, tmp_path / "sub")
    expected = by_hand.vectors(folder, TEXTS, 3, 20, ["lasttoken"])
    vectors = SentenceTransformer(str(sub.path), device="cpu").encode(list(TEXTS))
    np.testing.assert_allclose(vectors, expected, atol=CLOSE)
    whole = Reference(checkpoint).encode(TEXTS)[3][:, :20]
    np.testing.assert_allclose(by_hand.normalized(whole), expected, atol=CLOSE)


def test_a_text_tower_is_taken_once_and_found_again(tmp_path: Path) -> None:
    folder = whole_checkpoint(tmp_path / "whole", "llava")
    first = open_checkpoint(folder)
    assert open_checkpoint(folder).path == first.path
    assert not [p for p in first.path.rglob("*.safetensors") if "vision" in p.name]
    assert not slice_checkpoint(first, 1, 8, tmp_path / "sub").assumed


def test_an_adapter_of_a_whole_model_is_merged_into_its_text_tower(tmp_path: Path) -> None:
    folder = whole_checkpoint(tmp_path / "whole", "llava")
    module = "language_model.layers.1.self_attn.q_proj"
    added = lora(tmp_path / "adapter", folder, {f"model.{module}": (HIDDEN, HIDDEN)})
    checkpoint = open_checkpoint(tmp_path / "adapter", pooling="lasttoken")
    merged = transformers.AutoModel.from_pretrained(folder)
    with torch.no_grad():
        merged.get_submodule(module).weight += 0.5 * added[f"model.{module}"]
    merged.save_pretrained(folder)
    expected = by_hand.vectors(folder, TEXTS, 3, 20, ["lasttoken"])
    found = Reference(checkpoint, (3,)).encode(TEXTS)[3][:, :20]
    np.testing.assert_allclose(by_hand.normalized(found), expected, atol=CLOSE)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "phi3_v"}, "its code is not in transformers"),
        ({"model_type": "mllama", "vision_config": {}}, "attend to the image"),
        ({"model_type": "paligemma", "vision_config": {}}, "attends in both directions"),
        ({"model_type": "qwen2_audio", "audio_config": {}}, "it is none of qwen2_vl"),
        ({"model_type": "nvembed"}, "lacks NV-Embed's parts"),
    ],
)
def test_a_tower_that_cannot_be_taken_is_refused_with_the_reason(
    config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = tiny_checkpoint(tmp_path / "x", "llama")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


def nv_embed(folder: Path, plain: Path) -> dict[str, NDArray[np.float32]]:
    """Write a checkpoint laid out as NV-Embed's from a plain mistral; return its latent tensors."""
    latents, heads, width = 6, 2, 8
    shapes = {
        "latents": (latents, HIDDEN),
        **{f"cross_attend_blocks.{n}.{p}": (HIDDEN,) for n in "01" for p in _norm("norm")},
        **{f"cross_attend_blocks.0.{p}": (HIDDEN,) for p in _norm("norm_context")},
        "cross_attend_blocks.0.fn.to_q.weight": (heads * width, HIDDEN),
        "cross_attend_blocks.0.fn.to_kv.weight": (2 * heads * width, HIDDEN),
        "cross_attend_blocks.0.fn.to_out.weight": (HIDDEN, heads * width),
        "cross_attend_blocks.1.fn.net.0.weight": (8 * HIDDEN, HIDDEN),
        "cross_attend_blocks.1.fn.net.0.bias": (8 * HIDDEN,),
        "cross_attend_blocks.1.fn.net.2.weight": (HIDDEN, 4 * HIDDEN),
        "cross_attend_blocks.1.fn.net.2.bias": (HIDDEN,),
    }
    torch.manual_seed(5)
    latent = {n: torch.randn(s) * (0.5 if len(s) == 1 else 0.4) for n, s in shapes.items()}
    tower = safetensors.torch.load_file(plain / "model.safetensors")
    folder.mkdir()
    safetensors.torch.save_file(
        {f"embedding_model.{n}": t for n, t in tower.items()}
        | {f"latent_attention_model.{n}": t for n, t in latent.items()},
        folder / "model.safetensors",
    )
    text = json.loads((plain / "config.json").read_text())
    text |= {"model_type": "bidir_mistral", "sliding_window": 2, "_name_or_path": "x/y"}
    text.pop("is_causal")
    config = {
        "model_type": "nvembed",
        "auto_map": {"AutoModel": "modeling_nvembed.NVEmbedModel"},
        "text_config": text,
        "latent_attention_config": {"model_type": "latent_attention", "num_cross_heads": heads},
        "is_mask_instruction": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = tiny_tokenizer("decoder")
    tokenizer.backend_tokenizer.post_processor = None
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    return {n: t.numpy() for n, t in latent.items()}


def _norm(name: str) -> list[str]:
    return [f"{name}.weight", f"{name}.bias"]


def latent_by_hand(state: NDArray[np.float32], w: dict[str, NDArray[np.float32]]) -> NDArray[Any]:
    """Return one text's (tokens, hidden) states after latent attention, as the paper has it."""

    def norm(x: NDArray[Any], name: str) -> NDArray[Any]:
        spread = np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return (x - x.mean(-1, keepdims=True)) / spread * w[f"{name}.weight"] + w[f"{name}.bias"]

    cross, forward = "cross_attend_blocks.0", "cross_attend_blocks.1"
    queries = norm(state, f"{cross}.norm") @ w[f"{cross}.fn.to_q.weight"].T
    pairs = norm(w["latents"], f"{cross}.norm_context") @ w[f"{cross}.fn.to_kv.weight"].T
    half = pairs.shape[1] // 2
    heads = []
    for head in (slice(0, 8), slice(8, 16)):
        keys, values = pairs[:, :half][:, head], pairs[:, half:][:, head]
        heads.append(softmax(queries[:, head] @ keys.T / np.sqrt(8), axis=1) @ values)
    state = np.concatenate(heads, axis=1) @ w[f"{cross}.fn.to_out.weight"].T + state
    wide = norm(state, f"{forward}.norm") @ w[f"{forward}.fn.net.0.weight"].T
    wide += w[f"{forward}.fn.net.0.bias"]
    up, gate = np.split(wide, 2, axis=1)
    up = up * gate * 0.5 * (1 + erf(gate / np.sqrt(2)))
    return up @ w[f"{forward}.fn.net.2.weight"].T + w[f"{forward}.fn.net.2.bias"] + state


def test_latent_attention_is_a_head_at_every_depth(tmp_path: Path) -> None:
    if transformers.__version__ < "5.2":
        pytest.skip("this transformers ignores is_causal")
    bidirectional = {"is_causal": False, "sliding_window": None}
    plain = tiny_checkpoint(tmp_path / "plain", "mistral", config=bidirectional)
    weights = nv_embed(tmp_path / "nv", plain)
    checkpoint = open_checkpoint(tmp_path / "nv")
    assert checkpoint.latent
    assert checkpoint.latent.heads == 2
    assert checkpoint.pooling.modes == ("mean",)
    assert "trust_remote_code=True" in checkpoint.assumed[0]
    sub = slice_checkpoint(checkpoint, 2, 20, tmp_path / "sub")
    states = by_hand.states(plain, TEXTS, 2)
    expected = by_hand.normalized(
        np.stack([latent_by_hand(state, weights).mean(0)[:20] for state in states])
    )
    without = by_hand.normalized(np.stack([state.mean(0)[:20] for state in states]))
    assert np.abs(expected - without).max() > 100 * CLOSE
    for each in (checkpoint, sub):
        found = Reference(each, (2,)).encode(TEXTS)[2][:, :20]
        np.testing.assert_allclose(by_hand.normalized(found), expected, atol=CLOSE)
    model = SentenceTransformer(str(sub.path), device="cpu", trust_remote_code=True)
    np.testing.assert_allclose(model.encode(list(TEXTS)), expected, atol=CLOSE)
    graph = vector_graph(graph_from_checkpoint(sub, (2,)), 20)
    assert_graph_agrees(graph, sub, expected)


def test_latent_attention_is_kept_bit_for_bit_and_hashed(tmp_path: Path) -> None:
    if transformers.__version__ < "5.2":
        pytest.skip("this transformers ignores is_causal")
    plain = tiny_checkpoint(tmp_path / "plain", "mistral", config={"is_causal": False})
    nv_embed(tmp_path / "nv", plain)
    checkpoint = open_checkpoint(tmp_path / "nv")
    sub = slice_checkpoint(checkpoint, LAYERS, HIDDEN, tmp_path / "sub")
    assert sub.weights_sha256 == checkpoint.weights_sha256
    assert open_checkpoint(plain).weights_sha256 != checkpoint.weights_sha256
    assert not sub.assumed


def test_latent_attention_with_prompts_to_leave_out_is_refused(tmp_path: Path) -> None:
    if transformers.__version__ < "5.2":
        pytest.skip("this transformers ignores is_causal")
    plain = tiny_checkpoint(tmp_path / "plain", "mistral", config={"is_causal": False})
    nv_embed(tmp_path / "nv", plain)
    prompts = {"prompts": {"query": "Instruct: find\nQuery: "}}
    (tmp_path / "nv" / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    with pytest.raises(CheckpointError, match="leaves its prompts out of pooling"):
        open_checkpoint(tmp_path / "nv")
