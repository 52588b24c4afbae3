"""Aligned sub-models: shallower, and in the space of the full depth's vectors."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import by_hand
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from command_line import m2d
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from test_ridge import Rows, closed_form
from test_slicing import CLOSE, encode, families, files
from test_towers import nv_embed
from threadpoolctl import threadpool_limits
from tiny import FAMILIES, HIDDEN, LAYERS, TEXTS, edit_json, tiny_checkpoint

from m2dexport.align.texts import align_texts, prompted, prompts_of, sha256_of_texts
from m2dexport.checkpoint.open import open_checkpoint
from m2dexport.data import align_texts_path
from m2dexport.errors import CheckpointError
from m2dexport.reference.pooler import Reference
from m2dexport.runtime import load

Floats = NDArray[np.float32]
Slice = Callable[..., Path]
DEPTH, DIM = 2, 16


@pytest.fixture
def aligned(few_texts: Path, tmp_path: Path) -> Slice:
    """From a checkpoint to its aligned sub-model of 2 layers and 16 dims."""

    def sliced(model: Path, *options: object, out: str = "sub") -> Path:
        return cut(model, tmp_path / out, "--align", "--align-texts", few_texts, *options)

    return sliced


@pytest.fixture(scope="module")
def of_bert(bert: Path, few_texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The aligned sub-model of the tiny BERT; read only."""
    out = tmp_path_factory.mktemp("aligned") / "sub"
    return cut(bert, out, "--align", "--align-texts", few_texts)


def cut(model: Path, out: Path, *options: object, dim: int = DIM) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers loads no heads that its config cannot state
        arguments = ["--layers", DEPTH, "--dim", dim, *options]
        result = m2d("slice", "--model", model, *arguments, "--out", out)
    assert result.exit_code == 0, result.output
    return out


def refused(*arguments: object) -> str:
    result = m2d(*arguments)
    assert result.exit_code in (1, 2), result.output
    (line,) = (line for line in result.stderr.splitlines() if not line.startswith("Assumed: "))
    return line


def stored_map(folder: Path) -> tuple[Floats, Floats]:
    """Return weight and bias of the Dense between the two Normalize."""
    types = [module["type"].rpartition(".")[2] for module in modules_of(folder)]
    assert types[-3:] == ["Normalize", "Dense", "Normalize"]
    dense = modules_of(folder)[-2]["path"]
    found = safetensors.numpy.load_file(folder / dense / "model.safetensors")
    return found["linear.weight"].astype(np.float32), found["linear.bias"].astype(np.float32)


def modules_of(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "modules.json").read_text())  # type: ignore[no-any-return]


def mapped(folder: Path, wide: Floats) -> Floats:
    weight, bias = stored_map(folder)
    return by_hand.normalized(by_hand.normalized(wide) @ weight.T + bias)


def referenced(sub: Path, texts: Any = TEXTS) -> Floats:
    checkpoint = open_checkpoint(sub, trust_remote_code=True)
    found = Reference(checkpoint, (checkpoint.layers,)).encode(list(texts))[checkpoint.layers]
    return by_hand.normalized(found)


def provenance(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "m2dexport.json").read_text())["alignment"]  # type: ignore[no-any-return]


def nearer(sub: Path, parent: Path) -> bool:
    """Say whether the map brings texts that it was not fitted to nearer to the full depth."""
    unseen = align_texts_path().read_text(encoding="utf-8").splitlines()[3::36]
    found = Reference(open_checkpoint(parent), (DEPTH, LAYERS)).encode(unseen)
    full = found[LAYERS][:, :DIM]
    return mean_cosine(referenced(sub, unseen), full) > mean_cosine(found[DEPTH][:, :DIM], full)


def mean_cosine(a: Floats, b: Floats) -> float:
    return float((by_hand.normalized(a) * by_hand.normalized(b)).sum(axis=1).mean())


