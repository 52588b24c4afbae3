from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import by_hand
import numpy as np
import pytest
import torch
import transformers
from sentence_transformers import SentenceTransformer
from tiny import (
    HIDDEN,
    LAYERS,
    MAX_LENGTH,
    TEXTS,
    edit_json,
    tiny_checkpoint,
    tiny_tokenizer,
)

from m2dexport.checkpoint.open import open_checkpoint
from m2dexport.checkpoint.sizes import depth_sizes
from m2dexport.checkpoint.st_modules import Dense, LayerNormHead, Pooling
from m2dexport.errors import CheckpointError, UsageError
from m2dexport.slice.slicing import slice_checkpoint

CARD = """
## Training Details
### Training Dataset
#### all-nli
* Size: 557,850 training samples
* Loss: [<code>{loss}</code>](https://sbert.net/docs/losses.html#{loss}) with these parameters:
  ```json
  {config}
  ```
"""


def write_modules(folder: Path, *types: str) -> None:
    (folder / "modules.json").write_text(
        json.dumps(
            [
                {"idx": i, "name": str(i), "path": f"{i}_x" if i else "", "type": type_name}
                for i, type_name in enumerate(types)
            ]
        )
    )


def test_a_checkpoint_describes_itself(bert: Path) -> None:
    checkpoint = open_checkpoint(bert)
    assert checkpoint.path == bert
    assert checkpoint.model_type == "bert"
    assert (checkpoint.layers, checkpoint.hidden, checkpoint.dim) == (LAYERS, HIDDEN, HIDDEN)
    assert checkpoint.vocab_size == len(tiny_tokenizer("wordpiece"))
    assert checkpoint.pooling == Pooling(("mean",))
    assert checkpoint.head == ()
    assert checkpoint.normalized
    assert checkpoint.final_norm == "none"
    assert checkpoint.prompts == {"query": "find: ", "document": ""}
    assert checkpoint.default_prompt is None
    assert checkpoint.max_length == MAX_LENGTH
    assert checkpoint.trained is None
    assert checkpoint.assumed == ()
    assert checkpoint.sliced_from is None


def test_sizes_grow_by_one_layer_and_the_last_is_the_file(bert: Path) -> None:
    sizes = depth_sizes(open_checkpoint(bert))
    assert [size.layers for size in sizes] == [1, 2, 3, 4]
    steps = {b.parameters - a.parameters for a, b in itertools.pairwise(sizes)}
    assert len(steps) == 1
    model = transformers.AutoModel.from_pretrained(bert)
    assert sizes[-1].parameters == model.num_parameters()
    assert sizes[-1].bytes == 4 * sizes[-1].parameters
    assert sizes[0].embedding_parameters == len(tiny_tokenizer("wordpiece")) * HIDDEN


def test_heads_are_read_in_order(tmp_path: Path) -> None:
    head = [torch.nn.Linear(2 * HIDDEN, 48, bias=False), torch.nn.LayerNorm(48)]
    folder = tiny_checkpoint(tmp_path / "x", pooling=("cls", "mean"), head=head, normalize=False)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.head == (
        Dense(folder / "2_Dense", 2 * HIDDEN, 48, bias=False, activation="tanh"),
        LayerNormHead(folder / "3_LayerNorm", 48),
    )
    assert checkpoint.dim == 48
    assert not checkpoint.normalized


def test_pooling_flags_of_older_versions_are_read(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "x")
    flags = {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}
    config = {"word_embedding_dimension": HIDDEN, **flags}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))
    assert open_checkpoint(folder).pooling.modes == ("cls", "mean")


def test_a_transformer_in_a_folder_of_its_own_is_found(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "x")
    inner = folder / "0_Transformer"
    inner.mkdir()
    for path in [p for p in folder.iterdir() if p.is_file()]:
        if path.name not in ("modules.json", "config_sentence_transformers.json"):
            path.rename(inner / path.name)
    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    (folder / "modules.json").write_text(json.dumps(modules))
    assert open_checkpoint(folder).path == inner
    sub = slice_checkpoint(open_checkpoint(folder), 2, 16, tmp_path / "sub")
    vectors = SentenceTransformer(str(sub.path), device="cpu").encode(list(TEXTS))
    expected = by_hand.vectors(inner, TEXTS, 2, 16, ["mean"])
    np.testing.assert_allclose(vectors, expected, atol=2e-5)


