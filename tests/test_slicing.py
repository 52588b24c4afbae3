from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import by_hand
import numpy as np
import pytest
import safetensors.torch
import sentence_transformers
import torch
import transformers
from click.testing import CliRunner
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from tiny import FAMILIES, HIDDEN, LAYERS, MAX_LENGTH, TEXTS, tiny_checkpoint
from tokenizers import Tokenizer

from m2dexport.checkpoint.open import Checkpoint, open_checkpoint
from m2dexport.checkpoint.tensors import stored_tensors
from m2dexport.checkpoint.tokenizer import write_tokenizer
from m2dexport.cli import cli
from m2dexport.errors import CheckpointError, M2DError, UsageError
from m2dexport.reference.pooler import Reference
from m2dexport.slice.slicing import Cut, slice_checkpoint, slice_grid
from m2dexport.slice.write import UntrainedWarning

# Float32 sums in another order (padding, attention kernels); a wrong layer moves values by 0.1.
CLOSE = 2e-5
ALL_MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")


def encode(folder: Path, prompt: str = "") -> NDArray[np.float32]:
    model = SentenceTransformer(str(folder), device="cpu")
    vectors: NDArray[np.float32] = model.encode(list(TEXTS), prompt=prompt)
    return vectors.astype(np.float32)


def files(folder: Path) -> dict[str, bytes]:
    found = {p.relative_to(folder): p for p in sorted(folder.rglob("*")) if p.is_file()}
    return {str(name): path.read_bytes() for name, path in found.items()}


def known(model_type: str) -> bool:
    return model_type in transformers.CONFIG_MAPPING


def raw_states_supported() -> bool:
    return hasattr(transformers.utils, "output_capturing") and "tie_last_hidden_states" in str(
        transformers.PretrainedConfig.__doc__
    )


families = pytest.mark.parametrize(
    "model_type",
    [
        pytest.param(t, marks=pytest.mark.skipif(not known(t), reason="not in this transformers"))
        for t in FAMILIES
    ],
)
raw_states = pytest.mark.skipif(
    not raw_states_supported(), reason="transformers < 5.18 always applies the final norm"
)


@families
@pytest.mark.parametrize("depth", [1, 3, LAYERS])
def test_every_family_embeds_at_every_depth_as_computed_by_hand(
    model_type: str, depth: int, tmp_path: Path
) -> None:
    mode = "lasttoken" if FAMILIES[model_type][1] == "decoder" else "mean"
    parent = tiny_checkpoint(tmp_path / "parent", model_type, pooling=mode)
    checkpoint = open_checkpoint(parent)
    assert not checkpoint.assumed
    sub = slice_checkpoint(checkpoint, depth, 20, tmp_path / "sub")
    expected = by_hand.vectors(parent, TEXTS, depth, 20, [mode])
    np.testing.assert_allclose(encode(sub.path), expected, atol=CLOSE)
    whole = Reference(checkpoint).encode(TEXTS)[depth][:, :20]
    np.testing.assert_allclose(by_hand.normalized(whole), expected, atol=CLOSE)
    assert sub.layers == depth
    assert sub.dim == 20
    if depth < LAYERS:
        shallower = by_hand.vectors(parent, TEXTS, depth + 1, 20, [mode])
        assert np.abs(shallower - expected).max() > 1000 * CLOSE


@families
def test_slicing_a_slice_to_itself_changes_no_byte(model_type: str, tmp_path: Path) -> None:
    parent = open_checkpoint(tiny_checkpoint(tmp_path / "parent", model_type))
    once = slice_checkpoint(parent, 2, 16, tmp_path / "once")
    twice = slice_checkpoint(once, 2, 16, tmp_path / "twice")
    first, second = files(once.path), files(twice.path)
    assert first.pop("m2dexport.json") != second.pop("m2dexport.json")  # another parent
    assert first == second


@families
def test_slicing_in_two_steps_is_slicing_once(model_type: str, tmp_path: Path) -> None:
    parent = open_checkpoint(tiny_checkpoint(tmp_path / "parent", model_type))
    middle = slice_checkpoint(parent, 3, 24, tmp_path / "middle")
    twice = slice_checkpoint(middle, 1, 16, tmp_path / "twice")
    once = slice_checkpoint(parent, 1, 16, tmp_path / "once")
    first, second = files(once.path), files(twice.path)
    assert first.pop("m2dexport.json") != second.pop("m2dexport.json")
    assert first == second