@families
def test_every_family_is_aligned_as_computed_by_hand(
    model_type: str, aligned: Slice, tmp_path: Path
) -> None:
    mode = "lasttoken" if FAMILIES[model_type][1] == "decoder" else "mean"
    parent = tiny_checkpoint(tmp_path / "parent", model_type, pooling=mode)
    sub = aligned(parent)
    wide = by_hand.vectors(parent, TEXTS, DEPTH, HIDDEN, [mode])
    expected = mapped(sub, wide)
    np.testing.assert_allclose(encode(sub), expected, atol=CLOSE)
    np.testing.assert_allclose(referenced(sub), expected, atol=CLOSE)
    assert (open_checkpoint(sub).layers, open_checkpoint(sub).dim) == (DEPTH, DIM)
    assert open_checkpoint(sub).final_norm == open_checkpoint(parent).final_norm


HEADS: dict[str, dict[str, Any]] = {
    "dense": {"head": [torch.nn.Linear(HIDDEN, 24)]},
    "narrow dense": {"head": [torch.nn.Linear(HIDDEN, DIM)]},
    "two dense": {"head": [torch.nn.Linear(HIDDEN, 48, bias=False), torch.nn.Linear(48, 20)]},
    "layer norm": {"head": [torch.nn.LayerNorm(HIDDEN)]},
    "two poolings": {"pooling": ("mean", "cls")},
    "last token": {"pooling": "lasttoken", "model_type": "qwen3"},
    "no normalize": {"normalize": False},
}


@pytest.mark.parametrize("name", HEADS)
def test_a_map_follows_the_whole_head(name: str, aligned: Slice, tmp_path: Path) -> None:
    parent = tiny_checkpoint(tmp_path / "parent", **HEADS[name])
    sub = aligned(parent)
    checkpoint = open_checkpoint(parent)
    wide = Reference(checkpoint, (DEPTH,)).encode(TEXTS)[DEPTH]
    assert wide.shape[1] == checkpoint.dim == stored_map(sub)[0].shape[1]
    np.testing.assert_allclose(encode(sub), mapped(sub, wide), atol=CLOSE)
    np.testing.assert_allclose(referenced(sub), encode(sub), atol=CLOSE)
    assert nearer(sub, parent)


def test_the_map_stands_between_two_normalize_behind_the_head(
    aligned: Slice, tmp_path: Path
) -> None:
    head = [torch.nn.Linear(HIDDEN, 24), torch.nn.LayerNorm(24)]
    sub = aligned(tiny_checkpoint(tmp_path / "parent", head=head))
    types = [module["type"].rpartition(".")[2] for module in modules_of(sub)]
    kinds = ["Transformer", "Pooling", "Dense", "LayerNorm", "Normalize", "Dense", "Normalize"]
    assert types == kinds
    config = json.loads((sub / modules_of(sub)[5]["path"] / "config.json").read_text())
    assert config == {
        "in_features": 24,
        "out_features": DIM,
        "bias": True,
        "activation_function": "torch.nn.modules.linear.Identity",
    }


TWO = {"num_hidden_layers": 2}


def latent(folder: Path) -> Path:
    if transformers.__version__ < "5.2":
        pytest.skip("this transformers ignores is_causal")
    plain = tiny_checkpoint(folder / "plain", "mistral", config={**TWO, "is_causal": False})
    nv_embed(folder / "nv", plain)
    return folder / "nv"


MADE: dict[str, Callable[[Path], Path]] = {
    "prompts": lambda m: tiny_checkpoint(m / "m", config=TWO, prompts={"query": "find: "}),
    "dense": lambda m: tiny_checkpoint(m / "m", config=TWO, head=[torch.nn.Linear(HIDDEN, 24)]),
    "pre-norm": lambda m: tiny_checkpoint(m / "m", "qwen3", config=TWO, pooling="lasttoken"),
    "latent": latent,
}


