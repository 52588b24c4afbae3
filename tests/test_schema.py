"""profile.json: read back as written, and described by the schema that ships."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
from tiny_profile import cell, profile

import m2dexport
from m2dexport.errors import UsageError
from m2dexport.profile.manifest import profile_schema, read_profile, write_profile

SCHEMA = Path(m2dexport.__file__).parent / "data" / "profile.schema.json"


def test_a_profile_is_read_back_as_written(tmp_path: Path) -> None:
    written = profile(cell(6, p50_ms=1.25), cell(2, flags=("untrained",)))
    write_profile(written, tmp_path / "profile.json")
    assert read_profile(tmp_path / "profile.json") == written


def test_floats_have_six_digits_and_keys_are_sorted(tmp_path: Path) -> None:
    write_profile(profile(cell(p50_ms=1.23456789)), tmp_path / "profile.json")
    text = (tmp_path / "profile.json").read_text()
    assert '"p50_ms": 1.23457' in text
    stored = json.loads(text)
    assert list(stored) == sorted(stored)


def test_the_schema_that_ships_is_that_of_the_code_and_accepts_a_profile(tmp_path: Path) -> None:
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    assert schema == profile_schema(), "run: python tools/make_schema.py > " + str(SCHEMA)
    write_profile(profile(cell(6), cell(2)), tmp_path / "profile.json")
    stored = json.loads((tmp_path / "profile.json").read_text())
    jsonschema.validate(stored, schema)
    stored["cells"][0]["p50_ms"] = "fast"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(stored, schema)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 99}, "written by m2dexport 0.1.0, and this one, .*reads format 5: upgrade m2"),
        ({"format": 4}, "has format 4; this version reads format 5: profile again"),
        ({"format": "5"}, "is not a profile; name the profile.json"),
        ({"cells": []}, "holds no cells"),
        ({"targets": [{}]}, r"is not a profile: targets\.0\.name"),
        ({"extra": 1}, "is not a profile: extra"),
    ],
)
def test_a_wrong_profile_is_refused_by_name(tmp_path: Path, change, message: str) -> None:
    path = tmp_path / "profile.json"
    write_profile(profile(cell()), path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UsageError, match=message):
        read_profile(path)


def test_what_is_no_profile_is_refused(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "text.json").write_text("not json")
    (tmp_path / "artifact.json").write_text('{"format": 4, "engine": "onnx"}')
    for name in ("missing.json", "list.json", "text.json", "artifact.json"):
        with pytest.raises(UsageError, match=name):
            read_profile(tmp_path / name)


@pytest.mark.parametrize("keep", [0, 1, 0.5, 0.99])
def test_a_profile_that_is_cut_short_is_refused_as_that(tmp_path: Path, keep: float) -> None:
    path = tmp_path / "profile.json"
    write_profile(profile(cell()), path)
    text = path.read_text()
    path.write_text(text[: keep if isinstance(keep, int) else int(len(text) * keep)])
    with pytest.raises(UsageError, match=r"profile\.json ends in the middle; copy"):
        read_profile(path)


def test_an_unknown_cell_is_answered_with_how_ids_look() -> None:
    with pytest.raises(UsageError, match="no cell '9x9'; ids look like 2x64-fp32-float32"):
        profile(cell()).cell("9x9")