def test_pooling_that_is_not_stored_must_be_declared(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "x", pooling=None)
    with pytest.raises(CheckpointError, match="--pooling mean, cls or lasttoken"):
        open_checkpoint(folder)
    checkpoint = open_checkpoint(folder, pooling="cls+mean")
    assert checkpoint.pooling.modes == ("cls", "mean")
    assert checkpoint.assumed == (
        "pooling is cls+mean, as declared; the checkpoint does not store it.",
    )
    with pytest.raises(UsageError, match="'median' is unknown"):
        open_checkpoint(folder, pooling="median")


def test_a_declared_pooling_cannot_contradict_the_stored_one(bert: Path) -> None:
    assert open_checkpoint(bert, pooling="mean").assumed == ()
    with pytest.raises(UsageError, match=r"contradicts .* which stores mean"):
        open_checkpoint(bert, pooling="cls")


@pytest.mark.parametrize(
    ("model_type", "positions", "expected"),
    [("bert", 64, 64), ("roberta", 64, 62), ("xlm-roberta", 64, 62), ("mpnet", 64, 62)],
)
def test_maximum_length_stays_within_the_positions(
    model_type: str, positions: int, expected: int, tmp_path: Path
) -> None:
    config = {"max_position_embeddings": positions}
    folder = tiny_checkpoint(tmp_path / "x", model_type, config=config)
    assert open_checkpoint(folder).max_length == MAX_LENGTH
    (folder / "sentence_bert_config.json").unlink()
    assert open_checkpoint(folder).max_length == MAX_LENGTH  # the tokenizer's own
    edit_json(folder / "tokenizer_config.json", model_max_length=10**30)
    assert open_checkpoint(folder).max_length == expected
    edit_json(folder / "sentence_bert_config.json", max_seq_length=512)
    assert open_checkpoint(folder).max_length == expected


def test_a_maximum_length_that_nothing_tells_is_assumed(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "x", "t5")
    (folder / "sentence_bert_config.json").unlink()
    edit_json(folder / "tokenizer_config.json", model_max_length=10**30)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.max_length == 512
    assert checkpoint.assumed == (
        "the maximum length is 512 tokens, as the checkpoint stores none.",
    )


def test_the_hash_ignores_file_names_shards_and_task_heads(tmp_path: Path) -> None:
    plain = tiny_checkpoint(tmp_path / "plain", "llama")
    sharded = tiny_checkpoint(tmp_path / "sharded", "llama", shard_size="20KB")
    causal = tiny_checkpoint(tmp_path / "causal", "llama")
    model = transformers.LlamaForCausalLM.from_pretrained(causal)
    model.save_pretrained(causal)
    hashes = {open_checkpoint(f).weights_sha256 for f in (plain, sharded, causal)}
    assert len(hashes) == 1
    other = tiny_checkpoint(tmp_path / "other", "llama", seed=1)
    assert open_checkpoint(other).weights_sha256 not in hashes


def test_the_hash_sees_the_head(tmp_path: Path) -> None:
    hashes = set()
    for seed in (1, 2):
        torch.manual_seed(seed)
        folder = tiny_checkpoint(tmp_path / str(seed), head=[torch.nn.Linear(HIDDEN, 8)])
        hashes.add(open_checkpoint(folder).weights_sha256)
    assert len(hashes) == 2


def test_a_declared_grid_is_sorted_and_checked(bert: Path) -> None:
    assert open_checkpoint(bert, trained="4:32, 2:16,2:16").trained == ((2, 16), (4, 32))
    for text, message in (
        ("2-16", "is not depths:dims"),
        ("5:16", "outside the checkpoint's 4 layers"),
        ("2:64", "outside the checkpoint's 4 layers and 32 dims"),
    ):
        with pytest.raises(UsageError, match=message):
            open_checkpoint(bert, trained=text)