@families
def test_transformers_loads_a_slice_with_every_weight_in_its_place(
    model_type: str, tmp_path: Path
) -> None:
    parent = open_checkpoint(tiny_checkpoint(tmp_path / "parent", model_type))
    sub = slice_checkpoint(parent, 2, HIDDEN, tmp_path / "sub")
    auto = (
        transformers.AutoModelForTextEncoding
        if model_type in ("t5", "mt5", "umt5")
        else transformers.AutoModel
    )
    _, info = auto.from_pretrained(sub.path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]


@raw_states
@pytest.mark.parametrize("model_type", by_hand.PRE_NORM)
@pytest.mark.parametrize("depth", [2, LAYERS])
def test_a_skipped_final_norm_is_skipped_after_reload_too(
    model_type: str, depth: int, tmp_path: Path
) -> None:
    parent = tiny_checkpoint(tmp_path / "parent", model_type)
    checkpoint = open_checkpoint(parent)
    assert checkpoint.final_norm == "applied"
    sub = slice_checkpoint(checkpoint, depth, 20, tmp_path / "sub", Cut(final_norm="skipped"))
    assert sub.final_norm == "skipped"
    expected = by_hand.vectors(parent, TEXTS, depth, 20, ["mean"], norm=False)
    np.testing.assert_allclose(encode(sub.path), expected, atol=CLOSE)
    reference = Reference(sub).encode(TEXTS)[depth]
    np.testing.assert_allclose(by_hand.normalized(reference), expected, atol=CLOSE)
    assert np.abs(by_hand.vectors(parent, TEXTS, depth, 20, ["mean"]) - expected).max() > 0.01
    again = slice_checkpoint(sub, depth, 20, tmp_path / "again")
    assert again.final_norm == "skipped"
    back = slice_checkpoint(sub, depth, 20, tmp_path / "back", Cut(final_norm="applied"))
    normed = by_hand.vectors(parent, TEXTS, depth, 20, ["mean"])
    np.testing.assert_allclose(encode(back.path), normed, atol=CLOSE)


def test_a_skipped_final_norm_asks_for_a_transformers_that_can(qwen3: Path, tmp_path: Path) -> None:
    sub = slice_checkpoint(
        open_checkpoint(qwen3), 2, 8, tmp_path / "sub", Cut(final_norm="skipped")
    )
    config = json.loads((sub.path / "config_sentence_transformers.json").read_text())
    assert config["requirements"] == {"transformers": ">=5.18"}


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("modes", [*[(mode,) for mode in ALL_MODES], ("cls", "mean"), ALL_MODES])
@pytest.mark.parametrize("model_type", ["bert", "qwen3"])
def test_every_pooling_agrees_under_either_padding(
    model_type: str, modes: tuple[str, ...], padding_side: str, tmp_path: Path
) -> None:
    parent = tiny_checkpoint(
        tmp_path / "parent", model_type, pooling=modes, padding_side=padding_side
    )
    checkpoint = open_checkpoint(parent)
    assert checkpoint.dim == HIDDEN * len(modes)
    dim = checkpoint.dim - 5
    sub = slice_checkpoint(checkpoint, 2, dim, tmp_path / "sub")
    assert sub.pooling.modes == modes
    if model_type == "bert" and padding_side == "left":
        return  # absolute positions count the padding: no two batches agree, sliced or not
    expected = by_hand.vectors(parent, TEXTS, 2, dim, modes)
    reference = Reference(sub).encode(TEXTS)[2]
    np.testing.assert_allclose(by_hand.normalized(reference), expected, atol=CLOSE)
    if sentence_transformers.__version__ < "6" and "weightedmean" in modes:
        return  # before 6.0 its weights counted the padding on the left
    np.testing.assert_allclose(encode(sub.path), expected, atol=CLOSE)


