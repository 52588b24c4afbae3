from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import by_hand
import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from test_slicing import CLOSE, encode, files
from tiny import HIDDEN, LAYERS, TEXTS, edit_json, tiny_checkpoint

from m2dexport.build.build import build_artifact
from m2dexport.build.recipe import Recipe
from m2dexport.checkpoint.families import FAMILIES
from m2dexport.checkpoint.open import Checkpoint, open_checkpoint
from m2dexport.checkpoint.tensors import copied, read_tensor, stored_tensors, write_tensors
from m2dexport.data import calibration_texts, default_task_paths
from m2dexport.engines import Device
from m2dexport.engines.onnxruntime import run as engine
from m2dexport.errors import CheckpointError, UsageError
from m2dexport.graph.export import graph_from_checkpoint
from m2dexport.graph.fuse import fuse_for_onnxruntime
from m2dexport.graph.vector import serialize_graph
from m2dexport.reference.pooler import Reference
from m2dexport.slice.slicing import Cut, slice_checkpoint, slice_grid
from m2dexport.slice.write import LoadingWarning

# Where each live model takes in its heads and its feed-forward channels, layer by layer.
_BERT = ("encoder.layer", "attention.output.dense", "output.dense")
_LLAMA = ("layers", "self_attn.o_proj", "mlp.down_proj")
TAKERS = {
    **dict.fromkeys(["bert", "electra", "roberta", "xlm-roberta", "camembert"], _BERT),
    "distilbert": ("transformer.layer", "attention.out_lin", "ffn.lin2"),
    "modernbert": ("layers", "attn.Wo", "mlp.Wo"),
    **dict.fromkeys(["llama", "mistral", "qwen2", "qwen3", "phi3", "gemma3_text"], _LLAMA),
}
ROTARY = tuple(name for name, takers in TAKERS.items() if takers is _LLAMA)
HEAD_DIM = 8
UNEVEN = {"heads": (4, 2, 2, 4), "ffn": (48, 7, 16, 1)}
CALIBRATION = ("a man plays a guitar", "two dogs", "the red house on the hill is old", "42")

families = pytest.mark.parametrize("model_type", TAKERS)


def zeroed(parent: Path, folder: Path, heads: Sequence[int], ffn: Sequence[int]) -> Path:
    """Copy a checkpoint, the columns of all later heads and channels set to zero."""
    shutil.copytree(parent, folder)
    model = by_hand.load_model(parent)
    layers, attention, feed_forward = TAKERS[model.config.model_type]
    with torch.no_grad():
        for i, (kept_heads, kept_channels) in enumerate(zip(heads, ffn, strict=True)):
            layer = model.get_submodule(f"{layers}.{i}")
            layer.get_submodule(attention).weight[:, kept_heads * HEAD_DIM :] = 0
            layer.get_submodule(feed_forward).weight[:, kept_channels:] = 0
    model.save_pretrained(folder)
    return folder


def referenced(checkpoint: Checkpoint) -> NDArray[np.float32]:
    """Return the normalised vectors of the torch reference at full depth."""
    depth, dim = checkpoint.layers, checkpoint.dim
    return by_hand.normalized(Reference(checkpoint, [depth]).encode(TEXTS)[depth][:, :dim])


def in_onnx(checkpoint: Checkpoint) -> tuple[NDArray[np.float32], int]:
    """Return normalised vectors of the fused graph, of one ragged batch, and what was fused."""
    model = graph_from_checkpoint(checkpoint, [checkpoint.layers])
    fused = fuse_for_onnxruntime(model)["MultiHeadAttention"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint.path)
    batch = tokenizer(list(TEXTS), padding=True, truncation=True, return_tensors="np")
    session = engine.load({"model.onnx": serialize_graph(model)}, Device(threads=1), "portable")
    (vectors,) = engine.run(session, batch["input_ids"], batch["attention_mask"])
    return by_hand.normalized(vectors), fused