@pytest.mark.parametrize("name", MADE)
def test_sentence_transformers_torch_and_the_artifact_give_the_same_vectors(
    name: str, aligned: Slice, tmp_path: Path
) -> None:
    sub = aligned(MADE[name](tmp_path), "--layers", 1)
    result = m2d("build", "--model", sub, "--out", tmp_path / "a")
    assert result.exit_code == 0, result.output
    model = SentenceTransformer(str(sub), device="cpu", trust_remote_code=name == "latent")
    encoder = load(tmp_path / "a")
    np.testing.assert_allclose(referenced(sub), model.encode(list(TEXTS)), atol=CLOSE)
    np.testing.assert_allclose(encoder.encode(TEXTS), model.encode(list(TEXTS)), atol=1e-4)
    for prompt in encoder.spec.prompts:
        expected = model.encode(list(TEXTS), prompt_name=prompt)
        np.testing.assert_allclose(encoder.encode(TEXTS, prompt=prompt), expected, atol=1e-4)


def test_openvino_runs_an_aligned_artifact(bert: Path, aligned: Slice, tmp_path: Path) -> None:
    sub = aligned(bert, "--layers", 1)
    assert m2d("build", "--model", sub, "--engine", "openvino", "--out", tmp_path / "a").stdout
    np.testing.assert_allclose(load(tmp_path / "a").encode(TEXTS), encode(sub), atol=1e-4)


@pytest.mark.parametrize(
    ("model_type", "options", "close"),
    [
        ("bert", [], 1e-4),
        ("bert", ["--heads", 2, "--ffn", 20], 1e-4),
        ("qwen3", ["--heads", 2, "--reorder-by-importance", "TEXTS"], 1e-4),
        ("bert", ["--dtype", "fp16"], 3e-3),
        ("roberta", ["--prune-vocab", "TEXTS"], 1e-4),
        ("qwen3", ["--final-norm", "skipped"], 1e-4),
    ],
    ids=str,
)
def test_the_map_is_fitted_to_what_the_sub_model_computes(
    model_type: str,
    options: list[object],
    close: float,
    few_texts: Path,
    aligned: Slice,
    tmp_path: Path,
) -> None:
    options = [few_texts if each == "TEXTS" else each for each in options]
    prompts = {"query": "find: ", "document": ""}
    parent = tiny_checkpoint(tmp_path / "parent", model_type, prompts=prompts)
    sub = aligned(parent, *options)
    plain = open_checkpoint(cut(parent, tmp_path / "plain", *options, dim=HIDDEN))
    whole = open_checkpoint(parent)
    texts = list(prompted(align_texts(few_texts), prompts_of(whole)))
    assert [text.startswith("find: ") for text in texts[:4]] == [False, True, False, True]
    inputs = by_hand.normalized(Reference(plain, (DEPTH,)).encode(texts)[DEPTH])
    targets = by_hand.normalized(Reference(whole, (LAYERS,)).encode(texts)[LAYERS][:, :DIM])
    strength = provenance(sub)["strength"]
    expected = closed_form(Rows(inputs, targets, 0), strength, intercept=True)
    weight, bias = stored_map(sub)
    np.testing.assert_allclose(inputs @ weight.T + bias, expected(inputs), atol=close)
    assert provenance(sub)["cosine_after"] > provenance(sub)["cosine_before"]


def test_a_sub_model_says_what_its_map_was_fitted_to(of_bert: Path, few_texts: Path) -> None:
    found = provenance(of_bert)
    texts = align_texts(few_texts)
    assert found["texts"] == len(list(texts))
    assert found["texts_sha256"] == sha256_of_texts(texts)
    assert found["full_model"]["layers"] == LAYERS
    assert found["cosine_before"] < found["cosine_after"] <= 1


def test_dims_of_an_aligned_sub_model_can_be_cut_once_more(of_bert: Path, tmp_path: Path) -> None:
    again = cut(of_bert, tmp_path / "again", dim=6)
    expected = by_hand.normalized(encode(of_bert)[:, :6])
    np.testing.assert_allclose(encode(again), expected, atol=CLOSE)
    np.testing.assert_allclose(referenced(again), expected, atol=CLOSE)
    assert stored_map(again)[0].shape == (6, HIDDEN)
    assert "alignment" not in json.loads((again / "m2dexport.json").read_text())


