"""The artifact folder: its specification survives, and its space_id follows what vectors mean."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_artifact import letter_tokenizer, tiny_artifact, tiny_ranges, tiny_spec

from m2dexport.errors import UsageError
from m2dexport.precisions import BIT_ORDERS, ISAS
from m2dexport.runtime.artifact import (
    RANGES,
    SPEC,
    read_ranges,
    read_spec,
    require_same_space,
    space_id_of,
    space_id_of_artifact,
    spec_from_json,
)
from m2dexport.vectors.codecs import Ranges

BASE: dict[str, Any] = {
    "weights_sha256": "a" * 64,
    "layers": 2,
    "dim": 12,
    "weights": "fp32",
    "isa": "portable",
    "fitted_to": None,
    "kept_sha256": None,
    "vectors": "int8",
    "codec": 1,
    "bit_order": "big",
    "ranges": tiny_ranges(12),
    "pooling": ["mean"],
    "final_norm": "none",
    "prompts": {"query": "find: ", "document": ""},
    "default_prompt": None,
    "tokenizer_json": letter_tokenizer(16),
    "max_length": 16,
}
OTHER_RANGES = Ranges(BASE["ranges"].low, np.nextafter(BASE["ranges"].high, np.float32(1)))


@pytest.mark.parametrize(
    "change",
    [
        {"weights_sha256": "b" * 64},
        {"layers": 3},
        {"dim": 11},
        {"weights": "int8"},
        {"fitted_to": "c" * 64},
        {"kept_sha256": "d" * 64},
        {"vectors": "ubinary"},
        {"codec": 2},
        {"ranges": None},
        {"ranges": OTHER_RANGES},
        {"pooling": ["cls"]},
        {"pooling": ["mean", "cls"]},
        {"final_norm": "skipped"},
        {"prompts": {"query": "find:", "document": ""}},
        {"prompts": {"question": "find: ", "document": ""}},
        {"default_prompt": "query"},
        {"tokenizer_json": letter_tokenizer(15)},
        {"max_length": 15},
    ],
    ids=lambda change: next(iter(change)),
)
def test_space_id_changes_with_each_ingredient(change: dict[str, Any]) -> None:
    assert space_id_of(**BASE | change) != space_id_of(**BASE)


def test_space_id_does_not_follow_key_order_or_json_layout() -> None:
    same = {
        "prompts": {"document": "", "query": "find: "},
        "tokenizer_json": json.dumps(json.loads(BASE["tokenizer_json"]), indent=4, sort_keys=True),
    }
    assert space_id_of(**BASE | same) == space_id_of(**BASE)


def test_space_id_follows_the_isa_of_int8_weights_alone() -> None:
    for weights, same in (("int8", False), ("int8-dynamic", True), ("fp32", True)):
        ids = {space_id_of(**BASE | {"weights": weights, "isa": isa}) for isa in ISAS}
        assert (len(ids) == 1) == same


def test_space_id_follows_the_bit_order_of_packed_vectors_alone() -> None:
    for vectors, same in (("ubinary", False), ("int4", False), ("int8", True)):
        ids = {space_id_of(**BASE | {"vectors": vectors, "bit_order": b}) for b in BIT_ORDERS}
        assert (len(ids) == 1) == same


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"layers": 2}, "layers (1, 2)"),
        ({"vectors": "int4", "bit_order": "little"}, "vectors ('float32', 'int4'), bit_order"),
        ({"prompts": {}}, "prompts"),
        ({"provenance": {"sub_model": "other"}}, "the trained weights"),
        ({}, "tokenizer;"),
        ({"vectors": "int8"}, "vectors ('float32', 'int8')"),
    ],
)
def test_what_tells_two_spaces_apart_is_named(change: dict[str, Any], told: str) -> None:
    index = replace(tiny_spec(), space_id="m2d1-a")
    require_same_space(index, index, "v.npy", "edge.m2d")
    bundle = replace(index, **{"space_id": "m2d1-b"} | change)
    with pytest.raises(UsageError, match=re.escape(told)) as refused:
        require_same_space(index, bundle, "v.npy", "edge.m2d")
    assert "v.npy (space m2d1-a) and edge.m2d (space m2d1-b)" in str(refused.value)


def test_space_id_of_a_known_space_is_pinned() -> None:
    """A stored id must mean the same space in every later version."""
    known = BASE | {"tokenizer_json": "{}", "ranges": None, "vectors": "float32"}
    assert space_id_of(**known) == "m2d1-4bfbe7335021f90d8a3b8e819253b4e3"


def test_space_id_does_not_follow_folders_or_notes(tmp_path: Path) -> None:
    one = tiny_artifact(tmp_path / "one", tiny_spec())
    noted = replace(tiny_spec(), parity={"max_difference": 1.0}, trained=True, coverage=0.5)
    other = tiny_artifact(tmp_path / "else where", noted)
    assert read_spec(one).space_id == read_spec(other).space_id


def test_an_artifact_of_other_weights_has_another_space_id(tmp_path: Path) -> None:
    ids = {read_spec(tiny_artifact(tmp_path / str(seed), seed=seed)).space_id for seed in (0, 1)}
    assert len(ids) == 2


def test_a_specification_without_its_weights_hash_has_no_space_id() -> None:
    spec = replace(tiny_spec(), provenance={})
    with pytest.raises(UsageError, match="hash of its weights"):
        space_id_of_artifact(spec, None, "{}")


def test_specification_and_ranges_survive_the_folder(tmp_path: Path) -> None:
    folder = tiny_artifact(tmp_path / "a", tiny_spec(vectors="int8"))
    spec = read_spec(folder)
    assert spec_from_json(spec.to_json(), "here") == spec
    ranges = read_ranges(folder)
    assert ranges is not None
    assert ranges.sha256() == tiny_ranges(12).sha256()
    (folder / RANGES).unlink()
    assert read_ranges(folder) is None


def test_a_folder_without_specification_is_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not an artifact"):
        read_spec(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '{"format": 1}', "[" * 100_000])
def test_a_damaged_specification_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / SPEC).write_text(text)
    with pytest.raises(UsageError, match=r"artifact\.json is not an artifact specification"):
        read_spec(tmp_path)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"format": 2}, "has format 2"),
        ({"engine": "abacus"}, "engine 'abacus'"),
        ({"vectors": "int3"}, "vectors 'int3'"),
        ({"bit_order": "middle"}, "bit_order 'middle'"),
        ({"codec": 2}, "codec version 2 and this m2dexport reads version 1"),
        ({"dim": 0}, "dim 0"),
        ({"max_length": "16"}, "max_length '16'"),
        ({"prompts": {"query": None}}, "a prompt"),
        ({"default_prompt": "answer"}, "default prompt 'answer'"),
    ],
)
def test_unknown_values_are_named(change: dict[str, Any], told: str) -> None:
    stored = json.loads(tiny_spec().to_json()) | change
    with pytest.raises(UsageError, match=told):
        spec_from_json(json.dumps(stored), "artifact.json")