def quietly(*arguments: Any) -> Checkpoint:
    """Slice without the warning that transformers will not load the result."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LoadingWarning)
        return slice_checkpoint(*arguments)


@families
def test_a_uniform_cut_is_the_parent_with_all_other_heads_and_channels_at_zero(
    model_type: str, tmp_path: Path
) -> None:
    parent = tiny_checkpoint(tmp_path / "parent", model_type)
    sub = quietly(open_checkpoint(parent), 3, 20, tmp_path / "sub", Cut(heads=[2], ffn=[20]))
    assert sub.widths is not None
    assert (sub.widths.heads, sub.widths.ffn) == ((2, 2, 2), (20, 20, 20))
    assert sub.widths.kv_heads == ((1, 1, 1) if model_type in ROTARY else (2, 2, 2))
    other = zeroed(parent, tmp_path / "zeroed", [2] * LAYERS, [20] * LAYERS)
    expected = by_hand.vectors(other, TEXTS, 3, 20, ["mean"])
    np.testing.assert_allclose(referenced(sub), expected, atol=CLOSE)
    assert np.abs(by_hand.vectors(parent, TEXTS, 3, 20, ["mean"]) - expected).max() > 1000 * CLOSE
    stored = {name: read_tensor(tensor) for name, tensor in stored_tensors(sub.path).items()}
    assert sum(array.size for array in stored.values()) < sum(
        tensor.parameters for tensor in stored_tensors(parent).values()
    )


@pytest.mark.parametrize(
    ("model_type", "widths"),
    [(model_type, {"ffn": [20]}) for model_type in TAKERS]
    + [(model_type, {"heads": [2], "ffn": [20]}) for model_type in ROTARY],
)
def test_what_a_config_can_state_loads_everywhere_with_every_weight_in_its_place(
    model_type: str, widths: dict[str, list[int]], tmp_path: Path
) -> None:
    parent = tiny_checkpoint(tmp_path / "parent", model_type)
    with warnings.catch_warnings():
        warnings.simplefilter("error", LoadingWarning)
        sub = slice_checkpoint(open_checkpoint(parent), 3, 20, tmp_path / "sub", Cut(**widths))
    _, info = transformers.AutoModel.from_pretrained(sub.path, output_loading_info=True)
    assert not any(info[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched"))
    heads = widths.get("heads", [4]) * LAYERS
    other = zeroed(parent, tmp_path / "zeroed", heads, [20] * LAYERS)
    expected = by_hand.vectors(other, TEXTS, 3, 20, ["mean"])
    np.testing.assert_allclose(encode(sub.path), expected, atol=CLOSE)


@families
def test_a_width_per_layer_is_exact_in_torch_and_refused_by_transformers(
    model_type: str, tmp_path: Path
) -> None:
    parent = tiny_checkpoint(tmp_path / "parent", model_type)
    with pytest.warns(LoadingWarning, match=f"no config.json of {model_type} can state these"):
        sub = slice_checkpoint(
            open_checkpoint(parent), LAYERS, HIDDEN, tmp_path / "sub", Cut(**UNEVEN)
        )
    other = zeroed(parent, tmp_path / "zeroed", **UNEVEN)
    expected = by_hand.vectors(other, TEXTS, LAYERS, HIDDEN, ["mean"])
    np.testing.assert_allclose(referenced(sub), expected, atol=CLOSE)
    for load in (transformers.AutoModel.from_pretrained, SentenceTransformer):
        with pytest.raises(RuntimeError, match=r"mismatch"):
            load(str(sub.path))


@pytest.mark.parametrize(("model_type", "fused"), [("bert", 2), ("modernbert", 0), ("phi3", 0)])
def test_a_width_per_layer_is_exact_in_onnx(model_type: str, fused: int, tmp_path: Path) -> None:
    parent = tiny_checkpoint(tmp_path / "parent", model_type, config={"num_hidden_layers": 2})
    widths = {"heads": [2, 4], "ffn": [7, 20]}
    sub = quietly(open_checkpoint(parent), 2, HIDDEN, tmp_path / "sub", Cut(**widths))
    other = zeroed(parent, tmp_path / "zeroed", **widths)
    expected = by_hand.vectors(other, TEXTS, 2, HIDDEN, ["mean"])
    vectors, replaced = in_onnx(sub)
    np.testing.assert_allclose(vectors, expected, atol=CLOSE)
    assert replaced == fused


def test_fewer_heads_of_bert_make_an_artifact(bert: Path, tmp_path: Path) -> None:
    """Its heads are nowhere but in the shapes of its weights; the build compares it with torch."""
    sub = quietly(open_checkpoint(bert), 2, 16, tmp_path / "sub", Cut(heads=[3, 2], ffn=[40]))
    # Its matrices are too small to be quantized: min_coverage.
    artifact = build_artifact(
        sub, 2, 16, tmp_path / "artifact", Recipe(weights="int8", min_coverage=0)
    )
    assert artifact.spec.parity["mean_cosine"] > 0.98


def test_a_number_of_heads_that_llama_does_not_take_is_cut_all_the_same(tmp_path: Path) -> None:
    config = {"num_attention_heads": 8, "num_key_value_heads": 4}
    parent = tiny_checkpoint(tmp_path / "parent", "llama", config=config)
    # 6 does not divide the hidden size of 32, which transformers 5 minds and 4.57 does not.
    sub = quietly(open_checkpoint(parent), LAYERS, HIDDEN, tmp_path / "sub", Cut(heads=[6]))
    other = zeroed(parent, tmp_path / "zeroed", [6] * LAYERS, [48] * LAYERS)
    expected = by_hand.vectors(other, TEXTS, LAYERS, HIDDEN, ["mean"])
    np.testing.assert_allclose(referenced(sub), expected, atol=CLOSE)


@families
def test_slicing_a_narrow_slice_to_itself_changes_no_byte(model_type: str, tmp_path: Path) -> None:
    parent = open_checkpoint(tiny_checkpoint(tmp_path / "parent", model_type))
    once = quietly(parent, LAYERS, 16, tmp_path / "once", Cut(**UNEVEN))
    for name, again in (("implied", {}), ("stated", UNEVEN)):
        twice = quietly(once, LAYERS, 16, tmp_path / name, Cut(**again))
        first, second = files(once.path), files(twice.path)
        assert first.pop("m2dexport.json") != second.pop("m2dexport.json")  # another parent
        assert first == second


@families
def test_cutting_widths_in_two_steps_is_cutting_once(model_type: str, tmp_path: Path) -> None:
    parent = open_checkpoint(tiny_checkpoint(tmp_path / "parent", model_type))
    wide = quietly(parent, LAYERS, 24, tmp_path / "wide", Cut(ffn=[40]))
    middle = quietly(wide, 3, 24, tmp_path / "middle", Cut(heads=[4, 2, 4], ffn=[40, 30, 40]))
    twice = quietly(middle, 2, 16, tmp_path / "twice", Cut(heads=[2], ffn=[20]))
    once = quietly(parent, 2, 16, tmp_path / "once", Cut(heads=[2], ffn=[20]))
    first, second = files(once.path), files(twice.path)
    assert first.pop("m2dexport.json") != second.pop("m2dexport.json")
    assert first == second


def test_a_grid_cuts_every_pair_alike_and_dtype_on_the_way(bert: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(bert)
    subs = slice_grid(checkpoint, [1, 3], [8, 16], tmp_path / "grid", Cut(ffn=[20], dtype="fp16"))
    assert [sub.widths.ffn for sub in subs if sub.widths] == [(20,), (20,), (20,) * 3, (20,) * 3]
    assert {t.dtype for t in stored_tensors(subs[0].path).values()} == {"F16"}


def test_widths_are_recorded_and_end_what_is_known_of_training(bert: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(bert, trained="3:16,4:32")
    sub = slice_checkpoint(checkpoint, 3, 16, tmp_path / "sub", Cut(ffn=[20], reorder=CALIBRATION))
    record = json.loads((sub.path / "m2dexport.json").read_text())
    assert record["widths"] == {
        "heads": [4] * 3,
        "kv_heads": [4] * 3,
        "ffn": [20] * 3,
        "head_dim": 8,
    }
    assert len(record["reordered_by"]) == 64
    assert record["trained"] is record["trained_grid"] is sub.trained is None
    same = slice_checkpoint(checkpoint, 3, 16, tmp_path / "same", Cut(reorder=CALIBRATION))
    assert same.trained == ((3, 16),)


@families
def test_reordering_by_importance_changes_no_vector(model_type: str, tmp_path: Path) -> None:
    parent = open_checkpoint(tiny_checkpoint(tmp_path / "parent", model_type))
    with warnings.catch_warnings():
        warnings.simplefilter("error", LoadingWarning)
        sub = slice_checkpoint(parent, LAYERS, HIDDEN, tmp_path / "sub", Cut(reorder=CALIBRATION))
    np.testing.assert_allclose(encode(sub.path), encode(parent.path), atol=1e-5)
    assert stored_tensors(sub.path).keys() == stored_tensors(parent.path).keys()
    moved = [
        name
        for name, tensor in stored_tensors(sub.path).items()
        if not np.array_equal(read_tensor(tensor), read_tensor(stored_tensors(parent.path)[name]))
    ]
    layers, attention, feed_forward = TAKERS[model_type]
    assert any(f"{layers}.{i}.{attention}.weight" in moved for i in range(LAYERS))
    assert all(f"{layers}.{i}.{feed_forward}.weight" in moved for i in range(LAYERS))


def test_reordering_sorts_what_matters_to_the_front(tmp_path: Path) -> None:
    """The first of two key-value groups, and every other channel, are made to add nothing."""
    parent = tiny_checkpoint(tmp_path / "parent", "qwen3")
    model = by_hand.load_model(parent)
    with torch.no_grad():
        for layer in model.layers:
            layer.self_attn.o_proj.weight[:, : 2 * HEAD_DIM] = 0  # the first key-value group
            layer.mlp.down_proj.weight[:, ::2] = 0
    model.save_pretrained(parent)
    checkpoint = open_checkpoint(parent)
    widths = {"heads": [2], "ffn": [24]}
    sub = slice_checkpoint(
        checkpoint, LAYERS, HIDDEN, tmp_path / "sub", Cut(reorder=CALIBRATION, **widths)
    )
    np.testing.assert_allclose(encode(sub.path), encode(parent), atol=1e-5)
    unsorted = slice_checkpoint(checkpoint, LAYERS, HIDDEN, tmp_path / "unsorted", Cut(**widths))
    assert np.abs(encode(unsorted.path) - encode(parent)).max() > 0.01


def test_reordering_brings_a_prefix_of_the_shipped_checkpoint_closer_to_it(tmp_path: Path) -> None:
    """Measured on STS-B dev sentences, which are not among the calibration texts."""
    checkpoint, widths = open_checkpoint(), {"heads": [9], "ffn": [1152]}  # three quarters
    rows = default_task_paths()[0].read_text(encoding="utf-8").splitlines()[:64]
    texts, sample = [row.split("\t")[1] for row in rows], calibration_texts()[::10]
    assert not set(texts) & set(sample)
    depth = checkpoint.layers
    whole = by_hand.normalized(Reference(checkpoint, [depth]).encode(texts)[depth])
    distance = {}
    for name, reorder in (("stored", None), ("sorted", sample)):
        sub = quietly(checkpoint, depth, 384, tmp_path / name, Cut(reorder=reorder, **widths))
        vectors = by_hand.normalized(Reference(sub, [depth]).encode(texts)[depth])
        distance[name] = 1 - float((vectors * whole).sum(axis=1).mean())
    assert distance["sorted"] < 0.75 * distance["stored"]


@pytest.mark.parametrize(
    ("model_type", "widths", "message"),
    [
        ("bert", {"heads": [5]}, "--heads 5 is not between 1 and 4, the heads of layer 1"),
        ("bert", {"heads": [0]}, "--heads 0 is not between 1 and 4"),
        ("bert", {"ffn": [48, 49, 48]}, "--ffn 49 is not between 1 and 48, .* of layer 2"),
        ("bert", {"ffn": [8, 8]}, "--ffn names 2 widths for 3 layers; give one, or one per layer"),
        ("qwen3", {"heads": [3]}, "--heads 3 splits a key-value group of 2 heads; choose a multi"),
        ("t5", {"ffn": [8]}, "the heads and feed-forward channels of t5 can be neither cut nor so"),
        ("deberta-v2", {"reorder": CALIBRATION}, "channels of deberta-v2 can be neither cut"),
    ],
)
def test_a_width_out_of_range_is_refused_before_anything_is_written(
    model_type: str, widths: dict[str, Any], message: str, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint(tmp_path / "parent", model_type))
    with pytest.raises(UsageError, match=message):
        slice_checkpoint(checkpoint, 3, 16, tmp_path / "out", Cut(**widths))
    assert [path.name for path in tmp_path.iterdir()] == ["parent"]


def test_every_family_with_a_block_is_tested() -> None:
    assert {name for name, family in FAMILIES.items() if family.block} == set(TAKERS)


def test_tensors_that_do_not_fit_each_other_are_refused(bert: Path, tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    shutil.copytree(bert, folder)
    tensors = stored_tensors(bert)
    odd = "encoder.layer.1.attention.self.key.weight"
    cut = [copied(t, n, rows=16 if n == odd else None) for n, t in tensors.items()]
    write_tensors(folder / "model.safetensors", cut)
    with pytest.raises(CheckpointError, match="tensors in layer 2 that do not fit each other"):
        open_checkpoint(folder)


def test_a_table_of_another_size_is_not_taken_for_a_width(bert: Path, tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    shutil.copytree(bert, folder)
    edit_json(folder / "config.json", vocab_size=50)
    with pytest.raises(CheckpointError, match=r"word_embeddings.weight of shape"):
        Reference(open_checkpoint(folder))