def test_pooling_modes_keep_an_order_of_their_own(tmp_path: Path) -> None:
    parent = tiny_checkpoint(tmp_path / "parent", pooling=("mean", "cls"))
    sub = slice_checkpoint(open_checkpoint(parent), 2, 40, tmp_path / "sub")
    assert sub.pooling.modes == ("mean", "cls")
    expected = by_hand.vectors(parent, TEXTS, 2, 40, ["mean", "cls"])
    np.testing.assert_allclose(encode(sub.path), expected, atol=CLOSE)


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "mistral", "llama", "phi3"])
def test_a_bidirectional_decoder_stays_bidirectional(model_type: str, tmp_path: Path) -> None:
    if transformers.__version__ < "5.2":
        pytest.skip("this transformers ignores is_causal")
    parent = tiny_checkpoint(tmp_path / "parent", model_type, config={"is_causal": False})
    sub = slice_checkpoint(open_checkpoint(parent), 2, HIDDEN, tmp_path / "sub")
    first, second = by_hand.states(sub.path, ["the cat", "the dog"], 2)
    assert np.abs(first[0] - second[0]).max() > 0.01  # a later token moves token 0
    expected = by_hand.vectors(parent, TEXTS, 2, HIDDEN, ["mean"])
    np.testing.assert_allclose(encode(sub.path), expected, atol=CLOSE)


def test_an_encoder_made_of_gemma3_stays_bidirectional(tmp_path: Path) -> None:
    config = {"use_bidirectional_attention": True}
    parent = tiny_checkpoint(tmp_path / "parent", "gemma3_text", config=config)
    sub = slice_checkpoint(open_checkpoint(parent), 3, HIDDEN, tmp_path / "sub")
    expected = by_hand.vectors(parent, TEXTS, 3, HIDDEN, ["mean"])
    np.testing.assert_allclose(encode(sub.path), expected, atol=CLOSE)


@pytest.mark.parametrize(("dtype", "close"), [("fp16", 5e-3), ("bf16", 5e-2)])
@pytest.mark.parametrize("model_type", ["bert", "qwen3"])
def test_dtype_changes_every_weight_and_little_else(
    model_type: str, dtype: str, close: float, tmp_path: Path
) -> None:
    head = [torch.nn.Linear(HIDDEN, 24)]
    parent = tiny_checkpoint(tmp_path / "parent", model_type, head=head)
    checkpoint = open_checkpoint(parent)
    full = slice_checkpoint(checkpoint, 2, 16, tmp_path / "full")
    sub = slice_checkpoint(checkpoint, 2, 16, tmp_path / "sub", Cut(dtype=dtype))
    stored = {"fp16": "F16", "bf16": "BF16"}[dtype]
    for folder in (sub.path, sub.head[0].folder):
        assert {t.dtype for t in stored_tensors(folder).values()} == {stored}
    loaded = transformers.AutoModel.from_pretrained(sub.path, dtype="auto")
    assert loaded.dtype == {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    np.testing.assert_allclose(encode(sub.path), encode(full.path), atol=close)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_checkpoint_keeps_its_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    parent = open_checkpoint(tiny_checkpoint(tmp_path / "parent", dtype=dtype))
    sub = slice_checkpoint(parent, LAYERS, HIDDEN, tmp_path / "sub")
    assert sub.weights_sha256 == parent.weights_sha256 == sub.sliced_from


def test_float8_weights_become_the_dtype_asked_for(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "parent")
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    weights = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in weights.items()}
    safetensors.torch.save_file(weights, folder / "model.safetensors")
    sub = slice_checkpoint(open_checkpoint(folder), 2, 16, tmp_path / "sub", Cut(dtype="fp16"))
    assert {tensor.dtype for tensor in stored_tensors(sub.path).values()} == {"F16"}
    assert json.loads((sub.path / "config.json").read_text())["dtype"] == "float16"


def test_shards_are_put_together(bert: Path, tmp_path: Path) -> None:
    sharded = tiny_checkpoint(tmp_path / "sharded", shard_size="20KB")
    assert len(list(sharded.glob("model-*.safetensors"))) > 2
    one = slice_checkpoint(open_checkpoint(bert), 2, 16, tmp_path / "one")
    many = slice_checkpoint(open_checkpoint(sharded), 2, 16, tmp_path / "many")
    assert one.sliced_from == many.sliced_from
    assert one.weights_sha256 == many.weights_sha256


def test_a_dense_head_is_cut_for_real(tmp_path: Path) -> None:
    torch.manual_seed(1)
    head = [torch.nn.Linear(HIDDEN, 48, bias=False), torch.nn.Linear(48, 40)]
    parent = open_checkpoint(tiny_checkpoint(tmp_path / "parent", head=head))
    sub = slice_checkpoint(parent, 2, 10, tmp_path / "sub")
    shapes = [
        {name: t.shape for name, t in stored_tensors(module.folder).items()} for module in sub.head
    ]
    assert shapes == [
        {"linear.weight": (48, HIDDEN)},
        {"linear.weight": (10, 48), "linear.bias": (10,)},
    ]
    assert_head_is_exact(parent, sub, 10)


