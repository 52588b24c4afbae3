from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub.utils import filter_repo_objects
from hypothesis import given
from hypothesis import strategies as st
from tiny import HIDDEN, LAYERS, edit_json, tiny_checkpoint

from m2dexport.build.aligned import build_aligned
from m2dexport.build.build import build_artifact
from m2dexport.checkpoint.folder import NOT_FETCHED
from m2dexport.checkpoint.open import Checkpoint, open_checkpoint
from m2dexport.checkpoint.trained import grid_text, parse_grid
from m2dexport.errors import UsageError
from m2dexport.profile.plan import Plan, require_plan
from m2dexport.slice.slicing import slice_checkpoint, slice_grid
from m2dexport.vectors.pairs import StsTask

CARD = """---
library_name: sentence-transformers
tags: {tags}
---
# A model
* Loss: <code>{loss}</code> with these parameters:
  ```json
  {config}
  ```
"""
EVERY_DEPTH = range(1, LAYERS + 1)


@pytest.mark.parametrize(
    ("text", "pairs"),
    [
        ("2:32,4:64", {(2, 32), (4, 64)}),
        ("1-3:32,64", {(n, d) for n in (1, 2, 3) for d in (32, 64)}),
        ("1-2:32,4:64,16", {(1, 32), (2, 32), (4, 64), (4, 16)}),
        ("1,3,5-6:32", {(1, 32), (3, 32), (5, 32), (6, 32)}),
        ("1,2:32; 6:64,16", {(1, 32), (2, 32), (6, 64), (6, 16)}),
        (" 2 : 32 , 2:32 ", {(2, 32)}),
    ],
)
def test_depths_times_dims_are_declared_in_short(text: str, pairs: set[tuple[int, int]]) -> None:
    assert parse_grid(text, 6, 64) == tuple(sorted(pairs))


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "''"),
        ("2", "'2'"),
        ("1-6", "'1-6'"),
        ("6-1:32", "'6-1:32'"),
        ("1-:32", "'1-:32'"),
        ("-1:32", "'-1:32'"),
        ("1:32,2-3", "'2-3'"),
        ("1:32;", "''"),
        ("1:32:64", "'1:32:64'"),
        ("1:32,x", "'x'"),
        ("1:3.2", "'1:3.2'"),
    ],
)
def test_a_declaration_that_cannot_be_read_is_refused_by_its_part(text: str, part: str) -> None:
    with pytest.raises(UsageError, match="is not depths:dims, as in") as raised:
        parse_grid(text, 6, 64)
    assert part in str(raised.value)


@pytest.mark.parametrize("text", ["7:32", "1-7:32", "0-2:32", "0:32", "2:65", "2:32,65", "2:0"])
def test_a_declared_cell_outside_the_checkpoint_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="outside the checkpoint's 6 layers and 64 dims"):
        parse_grid(text, 6, 64)


@given(st.sets(st.tuples(st.integers(1, 12), st.integers(1, 40)), min_size=1))
def test_a_grid_is_read_as_it_is_written(pairs: set[tuple[int, int]]) -> None:
    grid = tuple(sorted(pairs))
    assert parse_grid(grid_text(grid), 12, 40) == grid


def test_a_grid_of_all_pairs_is_written_in_short() -> None:
    grid = tuple((n, d) for n in range(1, 7) for d in (32, 64))
    assert grid_text(grid) == "1-6:32,64"
    assert grid_text(((6, 1), (11, 1), (22, 1), (22, 2))) == "6,11:1;22:1,2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 4 layers and 32 dims, to which the tests add files and remove them again."""
    return tiny_checkpoint(tmp_path_factory.mktemp("trained") / "m")


def opened(folder: Path, files: dict[str, str | dict[str, Any]]) -> Checkpoint:
    """Return the checkpoint with some files added; of JSON files that exist, keys are added."""
    before = {}
    for name, content in files.items():
        path = folder / name
        before[path] = path.read_text() if path.exists() else None
        path.parent.mkdir(exist_ok=True)
        if isinstance(content, dict):
            edit_json(path, **content)
        else:
            path.write_text(content)
    try:
        return open_checkpoint(folder)
    finally:
        for path, content in before.items():
            path.unlink() if content is None else path.write_text(content)


def card(
    tags: list[str] | None = None, loss: str = "", config: dict[str, Any] | None = None
) -> str:
    text = CARD.replace("{tags}", json.dumps(tags or [])).replace("{loss}", loss)
    return text.replace("{config}", json.dumps(config or {}, indent=4))


def test_starbucks_pairs_are_read_from_its_loss_which_counts_layers_from_zero(
    folder: Path,
) -> None:
    # What its get_config_dict gives for layers [1, 2, 4] and dims [8, 16, 32].
    config = {
        "loss": "MatryoshkaLoss",
        "matryoshka_layers": [0, 1, 3],
        "matryoshka_dims": [8, 16, 32],
    }
    checkpoint = opened(folder, {"README.md": card([], "starbucks_loss.StarbucksLoss", config)})
    assert checkpoint.trained == ((1, 8), (2, 16), (4, 32))
    assert checkpoint.sources["trained"] == "README.md"
    assert checkpoint.assumed == ()


def test_the_depths_that_semantic_router_ships_are_read_with_the_dims_of_a_config(
    folder: Path,
) -> None:
    exported = {"model_name": "x", "total_layers": 4, "hidden_size": 32, "available_layers": [1, 3]}
    files = {"onnx/model_config.json": exported, "config.json": {"matryoshka_dims": [32, 8]}}
    checkpoint = opened(folder, files)
    assert checkpoint.trained == tuple((n, d) for n in (1, 3, 4) for d in (8, 32))
    assert checkpoint.sources["trained"] == "onnx/model_config.json and config.json"
    assert checkpoint.assumed == ()