@pytest.mark.parametrize("options", [[], ["--dtype", "fp16"], ["--dtype", "bf16"]])
def test_slicing_an_aligned_sub_model_to_itself_changes_no_byte(
    options: list[str], bert: Path, aligned: Slice, tmp_path: Path
) -> None:
    once = aligned(bert, *options)
    first, second = files(once), files(cut(once, tmp_path / "twice"))
    assert provenance(once) == provenance(tmp_path / "twice")
    assert first.pop("m2dexport.json") != second.pop("m2dexport.json")  # another parent
    assert first == second


@pytest.mark.parametrize(
    "options",
    [
        ["--layers", 1],
        ["--layers", 0],
        ["--heads", 2],
        ["--ffn", 20],
        ["--reorder-by-importance", "TEXTS"],
    ],
    ids=str,
)
def test_what_an_aligned_sub_model_computes_cannot_be_changed(
    options: list[object], of_bert: Path, few_texts: Path, tmp_path: Path
) -> None:
    options = [few_texts if each == "TEXTS" else each for each in options]
    told = refused("slice", "--model", of_bert, *options, "--out", tmp_path / "out")
    fitted = "ends in a map that was fitted to its own vectors; align again by slicing"
    assert fitted in told or "is aligned already" in told


def test_a_map_is_kept_only_with_the_weights_that_it_was_fitted_for(
    of_bert: Path, tmp_path: Path
) -> None:
    changed = Path(copytree(of_bert, tmp_path / "changed"))
    path = next(changed.glob("*_Dense")) / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    safetensors.numpy.save_file({name: -values for name, values in tensors.items()}, path)
    told = refused("build", "--model", changed, "--out", tmp_path / "out")
    assert "have changed since its map was fitted; align again" in told
    assert not (tmp_path / "out").exists()


def test_the_final_norm_of_an_aligned_sub_model_cannot_be_changed(
    qwen3: Path, aligned: Slice, tmp_path: Path
) -> None:
    arguments = ["--model", aligned(qwen3), "--final-norm", "skipped", "--out", tmp_path / "out"]
    assert "ends in a map that was fitted" in refused("slice", *arguments)


@pytest.mark.parametrize(
    ("command", "layers"), [("slice", LAYERS), ("slice", f"1,{LAYERS}"), ("build", LAYERS)]
)
def test_aligning_the_full_depth_is_refused(
    command: str, layers: object, bert: Path, few_texts: Path, tmp_path: Path
) -> None:
    arguments = ["--layers", layers, "--align", "--align-texts", few_texts]
    told = refused(command, "--model", bert, *arguments, "--out", tmp_path / "out")
    assert f"depth {LAYERS} is the full depth, whose map is the identity" in told
    assert not (tmp_path / "out").exists()


def test_depth_0_beside_others_needs_align(bert: Path, tmp_path: Path) -> None:
    told = refused("slice", "--model", bert, "--layers", "0,1", "--out", tmp_path / "out")
    assert "--layers 0 is always aligned, and the other depths only with --align" in told


def test_vectors_that_keep_their_norms_are_aligned_when_normalized(
    few_texts: Path, aligned: Slice, tmp_path: Path
) -> None:
    parent = tiny_checkpoint(tmp_path / "parent", normalize=False)
    edit_json(parent / "config_sentence_transformers.json", similarity_fn_name="dot")
    arguments = ["--layers", DEPTH, "--align", "--align-texts", few_texts, "--out", tmp_path / "x"]
    told = refused("slice", "--model", parent, *arguments)
    assert "keep their norms; slice --normalize --align makes" in told
    sub = aligned(parent, "--normalize")
    np.testing.assert_allclose(np.linalg.norm(encode(sub), axis=1), 1, atol=1e-6)


def test_too_few_texts_are_refused_before_anything_is_written(bert: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(f"text {number}" for number in range(60)) + "\n")
    arguments = ["--layers", 1, "--align", "--align-texts", texts, "--out", tmp_path / "out"]
    told = refused("slice", "--model", bert, *arguments)
    assert "60 different texts are too few to align a depth; pass at least 100" in told
    assert not (tmp_path / "out").exists()


