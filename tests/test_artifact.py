"""The artifact folder: its specification survives, and its space_id follows what vectors mean."""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_artifact import GRAPH, letter_tokenizer, relisted, tiny_artifact, tiny_ranges, tiny_spec

from m2dexport.engines import Device
from m2dexport.errors import M2DError, UsageError
from m2dexport.files import SPEC
from m2dexport.precisions import BIT_ORDERS, ISAS
from m2dexport.runtime.artifact import (
    RANGES,
    TOKENIZER,
    Loss,
    Spoken,
    read_ranges,
    read_spec,
    require_same_space,
    space_id_of_artifact,
    spaces_of,
    spec_from_json,
)
from m2dexport.runtime.bundle import verify_artifact
from m2dexport.vectors.codecs import Ranges

SPACE = replace(tiny_spec(vectors="int8"), layers=2, provenance={"sub_model": "a" * 64})
RANGES_OF_12, TOKENIZER_OF_16 = tiny_ranges(12), letter_tokenizer(16)
OTHER_RANGES = Ranges(RANGES_OF_12.low, np.nextafter(RANGES_OF_12.high, np.float32(1)))


def spoken(**change: Any) -> dict[str, Any]:
    known = {"space_id": "m2d1-" + "a" * 32, "layers": 6, "weights": "fp32", "measured": {}}
    return {**known, **change}


def space_id(
    ranges: Ranges | None = RANGES_OF_12, tokenizer_json: str = TOKENIZER_OF_16, **change: Any
) -> str:
    return space_id_of_artifact(replace(SPACE, **change), ranges, tokenizer_json)


@pytest.mark.parametrize(
    "change",
    [
        {"provenance": {"sub_model": "b" * 64}},
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
    assert space_id(**change) != space_id()


def test_space_id_does_not_follow_key_order_or_json_layout() -> None:
    same = {
        "prompts": {"document": "", "query": "find: "},
        "tokenizer_json": json.dumps(json.loads(letter_tokenizer(16)), indent=4, sort_keys=True),
    }
    assert space_id(**same) == space_id()


def test_space_id_follows_the_isa_of_int8_weights_only() -> None:
    for weights, same in (("int8", False), ("int8-dynamic", True), ("fp32", True)):
        assert (len({space_id(weights=weights, isa=isa) for isa in ISAS}) == 1) == same


def test_space_id_follows_the_bit_order_of_packed_vectors_only() -> None:
    for vectors, same in (("ubinary", False), ("int4", False), ("int8", True)):
        assert (len({space_id(vectors=vectors, bit_order=b) for b in BIT_ORDERS}) == 1) == same


def test_space_id_does_not_follow_what_else_is_spoken() -> None:
    assert space_id(speaks=Spoken("m2d1-" + "a" * 32, 6, "fp32", {})) == space_id()


def test_an_encoder_queries_indexes_of_its_own_space_and_of_the_one_it_speaks() -> None:
    shared = Spoken("m2d1-" + "a" * 32, 6, "fp32", {"sts/spearman": Loss(70.5, 80)})
    whole = replace(tiny_spec(), space_id=shared.space_id)
    small = replace(tiny_spec(), space_id="m2d1-b", speaks=shared, layers=2)
    smaller = replace(tiny_spec(), space_id="m2d1-c", speaks=shared, layers=3)
    assert spaces_of(whole) == (shared.space_id,)
    assert spaces_of(small) == ("m2d1-b", shared.space_id)
    assert require_same_space(whole, small, "v.npy", "edge.m2d") == shared.space_id
    assert require_same_space(small, small, "v.npy", "edge.m2d") == "m2d1-b"
    with pytest.raises(UsageError, match=r"since they differ in layers \(2, 1\)"):
        require_same_space(small, whole, "v.npy", "edge.m2d")
    with pytest.raises(UsageError, match=r"build it with --index of the bundle that wrote v\.npy"):
        require_same_space(small, smaller, "v.npy", "edge.m2d")


def test_what_is_spoken_survives_the_specification() -> None:
    shared = Spoken("m2d1-" + "a" * 32, 6, "int8", {"sts/spearman": Loss(70.5, 80)})
    spec = replace(tiny_spec(), speaks=shared)
    assert spec_from_json(spec.to_json(), "here") == spec
    assert shared.sentence() == "sts/spearman 70.50 where the native encoder has 80.00"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"layers": 2}, "layers (1, 2)"),
        ({"vectors": "int4", "bit_order": "little"}, "vectors ('float32', 'int4'), bit_order"),
        ({"prompts": {}}, "prompts"),
        ({"provenance": {"sub_model": "other"}}, "the trained weights"),
        ({}, "tokenizer;"),
        ({"vectors": "int8"}, "vectors ('float32', 'int8')"),
        ({"prompts": {"query": "x" * 10_000}}, "prompts ({"),
        ({"isa": "vnni", "provenance": {"sub_model": "other"}}, "the trained weights;"),
    ],
)
def test_what_tells_two_spaces_apart_is_named(change: dict[str, Any], told: str) -> None:
    index = replace(tiny_spec(), space_id="m2d1-a")
    require_same_space(index, index, "v.npy", "edge.m2d")
    bundle = replace(index, **{"space_id": "m2d1-b"} | change)
    with pytest.raises(UsageError, match=re.escape(told)) as refused:
        require_same_space(index, bundle, "v.npy", "edge.m2d")
    assert "v.npy (space m2d1-a) and edge.m2d (space m2d1-b)" in str(refused.value)
    assert len(str(refused.value)) < 500