def test_depths_whose_dims_nothing_lists_are_said_and_not_guessed(folder: Path) -> None:
    exported = {"available_layers": [1, 3, 4]}
    tagged = card(["sentence-transformers", "2d-matryoshka"])
    files = {"onnx/model_config.json": exported, "README.md": tagged}
    checkpoint = opened(folder, files)
    assert checkpoint.trained is None
    assert checkpoint.sources["trained"] == "unknown"
    (sentence,) = checkpoint.assumed
    assert "--trained 1,3,4:D,... declares it" in sentence
    # Without the tag, nothing speaks of other dims than the full one.
    checkpoint = opened(folder, {"onnx/model_config.json": exported})
    assert checkpoint.trained == ((1, HIDDEN), (3, HIDDEN), (4, HIDDEN))
    assert "only the full width of 32 counts as trained" in checkpoint.assumed[0]


def test_where_card_and_config_disagree_the_config_is_taken_and_both_are_said(
    folder: Path,
) -> None:
    loss = card([], "Matryoshka2dLoss", {"loss": "CoSENTLoss", "matryoshka_dims": [32, 16]})
    files = {"README.md": loss, "model_config.json": {"available_layers": [2, 4]}}
    checkpoint = opened(folder, files)
    assert checkpoint.trained == ((2, 16), (2, 32), (4, 16), (4, 32))
    assert checkpoint.assumed == (
        "README.md says that the depths 1-4 were trained, model_config.json 2, 4; the latter are "
        "taken.",
    )


def test_what_is_listed_beyond_the_weights_is_left_out_and_said(folder: Path) -> None:
    exported = {"total_layers": 22, "available_layers": [2, 6]}
    dims = {"matryoshka_dimensions": [64, 16, 32, "all", True]}
    files = {"onnx/model_config.json": exported, "config_sentence_transformers.json": dims}
    checkpoint = opened(folder, files)
    assert checkpoint.trained == ((2, 16), (2, 32), (4, 16), (4, 32))
    said = " ".join(checkpoint.assumed)
    assert "says that the model has 22 layers; its weights hold 4" in said
    assert "lists the depths 6, which lie outside the checkpoint's 4" in said
    assert "lists the dims 64, which lie outside the checkpoint's 32" in said


@pytest.mark.parametrize(
    ("tags", "trained", "said"),
    [
        (["loss:AdaptiveLayerLoss", "loss:CoSENTLoss"], [(n, HIDDEN) for n in EVERY_DEPTH], None),
        (["loss:Matryoshka2dLoss", "loss:MatryoshkaLoss"], None, "--trained 1-4:D,... declares"),
        (["loss:Matryoshka2dLoss", "2d-matryoshka"], None, "--trained 1-4:D,... declares"),
        (["loss:MatryoshkaLoss"], None, "--trained 4:D,... declares"),
        (["loss:StarbucksLoss"], None, "--trained N,...:D,... declares"),
        (["loss:MultipleNegativesRankingLoss"], None, None),
    ],
)
def test_the_tags_of_a_card_that_lists_no_loss_are_read(
    tags: list[str], trained: list[tuple[int, int]] | None, said: str | None, folder: Path
) -> None:
    checkpoint = opened(folder, {"README.md": card(tags)})
    assert checkpoint.trained == (tuple(trained) if trained else None)
    assert [said in sentence for sentence in checkpoint.assumed if said] == [True] * bool(said)
    assert len(checkpoint.assumed) == bool(said)


def test_a_card_that_is_no_card_says_nothing(folder: Path) -> None:
    for text in ("---\ntags: [\n---\n", "---\n- 1\n---\n", "---\ntags: 5\n---\n", "\x00"):
        checkpoint = opened(folder, {"README.md": text})
        assert (checkpoint.trained, checkpoint.assumed) == (None, ())


def test_of_a_hubs_onnx_folder_the_list_of_depths_alone_is_fetched() -> None:
    names = ("config.json", "onnx/model_config.json", "onnx/tokenizer.json", "onnx/model.onnx")
    more = ("onnx/model.onnx.data", "onnx/model.onnx_data", "onnx/layer-6/model.onnx")
    fetched = filter_repo_objects((*names, *more), ignore_patterns=list(NOT_FETCHED))
    assert list(fetched) == ["config.json", "onnx/model_config.json"]


@pytest.mark.parametrize(("layers", "dim"), [(LAYERS + 1, 8), (-1, 8), (2, HIDDEN + 1), (2, 0)])
def test_an_unknown_cell_is_an_error_wherever_it_is_asked_for(
    layers: int, dim: int, folder: Path, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(folder)
    out = tmp_path / "out"
    task = StsTask("sts", ("a", "b"), ("c", "d"), np.array([0.0, 1.0]), "0" * 64)
    asked: list[Callable[[], object]] = [
        lambda: slice_checkpoint(checkpoint, layers, dim, out),
        lambda: slice_grid(checkpoint, [1, layers], [8, dim], out),
        lambda: build_artifact(checkpoint, layers, dim, out),
        lambda: build_aligned(checkpoint, layers, dim, out),
        lambda: require_plan(checkpoint, Plan((1, layers), (8, dim), align=("none",)), [task]),
    ]
    for ask in asked:
        with pytest.raises(UsageError, match=rf"{layers if dim == 8 else dim}"):
            ask()
    assert not out.exists()
