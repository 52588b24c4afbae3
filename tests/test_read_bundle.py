"""examples/read_bundle.py: what docs/bundle-format.md says that it refuses, by a sentence."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from independent import read_independently
from tiny_artifact import GRAPH, tiny_artifact, tiny_spec

from m2dexport.runtime.archive import GOLDEN, open_bundle, write_archive
from m2dexport.runtime.artifact import TOKENIZER
from m2dexport.runtime.bundle import write_bundle
from m2dexport.runtime.manifest import MANIFEST

Files = dict[str, bytes]


@pytest.fixture(scope="module", params=["float32", "ubinary"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    path = folder / "tiny.m2d"
    write_bundle(tiny_artifact(folder / "tiny", tiny_spec(vectors=request.param)), path)
    return path


def listed(files: Files) -> Files:
    """Let the manifest agree with the files."""
    manifest = json.loads(files[MANIFEST])
    for name in manifest["files"]:
        sha256 = hashlib.sha256(files[name]).hexdigest()
        manifest["files"][name] = {"sha256": sha256, "size": len(files[name])}
    return files | {MANIFEST: json.dumps(manifest).encode()}


def edited(name: str, change: Callable[[Any], object]) -> Callable[[Files], Files]:
    def changed(files: Files) -> Files:
        content = json.loads(files[name])
        change(content)
        return listed(files | {name: json.dumps(content).encode()})

    return changed


def with_external_data(files: Files) -> Files:
    graph = onnx.load_from_string(files[GRAPH])
    tensor = graph.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/hostname")
    return listed(files | {GRAPH: graph.SerializeToString()})


FILES: dict[str, tuple[Callable[[Files], Files], str]] = {
    "a manifest that is cut": (lambda files: files | {MANIFEST: b'{"format":'}, "JSONDecodeError"),
    "a manifest too deep": (lambda files: files | {MANIFEST: b"[" * 200_000}, "RecursionError"),
    "another artifact.json": (
        edited("artifact.json", lambda spec: spec.update(format=5)),
        "another format of artifact",
    ),
    "a limit below what the spread explains": (
        edited(GOLDEN, lambda golden: golden["tolerance"].update(limit=0.8)),
        "limit 0.8, at least",
    ),
    "a tokenizer that does not cut": (
        edited(TOKENIZER, lambda tokenizer: tokenizer.update(truncation=None)),
        "a tokenizer that pads or cuts amiss",
    ),
    "no protobuf": (lambda files: listed(files | {GRAPH: b"x" * 99}), "[ONNXRuntimeError]"),
    "external data": (with_external_data, "a graph that names other files"),
}


@pytest.mark.parametrize("case", FILES)
def test_files_that_are_listed_and_wrong_are_refused(
    case: str, bundle: Path, tmp_path: Path
) -> None:
    change, told = FILES[case]
    write_archive(tmp_path / "other.m2d", change(open_bundle(bundle)))
    assert_refused(tmp_path / "other.m2d", told)


BYTES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "cut": (lambda content: content[:-1000], "BadZipFile"),
    "empty": (lambda content: b"", "BadZipFile"),
    "bytes before it": (lambda content: b"x" + content, "an archive of another layout"),
    "a comment behind it": (
        lambda content: content[:-2] + b"\x01\x00x",
        "an archive of another layout",
    ),
}


@pytest.mark.parametrize("case", BYTES)
def test_an_archive_of_other_bytes_is_refused(case: str, bundle: Path, tmp_path: Path) -> None:
    change, told = BYTES[case]
    (tmp_path / "other.m2d").write_bytes(change(bundle.read_bytes()))
    assert_refused(tmp_path / "other.m2d", told)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert_refused(tmp_path / "none.m2d", "none.m2d")


def assert_refused(path: Path, told: str) -> None:
    found = read_independently(path)
    assert (found.returncode, found.stdout) == (1, "")
    (sentence,) = found.stderr.splitlines()
    assert sentence.startswith("refused: ")
    assert told in sentence


def test_a_bundle_for_another_engine_is_not_run(bundle: Path, tmp_path: Path) -> None:
    files = open_bundle(bundle)
    manifest = json.loads(files[MANIFEST])
    manifest["files"]["table.safetensors"] = manifest["files"].pop(GRAPH)
    files["table.safetensors"] = files.pop(GRAPH)
    write_archive(tmp_path / "other.m2d", files | {MANIFEST: json.dumps(manifest).encode()})
    found = read_independently(tmp_path / "other.m2d", "a text")
    assert (found.returncode, found.stderr) == (0, "")
    assert found.stdout.strip() == "is for another engine: not run"
