"""What of a nested bundle was changed is refused, by whoever reads it."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from independent import read_independently
from nested_bundle import (
    DEEP,
    MIDDLE,
    SHALLOW,
    Manifest,
    refused,
    with_manifest,
)
from tiny_artifact import GRAPH, tiny_graph

from m2dexport.errors import BundleError, M2DError
from m2dexport.runtime.archive import GOLDEN, POOL, open_bundle, write_archive
from m2dexport.runtime.artifact import TOKENIZER
from m2dexport.runtime.bundle import verify_bundle
from m2dexport.runtime.cells import open_cells
from m2dexport.runtime.index import read_index
from m2dexport.runtime.loading import load
from m2dexport.runtime.manifest import MANIFEST, file_entry
from m2dexport.runtime.nested import Nested
from m2dexport.runtime.showing import show_bundle


def file_of(manifest: Manifest, name: str = TOKENIZER) -> Any:
    return manifest["cells"][SHALLOW]["files"][name]


def beyond_the_end(manifest: Manifest) -> None:
    file_of(manifest)["spans"][0]["offset"] = 10**6


def of_no_entry(manifest: Manifest) -> None:
    file_of(manifest)["spans"][0]["entry"] = "../secret"


def of_the_manifest(manifest: Manifest) -> None:
    file_of(manifest)["spans"] = [{"entry": MANIFEST, "offset": 0, "size": 9}]


def of_another_size(manifest: Manifest) -> None:
    file_of(manifest)["size"] += 1


def endless(manifest: Manifest) -> None:
    file = file_of(manifest)
    file["spans"] *= 100
    file["size"] *= 100


def too_large(manifest: Manifest) -> None:
    file_of(manifest, GOLDEN)["size"] = (1 << 25) + 1


def empty_span(manifest: Manifest) -> None:
    file_of(manifest)["spans"].append({"entry": POOL, "offset": 0, "size": 0})


def with_a_file_more(manifest: Manifest) -> None:
    manifest["cells"][SHALLOW]["files"]["evil.py"] = file_of(manifest)


def without_default(manifest: Manifest) -> None:
    del manifest["cells"][DEEP]


def with_another_default(manifest: Manifest) -> None:
    manifest["default_cell"] = SHALLOW


def without_cells(manifest: Manifest) -> None:
    manifest |= {"cells": {}, "default_cell": None}


def without_the_default_named(manifest: Manifest) -> None:
    manifest["default_cell"] = None


def with_too_many_cells(manifest: Manifest) -> None:
    cells = manifest["cells"]
    cells |= {f"{number}x9-fp32-int8": cells[SHALLOW] for number in range(65 - len(cells))}


def with_a_cell_of_no_id(manifest: Manifest) -> None:
    manifest["cells"]["deep"] = manifest["cells"][SHALLOW]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (beyond_the_end, "takes .* bytes at 1,000,000 of '.*', which are not there"),
        (of_no_entry, "of '../secret', which are not there"),
        (of_the_manifest, "of 'manifest.json', which are not there"),
        (of_another_size, "is not as long as its parts"),
        (endless, "is larger than the bundle"),
        (too_large, r"1x8-fp32-ubinary: 'golden\.json' is larger than 33,554,432 bytes"),
        (empty_span, "takes 0 bytes"),
        (with_a_file_more, r"1x8-fp32-ubinary holds 'evil\.py', which does not belong"),
        (without_default, "lacks its default cell"),
        (with_another_default, "are not its entries"),
        (without_cells, "names no cells"),
        (without_the_default_named, "only together"),
        (with_a_cell_of_no_id, "a cell's id is needed"),
        (with_too_many_cells, "cells has 65 entries where 0 to 64 are needed"),
    ],
)
def test_cells_that_are_no_parts_of_the_bundle_are_refused(
    packed: Path, tmp_path: Path, change: Callable[[Manifest], object], told: str
) -> None:
    path = with_manifest(packed, tmp_path / "a.m2d", change)
    for reader in (open_cells, load, verify_bundle, Nested, show_bundle, read_index):
        with pytest.raises(BundleError, match=told) as error:
            reader(path)
        assert len(str(error.value)) < 400 + len(str(path))


def other_digest(manifest: Manifest) -> None:
    file_of(manifest)["sha256"] = "0" * 64


def without_golden(manifest: Manifest) -> None:
    del manifest["cells"][SHALLOW]["files"][GOLDEN]


def with_another_space(manifest: Manifest) -> None:
    manifest["cells"][SHALLOW]["space_id"] = manifest["space_id"]


def with_other_vectors(manifest: Manifest) -> None:
    manifest["cells"][SHALLOW]["vectors"]["dim"] = 9


def with_ids_swapped(manifest: Manifest) -> None:
    cells = manifest["cells"]
    cells[SHALLOW], cells[MIDDLE] = cells[MIDDLE], cells[SHALLOW]


def under_another_id(manifest: Manifest) -> None:
    manifest["cells"]["1x9-fp32-ubinary"] = manifest["cells"].pop(SHALLOW)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (other_digest, r"1x8-fp32-ubinary: tokenizer\.json does not match its sha256"),
        (without_golden, r"1x8-fp32-ubinary lacks 'golden\.json'"),
        (with_another_space, "1x8-fp32-ubinary: manifest.json and artifact.json disagree"),
        (with_other_vectors, "1x8-fp32-ubinary: .* disagree about its vectors"),
        (with_ids_swapped, "[12]x.*: .* disagree about its id"),
        (under_another_id, "1x9-fp32-ubinary: manifest.json and artifact.json disagree"),
    ],
)
def test_what_is_wrong_in_a_cell_that_is_not_the_default_is_found(
    packed: Path, tmp_path: Path, change: Callable[[Manifest], object], told: str
) -> None:
    path = with_manifest(packed, tmp_path / "a.m2d", change)
    with pytest.raises(BundleError, match=told):
        verify_bundle(path)
    assert verify_bundle(path, cell=DEEP).cell == DEEP
    shallowest = Nested(path).cells[-1]
    out = tmp_path / "out"
    for command in (
        ("encode", path, "--cell", shallowest, "--in", __file__),
        ("export", path, "--cell", shallowest, "--for", "onnx", "--out", out),
        ("bundle", "show", path),
    ):
        assert re.search(told, refused(*command, code=4))


def test_another_graph_with_matching_hashes_in_a_cell_does_not_verify(
    packed: Path, tmp_path: Path
) -> None:
    """The guards and golden texts of a cell are its own."""
    files = open_bundle(packed)
    for graph, told in (
        (tiny_graph(8, "ubinary", None, seed=1), "golden"),
        (b"?", "not an ONNX file"),
    ):
        pool = files[POOL] + graph
        manifest = json.loads(files[MANIFEST])
        span = {"entry": POOL, "offset": len(files[POOL]), "size": len(graph)}
        entry = file_entry(graph)
        file_of(manifest, GRAPH).update(sha256=entry.sha256, size=entry.size, spans=[span])
        manifest["files"][POOL] = vars(file_entry(pool))
        path = tmp_path / "a.m2d"
        write_archive(path, files | {POOL: pool, MANIFEST: json.dumps(manifest).encode()})
        with pytest.raises(M2DError, match=told):
            verify_bundle(path)
        assert load(path).spec.layers == 3


def test_no_byte_of_the_shared_entry_can_change_unnoticed(packed: Path, tmp_path: Path) -> None:
    sound = packed.read_bytes()
    start = sound.index(POOL.encode()) + len(POOL)
    path = tmp_path / "flipped.m2d"
    for position in random.Random(0).sample(
        range(start, start + len(open_bundle(packed)[POOL])), 50
    ):
        flipped = bytearray(sound)
        flipped[position] ^= 1
        path.write_bytes(flipped)
        with pytest.raises(BundleError):
            open_cells(path)


def test_the_independent_reader_refuses_what_this_one_does(packed: Path, tmp_path: Path) -> None:
    changes = (beyond_the_end, of_no_entry, of_another_size, endless, other_digest)
    for number, change in enumerate(changes):
        path = with_manifest(packed, tmp_path / f"{number}.m2d", change)
        found = read_independently(path)
        assert found.returncode != 0
        assert found.stdout == ""