def test_space_id_of_a_known_space_is_pinned() -> None:
    """A stored id must mean the same space in every later version."""
    known = space_id(None, "{}", vectors="float32")
    assert known == "m2d1-4bfbe7335021f90d8a3b8e819253b4e3"


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


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '{"format": 4}', "[" * 100_000])
def test_a_damaged_specification_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / SPEC).write_text(text)
    relisted(tmp_path)
    with pytest.raises(UsageError, match=r"artifact\.json cannot be read: ") as refused:
        read_spec(tmp_path)
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"format": 5}, "has format 5 and this version reads format 4; upgrade"),
        ({"format": 3}, "has format 3 and this version reads format 4; make it again"),
        ({"engine": "abacus"}, "engine 'abacus'; this version has onnx"),
        ({"vectors": "int3"}, "vectors is 'int3' where one of float32, int8"),
        ({"weights": "int3"}, "weights is 'int3' where one of fp32"),
        ({"bit_order": "middle"}, "bit_order is 'middle'"),
        ({"codec": 2}, "codec version 2 and this m2dexport reads version 1"),
        ({"dim": 0}, "dim is 0 where 1 to 1048576 is needed"),
        ({"dim": 10**4000}, "dim is 1000.*0000 where a whole number is needed"),
        ({"dim": True}, "dim is True where a whole number is needed"),
        ({"max_length": "16"}, "max_length is '16'"),
        ({"prompts": {"query": None}}, r"prompts\['query'\] is None where text is needed"),
        ({"prompts": {"query": "\ud800"}}, r"prompts\['query'\] is '\\ud800' where text"),
        ({"prompts": {"\ud800": "a"}}, r"a key of prompts is '\\ud800' where text"),
        ({"prompts": []}, r"prompts is \[\] where an object is needed"),
        ({"default_prompt": "answer"}, "default prompt 'answer'"),
        ({"default_prompt": "answer" * 10_000}, "default prompt 'answer.*' without its text"),
        ({"trained": "yes"}, "trained is 'yes' where true or false is needed"),
        ({"pooling": "mean"}, "pooling is 'mean' where a list is needed"),
        ({"pooling": [["mean"]]}, r"pooling\[0\] is \['mean'\] where text is needed"),
        ({"coverage": 2}, "coverage is 2 where 0 to 1 is needed"),
        ({"fitted_to": "a" * 63}, "fitted_to is 'a.*a' where a sha256 is needed"),
        ({"space_id": "m2d1-x\n"}, "space_id is .* where a space_id is needed"),
        ({"provenance": {"torch": "\x1b[31m"}}, "where a line of text is needed"),
        ({"provenance": {"torch": "2\u202e.31"}}, "where a line of text is needed"),
        ({"device": {}}, "provider is missing in device"),
        (
            {"device": {**asdict(Device()), "spin_us": 10**9}},
            "device.spin_us is 1000000000 where 0 to 1000000 is needed",
        ),
        ({"layers": -1}, "layers is -1 where 0 to 1048576 is needed"),
        ({"speaks": 5}, "speaks is 5 where an object is needed"),
        ({"speaks": {}}, "space_id is missing in speaks"),
        ({"speaks": spoken(space_id="m2d1-0")}, "speaks.space_id is 'm2d1-0' where a space_id"),
        ({"speaks": spoken(layers=0)}, "speaks.layers is 0 where 1 to 1048576 is needed"),
        ({"speaks": spoken(measured={"a": 5})}, r"speaks.measured\['a'\] is 5 where an object"),
        ({"speaks": spoken(measured={"a": {"points": 1}})}, "native is missing in speaks.measured"),
        ({"speaks": spoken(measured={"\n": {}})}, "a key of speaks.measured is .* where a line"),
        ({"surplus": 1}, "'surplus' is unknown"),
        ({"surplus" * 10_000: 1}, "is unknown"),
        ({"weights": ["x" * 100_000] * 1000}, "weights is"),
        ({"weights": "x" * 100_000}, "weights is"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_wrong_values_are_named_in_one_short_sentence(change: dict[str, Any], told: str) -> None:
    stored = json.loads(tiny_spec().to_json()) | change
    with pytest.raises(UsageError, match=told) as refused:
        spec_from_json(json.dumps(stored), "artifact.json")
    assert len(str(refused.value)) < 400
    assert str(refused.value).isprintable()


def test_every_key_of_a_specification_is_needed() -> None:
    stored = json.loads(tiny_spec().to_json())
    for name in stored:
        rest = {key: value for key, value in stored.items() if key != name}
        with pytest.raises(UsageError, match=f"{name} is missing"):
            spec_from_json(json.dumps(rest), "artifact.json")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"\xff\xfe", "is not UTF-8"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"dim": NaN}', "NaN is not JSON"),
        (b'{"dim": 1, "dim": 2}', "the key 'dim' is there twice"),
        (b'{"dim": ' + b"9" * 10_000 + b"}", "cannot be read"),
    ],
    ids=["bytes", "depth", "nan", "twice", "digits"],
)
def test_what_is_not_json_is_one_short_sentence(content: bytes, told: str) -> None:
    with pytest.raises(UsageError, match=told) as refused:
        spec_from_json(content, "artifact.json")
    assert len(str(refused.value)) < 400


def test_a_pipe_among_the_files_is_not_waited_for(tmp_path: Path) -> None:
    for name in (SPEC, RANGES, TOKENIZER, GRAPH):
        folder = tiny_artifact(tmp_path / name, tiny_spec(vectors="int8"))
        (folder / name).unlink()
        os.mkfifo(folder / name)
        told = "has no artifact.json" if name == SPEC else f"{name} was changed"
        with pytest.raises(M2DError, match=told):
            verify_artifact(folder)