@pytest.mark.parametrize(
    ("loss", "config", "expected"),
    [
        (
            "Matryoshka2dLoss",
            {"loss": "CoSENTLoss", "n_layers_per_step": 1, "matryoshka_dims": [32, 8, 64]},
            tuple((n, d) for n in (1, 2, 3, 4) for d in (8, 32)),
        ),
        ("MatryoshkaLoss", {"loss": "CoSENTLoss", "matryoshka_dims": [32, 8]}, ((4, 8), (4, 32))),
        ("AdaptiveLayerLoss", {"loss": "CoSENTLoss"}, ((1, 32), (2, 32), (3, 32), (4, 32))),
        ("AdaptiveLayerLoss", {"loss": "MatryoshkaLoss"}, None),
        ("MultipleNegativesRankingLoss", {"scale": 20.0}, None),
    ],
)
def test_the_grid_is_read_from_the_model_card(
    loss: str, config: dict[str, Any], expected: object, tmp_path: Path
) -> None:
    folder = tiny_checkpoint(tmp_path / "x")
    card = CARD.replace("{loss}", loss).replace("{config}", json.dumps(config, indent=4))
    (folder / "README.md").write_text(card)
    assert open_checkpoint(folder).trained == expected
    assert open_checkpoint(folder, trained="1:8").trained == ((1, 8),)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Matryoshka2dLoss", tuple((n, d) for n in (1, 2, 3, 4) for d in (16, 32))),
        ("MatryoshkaLoss", ((4, 16), (4, 32))),
        ("AdaptiveLayerLoss", ((1, 32), (2, 32), (3, 32), (4, 32))),
    ],
)
def test_the_grid_is_read_from_a_card_that_sentence_transformers_writes(
    name: str, expected: object, tmp_path: Path
) -> None:
    folder = tiny_checkpoint(tmp_path / "x")
    model = SentenceTransformer(str(folder), device="cpu")
    from sentence_transformers.sentence_transformer import losses

    dims = () if name == "AdaptiveLayerLoss" else ([32, 16],)
    loss = getattr(losses, name)(model, losses.CoSENTLoss(model), *dims)
    config = {"fullname": f"sentence_transformers.losses.{name}"}
    config["config_code"] = f"  ```json\n  {json.dumps(loss.get_config_dict())}\n  ```"
    model.model_card_data.train_datasets = [
        {"name": "x", "size": 1, "columns": ["a"], "stats": {}, "loss": config}
    ]
    model.save_pretrained(str(tmp_path / "saved"))
    assert open_checkpoint(tmp_path / "saved").trained == expected


def test_raw_training_of_a_family_with_a_final_norm_is_told(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "x", "qwen3")
    card = CARD.replace("{loss}", "AdaptiveLayerLoss").replace("{config}", '{"loss": "CoSENTLoss"}')
    (folder / "README.md").write_text(card)
    (sentence,) = open_checkpoint(folder).assumed
    assert "--final-norm skipped" in sentence


@pytest.mark.parametrize("name", ["ernie", "olmo2", "eurobert", "megatron-bert", "xlm-roberta-xl"])
def test_a_family_without_a_row_is_inferred_and_reported(name: str, tmp_path: Path) -> None:
    if name not in transformers.CONFIG_MAPPING:
        pytest.skip("not in this transformers")
    encoder = name in ("ernie", "megatron-bert", "xlm-roberta-xl")
    folder = tiny_checkpoint(tmp_path / "x", "bert" if encoder else "llama")
    settings = json.loads((folder / "config.json").read_text())
    for key in ("architectures", "model_type", "transformers_version", "rope_parameters"):
        settings.pop(key, None)
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **settings)
    model = transformers.AutoModel.from_config(config)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.final_norm == ("none" if name == "ernie" else "applied")
    (sentence,) = checkpoint.assumed
    assert f"model type {name!r} is not in the table of families" in sentence
    sub = slice_checkpoint(checkpoint, 2, 16, tmp_path / "sub")
    with torch.no_grad():
        rows = []
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        for text in TEXTS:
            ids = tokenizer(text, truncation=True, return_tensors="pt")["input_ids"]
            state = model.eval()(ids, output_hidden_states=True).hidden_states[2]
            norms = {"megatron-bert": "encoder.ln", "xlm-roberta-xl": "encoder.LayerNorm"}
            norms["ernie"] = ""
            norm = norms.get(name, "norm")
            state = model.get_submodule(norm)(state) if norm else state
            rows.append(state[0].mean(0)[:16].numpy())
    vectors = SentenceTransformer(str(sub.path), device="cpu").encode(list(TEXTS))
    np.testing.assert_allclose(vectors, by_hand.normalized(np.stack(rows)), atol=2e-5)