def test_a_grid_holds_what_its_pairs_are_alone(
    bert: Path, of_bert: Path, few_texts: Path, tmp_path: Path
) -> None:
    arguments = ["--layers", "0,1,2", "--dim", "8,16", "--align", "--align-texts", few_texts]
    found = m2d("slice", "--model", bert, *arguments, "--out", tmp_path / "grid")
    assert found.exit_code == 0, found.output
    names = sorted(path.name for path in (tmp_path / "grid").iterdir())
    assert names == ["0x16", "0x8", "1x16", "1x8", "2x16", "2x8"]
    assert files(tmp_path / "grid" / "2x16") == files(of_bert)


def test_a_beir_folder_is_aligned_on_its_corpus(
    bert: Path, few_texts: Path, tmp_path: Path
) -> None:
    lines = []
    (tmp_path / "beir").mkdir()
    with (tmp_path / "beir" / "corpus.jsonl").open("w", encoding="utf-8") as stream:
        for number, text in enumerate(align_texts(few_texts)):
            title, _, rest = text.strip().partition(" ")
            row = {"_id": str(number), "title": title, "text": rest}
            stream.write(json.dumps(row) + "\n")
            lines.append(f"{title} {rest}")
    (tmp_path / "texts.txt").write_text("\n".join(lines), encoding="utf-8")
    options = ["--align", "--align-texts"]
    subs = [
        cut(bert, tmp_path / out, *options, tmp_path / texts)
        for out, texts in (("1", "beir"), ("2", "texts.txt"))
    ]
    assert files(subs[0]) == files(subs[1])


def test_one_thread_and_two_give_the_same_bytes(
    small: Callable[[str], Path], few_texts: Path, tmp_path: Path
) -> None:
    arguments = ["--layers", "0,1", "--dim", 48, "--align", "--align-texts", few_texts]
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            with threadpool_limits(threads):
                out = tmp_path / str(threads)
                assert not m2d(
                    "slice", "--model", small("bert"), *arguments, "--out", out
                ).exit_code
                found.append(files(out))
                assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(1)
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"alignment": {}}, "says half of what a map was fitted to"),
        ({"alignment": {"full_model": 5}}, "says half of what a map was fitted to"),
        ({"alignment": {"full_model": {"layers": 4}}}, "says half of what a map was fitted to"),
        (
            {"alignment": {"full_model": dict.fromkeys(
                ["layers", "weights_sha256", "tokenizer_sha256", "pooling", "final_norm"], "4"
            )}},
            "says half of what a map was fitted to",
        ),
    ],
)  # fmt: skip
def test_a_damaged_provenance_is_one_sentence(
    change: dict[str, Any], told: str, of_bert: Path, tmp_path: Path
) -> None:
    sub = copytree(of_bert, tmp_path / "sub")
    edit_json(sub / "m2dexport.json", **change)
    with pytest.raises(CheckpointError, match=told) as caught:
        open_checkpoint(sub)
    assert "\n" not in str(caught.value)


def test_a_map_that_is_not_linear_is_refused(of_bert: Path, tmp_path: Path) -> None:
    sub = copytree(of_bert, tmp_path / "sub")
    config = sub / modules_of(sub)[-2]["path"] / "config.json"
    edit_json(config, activation_function="torch.nn.modules.activation.Tanh")
    with pytest.raises(CheckpointError, match="a Dense after Normalize that is not linear"):
        open_checkpoint(sub)


def test_the_hash_of_the_weights_covers_the_map(of_bert: Path, tmp_path: Path) -> None:
    sub = copytree(of_bert, tmp_path / "sub")
    before = open_checkpoint(sub).weights_sha256
    path = sub / modules_of(sub)[-2]["path"] / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    tensors["linear.bias"] = tensors["linear.bias"] + 1
    safetensors.numpy.save_file(tensors, path)
    assert open_checkpoint(sub).weights_sha256 != before
