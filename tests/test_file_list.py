"""files.json: an artifact folder whose files are others than when it was built is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from shutil import copytree

import onnx
import pytest
from command_line import m2d
from onnx import numpy_helper
from tiny import edit_json

from m2dexport import load
from m2dexport.errors import BundleError
from m2dexport.files import sha256_of

GRAPH = "model.onnx"


@pytest.fixture(scope="module")
def fp32(small: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact that can be quantized; read only."""
    out = tmp_path_factory.mktemp("fp32") / "a"
    built = m2d("build", "--model", small("bert"), "--layers", 2, "--dim", 64, "--out", out)
    assert built.exit_code == 0, built.output
    return out


@pytest.fixture(scope="module")
def int8(fp32: Path) -> Path:
    """The same in int8; read only."""
    out = fp32.with_name("int8")
    small = ("--min-coverage", 0.5)
    made = m2d("quantize", fp32, "--weights", "int8", "--vectors", "int8", *small, "--out", out)
    assert made.exit_code == 0, made.output
    return out


def with_other_weights(source: Path, folder: Path) -> Path:
    """Copy an artifact, and zero every third value of its largest weight."""
    copytree(source, folder)
    graph = onnx.load(folder / GRAPH)
    weight = max(graph.graph.initializer, key=lambda tensor: tensor.ByteSize())
    values = numpy_helper.to_array(weight).copy()
    values.reshape(-1)[::3] = 0
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    onnx.save(graph, folder / GRAPH)
    return folder


def refused(code: int, *arguments: object) -> str:
    found = m2d(*arguments)
    assert found.exit_code == code, found.output
    assert found.stdout == "" and found.stderr.count("\n") == 1
    return found.stderr


def test_both_commands_list_every_file_they_write(fp32: Path, int8: Path) -> None:
    for folder in (fp32, int8):
        files = json.loads((folder / "files.json").read_text())["files"]
        others = [path for path in folder.iterdir() if path.name != "files.json"]
        assert files == {path.name: sha256_of(path) for path in others}
        assert m2d("verify", folder).exit_code == 0
    assert "ranges.json" in json.loads((int8 / "files.json").read_text())["files"]


@pytest.mark.parametrize(
    "command",
    ["verify", "bundle --out x", "export --for onnx --out x", "encode --in x", "bench", "serve"],
)
def test_other_weights_are_refused_wherever_a_folder_is_opened(
    command: str, int8: Path, tmp_path: Path
) -> None:
    folder = with_other_weights(int8, tmp_path / "a")
    name, *options = command.split()
    options = [str(tmp_path / each) if each == "x" else each for each in options]
    if name == "encode":
        (tmp_path / "x").write_text("a\n")
    assert f"{folder / GRAPH} was changed" in refused(4, name, folder, *options)
    with pytest.raises(BundleError, match="was changed"):
        load(folder)


def test_other_weights_are_neither_quantized_nor_queried(
    small: Callable[[str], Path], fp32: Path, tmp_path: Path
) -> None:
    folder, out = with_other_weights(fp32, tmp_path / "a"), ("--out", tmp_path / "out")
    assert "was changed" in refused(4, "quantize", folder, "--weights", "fp16", *out)
    grid = ("--layers", 2, "--dim", 64, "--weights", "fp16")
    assert "was changed" in refused(
        4, "build", "--model", small("bert"), *grid, "--index", folder, *out
    )
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def edited(folder: Path) -> None:
    """Change what no space_id depends on."""
    edit_json(folder / "artifact.json", parity={"min_cosine": 1.0})


def replaced_by_a_folder(folder: Path) -> None:
    (folder / GRAPH).unlink()
    (folder / GRAPH).mkdir()


@pytest.mark.parametrize(
    ("change", "code", "told"),
    [
        (edited, 4, "artifact.json was changed after the build"),
        (lambda folder: (folder / GRAPH).unlink(), 4, "model.onnx was removed after the build"),
        (replaced_by_a_folder, 4, "model.onnx was changed after the build"),
        (lambda folder: edit_json(folder / "files.json", files=5), 4, "files.json cannot be read"),
        (lambda folder: edit_json(folder / "files.json", format=9), 2, "files.json has format 9"),
        (lambda folder: (folder / "files.json").write_text(" " * 2**21), 4, "is larger than"),
        (lambda folder: (folder / "files.json").unlink(), 2, "build it again"),
    ],
    ids=["edited", "removed", "folder", "damaged", "newer", "large", "without"],
)
def test_what_differs_is_named(
    change: Callable[[Path], object], code: int, told: str, fp32: Path, tmp_path: Path
) -> None:
    folder = copytree(fp32, tmp_path / "a")
    change(folder)
    assert told in refused(code, "verify", folder)


def test_what_is_added_does_not_count(fp32: Path, tmp_path: Path) -> None:
    folder = copytree(fp32, tmp_path / "a")
    (folder / ".DS_Store").touch()
    (folder / "LICENSE").write_text("As you like.")
    assert m2d("verify", folder).exit_code == 0


def test_force_replaces_an_artifact_with_its_list(
    small: Callable[[str], Path], fp32: Path, tmp_path: Path
) -> None:
    folder = with_other_weights(fp32, tmp_path / "a")
    again = m2d(
        "build",
        "--model",
        small("bert"),
        "--layers",
        2,
        "--dim",
        64,
        "--out",
        folder,
        "--force",
    )
    assert again.exit_code == 0, again.output
    assert m2d("verify", folder).exit_code == 0