@pytest.mark.parametrize(
    ("types", "message"),
    [
        (["Transformer", "WeightedLayerPooling", "Pooling"], "mixes the states of all layers"),
        (["Transformer", "Pooling", "Router"], "different modules for queries and documents"),
        (["CLIPModel"], "embeds images as well as text"),
        (["StaticEmbedding"], "no table of token vectors named embedding.weight"),
        (["StaticEmbedding", "Dense"], "Dense after StaticEmbedding"),
        (["WordEmbeddings"], "no layers to cut"),
        (["Transformer", "LSTM", "Pooling"], "runs over the tokens after the transformer"),
        (["Transformer"], "starts with Transformer, not with Transformer and Pooling"),
        (["Transformer", "Pooling", "Normalize", "LayerNorm"], "LayerNorm after Normalize"),
        (["Transformer", "Pooling", "Pooling"], "a second Pooling"),
    ],
)
def test_a_module_that_cannot_be_exported_is_refused_by_name(
    types: list[str], message: str, tmp_path: Path
) -> None:
    folder = tiny_checkpoint(tmp_path / "x")
    write_modules(folder, *(f"sentence_transformers.models.{name}" for name in types))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


def test_a_module_outside_the_checkpoint_is_refused(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "x")
    modules = json.loads((folder / "modules.json").read_text())
    modules[1]["path"] = "../elsewhere"
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(CheckpointError, match=r"'\.\./elsewhere', which lies outside"):
        open_checkpoint(folder)


