"""A nested bundle of three tiny cells, as fixtures, and commands that are run on it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command_line import m2d
from tiny_artifact import tiny_artifact, tiny_spec

from m2dexport.runtime.archive import open_bundle, write_archive
from m2dexport.runtime.manifest import MANIFEST, Figures
from m2dexport.runtime.packing import write_nested

DEEP, MIDDLE, SHALLOW = "3x12-fp32-int8", "2x12-fp32-float32", "1x8-fp32-ubinary"
SHAPES: dict[str, tuple[int, int, Any]] = {
    DEEP: (3, 12, "int8"),
    MIDDLE: (2, 12, "float32"),
    SHALLOW: (1, 8, "ubinary"),
}
Manifest = dict[str, Any]
TEXTS = ["a guitar", "find 3 cafés", ""]


def artifacts(root: Path) -> dict[str, Path]:
    """Make the artifact of every cell; return them by the id."""
    return {
        cell: tiny_artifact(
            root / cell, replace(tiny_spec(dim=dim, vectors=vectors), layers=layers)
        )
        for cell, (layers, dim, vectors) in SHAPES.items()
    }


def nested_bundle(folders: dict[str, Path], out: Path) -> Path:
    """Pack three cells with figures."""
    figures = {
        cell: Figures("tiny", "a processor", 1, 1, 16, ms, 2 * ms, 10**8, 80 + ms)
        for cell, ms in ((DEEP, 3.0), (MIDDLE, 2.0), (SHALLOW, 1.0))
    }
    assert write_nested(list(folders.values()), out, figures).cells == (DEEP, MIDDLE, SHALLOW)
    return out


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """From the id of a cell to its artifact; read only."""
    return artifacts(tmp_path_factory.mktemp("artifacts"))


@pytest.fixture(scope="module")
def packed(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of three cells with figures; read only."""
    return nested_bundle(folders, tmp_path_factory.mktemp("packed") / "nested.m2d")


def succeeded(*arguments: object) -> str:
    """Return what a command printed that did not fail."""
    result = m2d(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*arguments: object, code: int = 2) -> str:
    """Return the one sentence with which a command failed."""
    result = m2d(*arguments)
    assert (result.exit_code, result.stdout) == (code, ""), result.output
    (sentence,) = result.stderr.splitlines()
    return sentence


def with_manifest(packed: Path, path: Path, change: Callable[[Manifest], object]) -> Path:
    """Write a nested bundle whose manifest was changed."""
    files = open_bundle(packed)
    manifest = json.loads(files[MANIFEST])
    change(manifest)
    write_archive(path, files | {MANIFEST: json.dumps(manifest).encode()})
    return path
