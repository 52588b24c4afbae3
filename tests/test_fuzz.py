"""Bundles whose content is anything, under checksums that fit: one sentence, or vectors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_artifact import GRAPH, tiny_artifact, tiny_spec

from m2dexport.errors import M2DError
from m2dexport.files import SPEC
from m2dexport.runtime.archive import GOLDEN, open_bundle, write_archive
from m2dexport.runtime.artifact import RANGES, TOKENIZER
from m2dexport.runtime.bundle import verify_bundle, write_bundle
from m2dexport.runtime.cells import open_cells
from m2dexport.runtime.loading import load
from m2dexport.runtime.manifest import MANIFEST, file_entry, read_manifest
from m2dexport.runtime.packing import write_nested

MANY = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
#: What stands in the place of a value of a JSON file.
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(1 << 70), 1 << 70),
    st.floats(),
    st.text(max_size=5),
    st.just([]),
    st.just({}),
)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    artifact = tiny_artifact(folder / "artifact", tiny_spec(vectors="int8"))
    return write_bundle(artifact, folder / "plain.m2d").path


@pytest.fixture(scope="module")
def nested(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nested")
    specs = {"two": replace(tiny_spec(), layers=2), "one": tiny_spec(vectors="int8")}
    artifacts = [tiny_artifact(folder / name, spec) for name, spec in specs.items()]
    return write_nested(artifacts, folder / "nested.m2d").path


def with_content(bundle: Path, name: str, content: bytes, out: Path) -> Path:
    """Write a bundle with another content of an entry, which the manifest lists as it is."""
    files = open_bundle(bundle) | {name: content}
    if name != MANIFEST:
        manifest = read_manifest(files, bundle)
        listed = {**manifest.files, name: file_entry(content)}
        files[MANIFEST] = replace(manifest, files=listed).to_json()
    write_archive(out, files)
    return out


def used(bundle: Path) -> None:
    """Use a bundle as a device does: vectors, or an error that was raised on purpose."""
    try:
        for cell in open_cells(bundle).cells:
            assert np.isfinite(load(bundle, cell=cell).encode(["a guitar", ""])).all()
        verify_bundle(bundle)
    except M2DError as error:
        assert str(error)
        assert "\n" not in str(error)


@MANY
@given(data=st.data())
@pytest.mark.parametrize("name", [MANIFEST, TOKENIZER, GOLDEN, RANGES, SPEC, GRAPH])
def test_an_entry_with_other_bytes(plain: Path, tmp_path: Path, name: str, data: Any) -> None:
    content = bytearray(open_bundle(plain)[name])
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    used(with_content(plain, name, bytes(content), tmp_path / "other.m2d"))


@MANY
@given(data=st.data())
@pytest.mark.parametrize("name", [MANIFEST, TOKENIZER, GOLDEN, SPEC])
@pytest.mark.parametrize("kind", ["plain", "nested"])
def test_an_entry_with_another_value(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, name: str, data: Any
) -> None:
    bundle = request.getfixturevalue(kind)
    whole = json.loads(open_bundle(bundle)[name])
    holder, key = whole, None
    while isinstance(holder, dict | list) and holder:
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        key = data.draw(st.sampled_from(keys))
        if not isinstance(holder[key], dict | list) or data.draw(st.integers(0, 3)) == 0:
            break
        if not holder[key]:
            break
        holder = holder[key]
    holder[key] = data.draw(VALUES)
    content = json.dumps(whole, ensure_ascii=False).encode(errors="surrogatepass")
    used(with_content(bundle, name, content, tmp_path / "other.m2d"))