def test_a_module_of_somebody_else_is_refused_by_name(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "x")
    write_modules(folder, "custom_st.Transformer", "sentence_transformers.models.Pooling")
    with pytest.raises(CheckpointError, match=r"a custom_st\.Transformer module"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("config.json", {"model_type": "unheard_of"}, "does not know the model type 'unheard_of'"),
        (
            "config.json",
            {"model_type": "unheard_of", "auto_map": {"AutoModel": "x.Y"}},
            "runs only with --trust-remote-code",
        ),
        ("config.json", {"vision_config": {}}, "whose text tower cannot be taken out"),
        ("config.json", {"quantization_config": {"bits": 4}}, "has a quantization_config"),
        ("config.json", {"model_type": "vit", "vocab_size": None}, "has no vocab_size"),
        ("config.json", {"model_type": None}, "names no model_type"),
        ("config.json", {"num_hidden_layers": 5}, "says 5 layers in config.json and holds 4"),
        ("config.json", {"num_hidden_layers": 3}, "says 3 layers in config.json and holds 4"),
        ("config.json", {"model_type": "llama"}, r"holds no tensor named layers\.0\."),
        ("1_Pooling/config.json", {"pooling_mode": "median"}, "pools by 'median'"),
        ("sentence_bert_config.json", {"query_length": 8}, "sets query_length"),
        (
            "sentence_bert_config.json",
            {"processing_kwargs": {"text": {"add_special_tokens": False}}},
            "changes how text is tokenized",
        ),
        (
            "sentence_bert_config.json",
            {"modality_config": {"text": {"method": "forward", "method_output_name": "logits"}}},
            "does not pool the last hidden state",
        ),
        ("config_sentence_transformers.json", {"default_prompt_name": "x"}, "default prompt 'x'"),
        ("config_sentence_transformers.json", {"prompts": ["x"]}, "not an object of names"),
        ("sentence_bert_config.json", {"modality_config": "text"}, "does not pool the last"),
        (
            "sentence_bert_config.json",
            {
                "modality_config": {
                    "text": {"method": "forward", "method_output_name": "last_hidden_state"},
                    "message": {"method": "forward", "method_output_name": "last_hidden_state"},
                }
            },
            "wrapped in a chat template",
        ),
        ("2_Dense/config.json", {"in_features": None}, "has no integer in_features"),
        ("2_Dense/config.json", {"use_residual": True}, "a Dense with a residual"),
        ("2_Dense/config.json", {"module_input_name": "token_embeddings"}, "a Dense on 'token_em"),
        ("2_Dense/config.json", {"activation_function": "x.Swoosh"}, r"activation 'x\.Swoosh'"),
        ("2_Dense/config.json", {"in_features": 31}, "takes 31 values and gets 32"),
        ("2_Dense/config.json", {"out_features": 9}, "does not hold the weights"),
    ],
)
def test_a_setting_that_cannot_be_honoured_is_refused(
    name: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = tiny_checkpoint(tmp_path / "x", head=[torch.nn.Linear(HIDDEN, 8)])
    edit_json(folder / name, **changes)
    with pytest.raises(CheckpointError, match=message) as raised:
        open_checkpoint(folder)
    assert "\n" not in str(raised.value)


def test_prompts_that_are_left_out_of_pooling_are_refused_and_the_flag_alone_is_kept(
    tmp_path: Path,
) -> None:
    plain = tiny_checkpoint(tmp_path / "plain")
    edit_json(plain / "1_Pooling" / "config.json", include_prompt=False)
    sub = slice_checkpoint(open_checkpoint(plain), 2, 16, tmp_path / "sub")
    stored = json.loads((sub.path / "1_Pooling" / "config.json").read_text())
    assert stored["include_prompt"] is False
    assert not sub.pooling.include_prompt
    edit_json(plain / "config_sentence_transformers.json", prompts={"query": "find: "})
    with pytest.raises(CheckpointError, match="leaves its prompts out of pooling"):
        open_checkpoint(plain)


def test_a_bidirectional_decoder_is_refused_where_transformers_ignores_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_checkpoint(tmp_path / "x", "qwen3", config={"is_causal": False})
    monkeypatch.setattr("transformers.__version__", "4.57.6")
    with pytest.raises(CheckpointError, match=r"install transformers 5\.2 or newer"):
        open_checkpoint(folder)


def remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def truncate_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def pickle_weights(folder: Path) -> None:
    model = transformers.AutoModel.from_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    remove_weights(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_weights, "model.safetensors is missing"),
        (truncate_weights, "truncated or corrupt"),
        (pickle_weights, "pass --allow-pickle"),
        (lambda folder: (folder / "config.json").unlink(), r"has no config\.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "is not valid JSON"),
        (lambda folder: (folder / "modules.json").write_text("{}"), "starts with nothing"),
        (lambda folder: (folder / "modules.json").write_text("[1]"), "not a list of modules"),
        (lambda folder: (folder / "1_Pooling" / "config.json").unlink(), "the pooling is unknown"),
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), "names no base_model"),
    ],
)
def test_a_damaged_folder_gives_one_sentence(
    damage: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    folder = tiny_checkpoint(tmp_path / "x")
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as raised:
        open_checkpoint(folder)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["./nowhere", "no/such/folder", "nobody/no-such-model", "a b"])
def test_a_path_that_is_no_model_is_a_usage_error(name: str) -> None:
    with pytest.raises(UsageError, match=name):
        open_checkpoint(name)


def test_an_empty_folder_and_a_file_are_no_model(tmp_path: Path) -> None:
    for pooling in (None, "mean"):
        with pytest.raises(CheckpointError, match=r"has no config\.json, so it is not the folder"):
            open_checkpoint(tmp_path, pooling=pooling)
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is a file"):
        open_checkpoint(tmp_path / "file")
