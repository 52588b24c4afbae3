"""Nested bundles: cells that are whole and share what they can, shown and compared."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from command_line import m2d
from independent import READER, read_independently
from nested_bundle import (
    DEEP,
    MIDDLE,
    SHALLOW,
    SHAPES,
    TEXTS,
    refused,
    succeeded,
    with_manifest,
)
from tiny_artifact import GRAPH

from m2dexport.errors import UsageError
from m2dexport.files import SPEC
from m2dexport.runtime.archive import GOLDEN, open_bundle
from m2dexport.runtime.artifact import TOKENIZER
from m2dexport.runtime.bundle import write_bundle
from m2dexport.runtime.cells import open_cells
from m2dexport.runtime.index import read_index
from m2dexport.runtime.loading import load
from m2dexport.runtime.showing import show_bundle


def test_every_cell_gives_the_vectors_of_its_artifact(
    packed: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS[:2]))
    for cell, folder in folders.items():
        out = tmp_path / f"{cell}.npy"
        succeeded("encode", packed, "--cell", cell, "--in", tmp_path / "texts.txt", "--out", out)
        expected = load(folder).encode(TEXTS[:2])
        assert np.array_equal(np.load(out), expected)
        assert np.array_equal(load(packed, cell=cell).encode(TEXTS[:2]), expected)
    assert load(packed).spec.layers == 3


def test_verify_checks_every_cell_or_the_one_that_is_named(packed: Path) -> None:
    lines = succeeded("verify", packed).splitlines()
    assert [cell in line for cell, line in zip(SHAPES, lines, strict=True)] == [True] * 3
    (line,) = succeeded("verify", packed, "--cell", SHALLOW).splitlines()
    assert SHALLOW in line
    told = json.loads(succeeded("verify", packed, "--json"))
    assert [told["cell"], *(each["cell"] for each in told["others"])] == list(SHAPES)
    assert "Of a nested bundle: the cell.  [default: all]" in succeeded("verify", "--help")


def test_the_same_artifacts_in_any_order_give_the_same_bytes(
    packed: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    for name, paths in (("a", [*folders.values()]), ("b", [*folders.values()][::-1])):
        *_, said = succeeded("bundle", *paths, "--out", tmp_path / f"{name}.m2d").splitlines()
        assert said == (
            f"3 spaces: {DEEP} | {MIDDLE} | {SHALLOW}; an index of one space cannot be queried by "
            "the cells of another"
        )
    assert (tmp_path / "a.m2d").read_bytes() == (tmp_path / "b.m2d").read_bytes()
    for name in (SPEC, GRAPH, GOLDEN):  # what the default cell's own bundle has
        assert open_bundle(tmp_path / "a.m2d")[name] == open_bundle(packed)[name]


def test_an_unknown_cell_is_refused_with_those_there_are(
    packed: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    for command in ("encode", "verify", "bench"):
        told = refused(command, packed, "--cell", "5x8-fp32-int8")
        assert all(cell in told for cell in ("5x8-fp32-int8", *SHAPES))
    assert f"it has {DEEP}" in refused("encode", folders[DEEP], "--cell", SHALLOW)
    write_bundle(folders[DEEP], tmp_path / "plain.m2d")
    assert load(tmp_path / "plain.m2d", cell=DEEP).spec == load(folders[DEEP], cell=DEEP).spec
    with pytest.raises(UsageError, match=f"no cell '{SHALLOW}'; it has {DEEP}"):
        load(tmp_path / "plain.m2d", cell=SHALLOW)


def test_what_cannot_be_packed_together_is_refused(
    folders: dict[str, Path], packed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "a.m2d"
    told = refused("bundle", folders[DEEP], folders[DEEP], "--out", out)
    assert f"two of the artifacts are the cell {DEEP}" in told
    assert "is not an artifact folder" in refused("bundle", folders[DEEP], packed, "--out", out)
    told = refused("bundle", folders[DEEP], folders[SHALLOW], "--cell", DEEP, "--out", out)
    assert "--cell goes with a profile.json" in told
    assert not list(tmp_path.iterdir())


def test_an_index_of_a_nested_bundle_is_that_of_its_default_cell(packed: Path) -> None:
    index = read_index(packed)
    assert (index.spec.layers, index.name) == (3, f"{packed} ({DEEP})")


def test_vectors_are_of_the_cell_that_wrote_them(packed: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("a guitar")
    for cell in (DEEP, SHALLOW):
        out = tmp_path / f"{cell}.npy"
        wrote = m2d("encode", packed, "--cell", cell, "--in", tmp_path / "texts.txt", "--out", out)
        assert wrote.exit_code == 0
        told = m2d("verify", packed, "--vectors", out).stdout.splitlines()[-1]
        assert told == f"{out}: 1 vectors of the space of {cell}"


def test_show_says_what_a_bundle_is(packed: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    told = json.loads(succeeded("bundle", "show", packed, "--json"))
    assert [cell["id"] for cell in told["cells"]] == list(SHAPES)
    assert told["cells"][0]["figures"]["p50_ms"] == 3.0
    owned = sum(cell["own_bytes"] for cell in told["cells"])
    assert 0 < owned < sum(told["files"].values())
    text = succeeded("bundle", "show", packed)
    assert "3 cells, 3x12-fp32-int8 by default" in text
    assert "quality 83.00" in text
    write_bundle(folders[DEEP], tmp_path / "plain.m2d")
    assert "format 2" in succeeded("bundle", "show", tmp_path / "plain.m2d")
    (cell,) = show_bundle(tmp_path / "plain.m2d").cells
    assert cell.own_bytes == cell.size_bytes


def test_the_bytes_of_one_cell_alone_are_those_that_no_other_cell_has(packed: Path) -> None:
    opened = open_cells(packed)
    users: dict[tuple[str, int], set[str]] = {}
    for cell, entry in opened.manifest.cells.items():
        for span in (span for file in entry.files.values() for span in file.spans):
            for place in range(span.offset, span.offset + span.size):
                users.setdefault((span.entry, place), set()).add(cell)
    shown = {each.id: each.own_bytes for each in show_bundle(packed).cells}
    assert shown == {cell: [*users.values()].count({cell}) for cell in SHAPES}
    assert 0 < sum(shown.values()) < sum(each.size for each in opened.manifest.cells.values())


def test_diff_says_what_differs_and_exits_like_diff(
    packed: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    assert "are the same bytes" in succeeded("bundle", "diff", packed, packed)
    for cell in (DEEP, SHALLOW):
        write_bundle(folders[cell], tmp_path / f"{cell}.m2d")
    plain = [tmp_path / f"{cell}.m2d" for cell in (DEEP, SHALLOW)]
    result = m2d("bundle", "diff", *plain)
    assert result.exit_code == 1
    assert "layers: 3 | 1" in result.stdout.splitlines()
    assert "ranges.json: 6" not in result.stdout
    assert result.stdout.count(TOKENIZER) == 0
    result = m2d("bundle", "diff", packed, plain[1], "--json")
    told = json.loads(result.stdout)
    assert (result.exit_code, told["same"]) == (1, False)
    assert (told["only_in_first"], told["only_in_second"]) == ([DEEP, MIDDLE], [])
    facts = {each["what"]: each for each in told["differences"]}
    assert facts["default cell"]["second"] == SHALLOW
    assert not any(what.startswith((DEEP, MIDDLE)) for what in facts)
    lines = m2d("bundle", "diff", plain[1], packed).stdout.splitlines()
    assert lines[:2] == [f"only in {packed}: cell {cell}" for cell in (DEEP, MIDDLE)]
    assert "does not exist" in refused("bundle", "diff", packed, tmp_path / "none.m2d")
    assert "is not a bundle file" in refused("bundle", "show", folders[DEEP])


def test_a_manifest_alone_that_differs_is_a_difference(packed: Path, tmp_path: Path) -> None:
    other = with_manifest(packed, tmp_path / "a.m2d", lambda _: None)  # without indentation
    result = m2d("bundle", "diff", packed, other)
    assert result.exit_code == 1
    assert result.stdout.startswith("bytes: ")


def test_the_independent_reader_is_short_and_imports_nothing_of_this_package() -> None:
    source = READER.read_text(encoding="utf-8")
    assert len(source.splitlines()) < 100
    imports = re.findall(r"^\s*(?:import|from) (\w+)", source, re.M)
    assert set(imports) <= {
        "hashlib",
        "json",
        "numpy",
        "onnxruntime",
        "sys",
        "tokenizers",
        "zipfile",
    }


def test_the_independent_reader_gives_the_same_vectors(
    packed: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    write_bundle(folders[SHALLOW], tmp_path / "plain.m2d")
    for path, cells in ((packed, sorted(SHAPES)), (tmp_path / "plain.m2d", [SHALLOW])):
        found = read_independently(path, TEXTS[0])
        assert found.returncode == 0, found.stderr
        lines = found.stdout.splitlines()
        for cell, said, vector in zip(cells, lines[::2], lines[1::2], strict=True):
            encoder = load(path, cell=cell)
            assert encoder.spec.space_id in said
            expected = encoder.encode(TEXTS[:1])[0].tolist()
            assert json.loads(vector) == pytest.approx(expected, abs=1e-6)