def test_a_layer_norm_head_is_kept_whole_and_cut_after(tmp_path: Path) -> None:
    norm = torch.nn.LayerNorm(HIDDEN)
    torch.nn.init.normal_(norm.weight)
    parent = open_checkpoint(tiny_checkpoint(tmp_path / "parent", head=[norm]))
    sub = slice_checkpoint(parent, 2, 10, tmp_path / "sub")
    assert [type(module).__name__ for module in sub.head] == ["LayerNormHead", "Dense"]
    assert_head_is_exact(parent, sub, 10)


def assert_head_is_exact(parent: Checkpoint, sub: Checkpoint, dim: int) -> None:
    """Run the parent's own sentence-transformers modules on states computed by hand."""
    model = SentenceTransformer(str(parent.path), device="cpu")
    pooled = np.stack([by_hand.pool(s, "mean") for s in by_hand.states(parent.path, TEXTS, 2)])
    features: Any = {"sentence_embedding": torch.from_numpy(pooled)}
    with torch.no_grad():
        for module in list(model)[2:-1]:
            features = module(features)
    expected = by_hand.normalized(features["sentence_embedding"][:, :dim].numpy())
    np.testing.assert_allclose(encode(sub.path), expected, atol=CLOSE)


def test_prompts_and_maximum_length_are_carried_over(bert: Path, tmp_path: Path) -> None:
    parent = open_checkpoint(bert)
    sub = slice_checkpoint(parent, 2, 16, tmp_path / "sub")
    assert sub.prompts == parent.prompts == {"query": "find: ", "document": ""}
    assert sub.max_length == parent.max_length == MAX_LENGTH
    model = SentenceTransformer(str(sub.path), device="cpu")
    assert model.max_seq_length == MAX_LENGTH
    expected = by_hand.vectors(bert, TEXTS, 2, 16, ["mean"], prompt="find: ")
    np.testing.assert_allclose(model.encode(list(TEXTS), prompt_name="query"), expected, atol=CLOSE)


@pytest.mark.parametrize("kind", ["bert", "roberta", "xlm-roberta", "t5", "qwen3"])
def test_tokenizer_json_gives_the_ids_of_the_parent(kind: str, tmp_path: Path) -> None:
    parent = tiny_checkpoint(tmp_path / "parent", kind)
    sub = slice_checkpoint(open_checkpoint(parent), 1, 8, tmp_path / "sub")
    tokenizer = Tokenizer.from_file(str(sub.path / "tokenizer.json"))
    tokenizer.no_truncation()
    assert tokenizer.padding is None
    expected = transformers.AutoTokenizer.from_pretrained(parent)
    for text in (*TEXTS, "Ünïcode ☃ \t x", "word " * 100):
        assert tokenizer.encode(text).ids == expected(text)["input_ids"]


def test_lowercasing_outside_the_tokenizer_moves_into_it(tmp_path: Path) -> None:
    parent = tiny_checkpoint(tmp_path / "parent", "roberta")
    settings = {"max_seq_length": MAX_LENGTH, "do_lower_case": True}
    (parent / "sentence_bert_config.json").write_text(json.dumps(settings))
    sub = slice_checkpoint(open_checkpoint(parent), 2, 16, tmp_path / "sub")
    tokenizer = Tokenizer.from_file(str(sub.path / "tokenizer.json"))
    assert tokenizer.encode("The CAT").ids == tokenizer.encode("the cat").ids
    expected = by_hand.vectors(parent, [t.lower() for t in TEXTS], 2, 16, ["mean"])
    np.testing.assert_allclose(encode(sub.path), expected, atol=CLOSE)


def test_lists_with_an_entry_per_layer_are_cut(tmp_path: Path) -> None:
    parent = open_checkpoint(tiny_checkpoint(tmp_path / "parent", "gemma3_text"))
    sub = slice_checkpoint(parent, 3, 16, tmp_path / "sub")
    config = json.loads((sub.path / "config.json").read_text())
    assert config["num_hidden_layers"] == 3
    assert config["layer_types"] == ["sliding_attention", "full_attention", "sliding_attention"]


def test_albert_groups_are_cut_where_they_can_be(tmp_path: Path) -> None:
    config = {"num_hidden_groups": 2}
    parent = tiny_checkpoint(tmp_path / "parent", "albert", config=config)
    checkpoint = open_checkpoint(parent)
    one = slice_checkpoint(checkpoint, 1, 16, tmp_path / "one")
    assert not [name for name in stored_tensors(one.path) if "layer_groups.1." in name]
    expected = by_hand.vectors(parent, TEXTS, 1, 16, ["mean"])
    np.testing.assert_allclose(encode(one.path), expected, atol=CLOSE)
    with pytest.raises(CheckpointError, match="choose a multiple of 2"):
        slice_checkpoint(checkpoint, 3, 16, tmp_path / "three")
    assert not (tmp_path / "three").exists()


def test_deberta_with_a_convolution_after_its_first_layer_is_cut_right(tmp_path: Path) -> None:
    config = {"conv_kernel_size": 3, "conv_act": "gelu"}
    parent = tiny_checkpoint(tmp_path / "parent", "deberta-v2", config=config)
    sub = slice_checkpoint(open_checkpoint(parent), 1, HIDDEN, tmp_path / "sub")
    model = by_hand.load_model(parent)
    tokenizer = transformers.AutoTokenizer.from_pretrained(parent)
    rows = []
    for text in TEXTS:
        ids = tokenizer(text, truncation=True, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            hidden = model(ids, output_hidden_states=True).hidden_states[1][0]
        rows.append(by_hand.pool(hidden.numpy(), "mean"))
    np.testing.assert_allclose(encode(sub.path), by_hand.normalized(np.stack(rows)), atol=CLOSE)


def test_a_task_model_is_sliced_to_its_bare_model(bert: Path, tmp_path: Path) -> None:
    model = transformers.BertForMaskedLM.from_pretrained(bert)
    parent = tiny_checkpoint(tmp_path / "parent")
    bare = open_checkpoint(parent).weights_sha256
    model.save_pretrained(parent)
    assert any(name.startswith("bert.") for name in stored_tensors(parent))
    checkpoint = open_checkpoint(parent)
    sub = slice_checkpoint(checkpoint, 2, 16, tmp_path / "sub")
    assert not [n for n in stored_tensors(sub.path) if n.startswith(("bert.", "cls."))]
    assert checkpoint.weights_sha256 != bare  # the masked-language model has no pooler
    np.testing.assert_allclose(
        encode(sub.path), by_hand.vectors(parent, TEXTS, 2, 16, ["mean"]), atol=CLOSE
    )


def test_an_encoder_decoder_loses_its_decoder(tmp_path: Path) -> None:
    parent = tiny_checkpoint(tmp_path / "parent", "t5")
    config = transformers.AutoConfig.from_pretrained(parent)
    config.is_encoder_decoder = True
    transformers.T5ForConditionalGeneration(config).save_pretrained(parent)
    sub = slice_checkpoint(open_checkpoint(parent), 2, 16, tmp_path / "sub")
    assert not [n for n in stored_tensors(sub.path) if n.startswith(("decoder.", "lm_head."))]
    expected = by_hand.vectors(parent, TEXTS, 2, 16, ["mean"])
    np.testing.assert_allclose(encode(sub.path), expected, atol=CLOSE)


def test_a_checkpoint_that_stores_no_pooling_can_be_sliced_once_it_is_declared(
    tmp_path: Path,
) -> None:
    parent = tiny_checkpoint(tmp_path / "parent", pooling=None)
    sub = slice_checkpoint(open_checkpoint(parent, pooling="cls"), 2, 16, tmp_path / "sub")
    assert sub.pooling.modes == ("cls",)
    assert not sub.assumed
    expected = by_hand.vectors(parent, TEXTS, 2, 16, ["cls"])
    np.testing.assert_allclose(encode(sub.path), expected, atol=CLOSE)


def test_slicing_outside_the_trained_grid_warns_and_records_it(bert: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(bert, trained="2:16,4:32")
    with pytest.warns(UntrainedWarning, match=r"\(3, 16\) is not in the trained grid"):
        slice_checkpoint(checkpoint, 3, 16, tmp_path / "untrained")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UntrainedWarning)
        trained = slice_checkpoint(checkpoint, 2, 16, tmp_path / "trained")
        slice_checkpoint(open_checkpoint(bert), 3, 16, tmp_path / "unknown")
    flags = [
        json.loads((tmp_path / name / "m2dexport.json").read_text())["trained"]
        for name in ("untrained", "trained", "unknown")
    ]
    assert flags == [False, True, None]
    assert trained.trained == ((2, 16),)
    with pytest.warns(UntrainedWarning):
        nothing = slice_checkpoint(checkpoint, 1, 8, tmp_path / "nothing")
    assert nothing.trained == ()  # known to hold no trained pair, which is not unknown


@pytest.mark.parametrize(
    ("layers", "dim", "options", "message"),
    [
        (-1, 16, {}, "--layers -1 is not between 0 and 4"),
        (0, 16, {}, "depth 0 is made by a map; pass texts to align it on"),
        (LAYERS + 1, 16, {}, "--layers 5 is not between 0 and 4"),
        (2, 0, {}, "--dim 0 is not between 1 and 32"),
        (2, HIDDEN + 1, {}, "--dim 33 is not between 1 and 32"),
        (2, 16, {"dtype": "int4"}, "--dtype 'int4' is unknown"),
        (2, 16, {"final_norm": "skipped"}, "has no meaning for bert"),
    ],
)
def test_a_value_out_of_range_is_refused_before_anything_is_written(
    bert: Path, tmp_path: Path, *, layers: int, dim: int, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        slice_checkpoint(open_checkpoint(bert), layers, dim, tmp_path / "out", Cut(**options))
    assert not list(tmp_path.iterdir())


def test_what_transformers_cannot_read_is_not_handed_over(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("m2dexport.slice.write.cut_config", lambda raw, *_, **__: dict(raw))
    with pytest.raises(CheckpointError, match=r"says 4 layers in config\.json and holds 2"):
        slice_checkpoint(open_checkpoint(bert), 2, 16, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_grid_is_one_folder_per_pair_of_the_same_bytes(bert: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(bert)
    subs = slice_grid(checkpoint, [1, 3], [8, 16], tmp_path / "grid")
    names = ["1x8", "1x16", "3x8", "3x16"]
    assert [sub.path for sub in subs] == [tmp_path / "grid" / name for name in names]
    assert [(sub.layers, sub.dim) for sub in subs] == [(1, 8), (1, 16), (3, 8), (3, 16)]
    alone = slice_checkpoint(checkpoint, 3, 8, tmp_path / "alone")
    (single,) = slice_grid(checkpoint, [3], [8], tmp_path / "single")
    assert single.path == tmp_path / "single"
    assert files(alone.path) == files(subs[2].path) == files(single.path)


def test_a_grid_with_one_impossible_pair_writes_nothing(bert: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--dim 99"):
        slice_grid(open_checkpoint(bert), [1, 3], [8, 99], tmp_path / "grid")
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_not_overwritten(bert: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(UsageError, match="already exists"):
        slice_checkpoint(open_checkpoint(bert), 2, 16, tmp_path / "out")


def test_a_checkpoint_without_tokenizer_leaves_nothing_behind(tmp_path: Path) -> None:
    parent = tiny_checkpoint(tmp_path / "parent")
    for path in parent.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(CheckpointError, match="no tokenizer"):
        slice_checkpoint(open_checkpoint(parent), 2, 16, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["parent"]


def test_a_tokenizer_that_cannot_be_written_is_one_sentence(tmp_path: Path, bert: Path) -> None:
    """The tokenizers library raises bare exceptions: of a full disk, as of a folder in its way."""
    (tmp_path / "tokenizer.json").mkdir()
    with pytest.raises(M2DError, match=r"tokenizer\.json could not be written: .*nothing was kept"):
        write_tokenizer(bert, tmp_path, lowercase=False)


def test_force_replaces_a_sub_model_and_never_the_checkpoint_itself(bert: Path, tmp_path) -> None:
    model = Path(shutil.copytree(bert, tmp_path / "model"))
    arguments = ["slice", "--model", str(model), "--dim", "8", "--layers"]
    out = ["--out", str(tmp_path / "sub")]
    assert CliRunner().invoke(cli, [*arguments, "2", *out]).exit_code == 0
    refused = CliRunner().invoke(cli, [*arguments, "1", *out])
    assert (refused.exit_code, "replace it with --force" in refused.stderr) == (2, True)
    assert CliRunner().invoke(cli, [*arguments, "1", *out, "--force"]).exit_code == 0
    assert open_checkpoint(tmp_path / "sub").layers == 1
    itself = CliRunner().invoke(cli, [*arguments, "1", "--out", str(model), "--force"])
    assert (itself.exit_code, "holds the checkpoint itself" in itself.stderr) == (2, True)
    assert open_checkpoint(model).layers == LAYERS
