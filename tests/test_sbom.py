"""The bill of materials of a bundle: CycloneDX's own schema accepts it, and it names every file."""

from __future__ import annotations

import json
from email import message_from_string
from importlib import metadata
from pathlib import Path
from typing import Any

import cyclonedx.schema
import jsonschema
import pytest
from command_line import m2d
from referencing import Registry, Resource
from tiny_artifact import relisted, tiny_artifact, tiny_spec

from m2dexport.data import default_checkpoint
from m2dexport.runtime.bundle import write_bundle
from m2dexport.runtime.cells import open_cells
from m2dexport.runtime.sbom import sbom_of

SCHEMAS = Path(cyclonedx.schema.__file__).parent / "_res"


def validator() -> jsonschema.Draft7Validator:
    """Return what checks a text by the schema of version 1.6, which the package carries."""
    names = [f"{each}.SNAPSHOT.schema.json" for each in ("bom-1.6", "spdx", "jsf-0.82")]
    schemas = [json.loads((SCHEMAS / name).read_text(encoding="utf-8")) for name in names]
    resources = [
        (f"http://cyclonedx.org/schema/{name}", Resource.from_contents(schema))  # as they refer
        for name, schema in zip(names, schemas, strict=True)
    ]
    return jsonschema.Draft7Validator(schemas[0], registry=Registry().with_resources(resources))


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    artifact = tiny_artifact(tmp_path / "artifact", tiny_spec(weights="int8", vectors="int8"))
    (artifact / "LICENSE").write_text("Do as you like.\n")
    return write_bundle(relisted(artifact), tmp_path / "edge.m2d").path


def test_the_schema_accepts_it_and_every_file_is_named(packed: Path) -> None:
    manifest = open_cells(packed).manifest
    text = sbom_of(packed)
    assert text == sbom_of(packed)
    bom = json.loads(text)
    validator().validate(bom)
    kinds = {
        kind: [c for c in bom["components"] if c["type"] == kind] for kind in ("file", "library")
    }
    hashes = {each["name"]: each["hashes"][0]["content"] for each in kinds["file"]}
    assert hashes == {name: entry.sha256 for name, entry in manifest.files.items()}
    assert [each["name"] for each in kinds["library"]] == ["numpy", "onnxruntime", "tokenizers"]
    (license,) = bom["metadata"]["component"]["licenses"]
    assert license["license"]["text"]["content"] == "Do as you like.\n"


def test_what_it_needs_has_the_licence_that_its_release_here_states(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stated = {
        "numpy": "License-Expression: BSD-3-Clause AND MIT",
        "onnxruntime": "License: MIT License\nClassifier: License :: OSI Approved :: MIT License",
        "tokenizers": "Classifier: License :: OSI Approved :: Apache Software License",
    }
    assert all(needed(packed)[name]["licenses"] for name in stated)  # of what is installed
    monkeypatch.setattr(metadata, "version", lambda _: "1.2.3")
    monkeypatch.setattr(metadata, "metadata", lambda name: message_from_string(stated[name]))
    found = needed(packed)
    assert {name: each["licenses"] for name, each in found.items()} == {
        "numpy": [{"expression": "BSD-3-Clause AND MIT"}],
        "onnxruntime": [{"license": {"id": "MIT"}}],
        "tokenizers": [{"license": {"name": "Apache Software License"}}],  # SPDX knows no such name
    }
    properties = {each["name"]: each["value"] for each in found["numpy"]["properties"]}
    assert properties == {"m2dexport:license_of_release": "1.2.3"}
    stated["numpy"] = "Name: numpy"
    assert "licenses" not in needed(packed)["numpy"]


def test_of_what_is_not_installed_no_licence_is_known(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert not any("licenses" in each for each in needed(packed).values())


def needed(packed: Path) -> dict[str, Any]:
    """Return the packages that a bill of materials says run a bundle, by name."""
    bom = json.loads(m2d("bundle", "sbom", packed).stdout)
    validator().validate(bom)
    return {each["name"]: each for each in bom["components"] if each["type"] == "library"}


def test_a_notice_is_no_licence_and_is_handed_on(tmp_path: Path) -> None:
    artifact = tiny_artifact(tmp_path / "artifact")
    for name in ("LICENSE", "NOTICE", "NOTICE.txt"):
        (artifact / name).write_text(f"The {name}.\n")
    bom = json.loads(sbom_of(write_bundle(artifact, tmp_path / "edge.m2d").path))
    validator().validate(bom)
    component = bom["metadata"]["component"]
    assert [each["license"]["name"] for each in component["licenses"]] == ["LICENSE"]
    assert {each["name"]: each["value"] for each in component["properties"]} == {
        f"m2dexport:{name}": f"The {name}.\n" for name in ("NOTICE", "NOTICE.txt")
    }


def licence_of(folder: Path, text: str) -> dict[str, Any]:
    """Return what the bill of materials says of the licence of a bundle."""
    artifact = tiny_artifact(folder / "artifact")
    (artifact / "LICENSE").write_text(text)
    bom = json.loads(sbom_of(write_bundle(relisted(artifact), folder / "edge.m2d").path))
    validator().validate(bom)
    (found,) = bom["metadata"]["component"]["licenses"]
    assert found["license"].pop("text")["content"] == text
    license: dict[str, Any] = found["license"]
    return license


MIT = """MIT License

Copyright (c) 2024 Somebody

Permission is hereby granted, free of charge, to any person obtaining a copy
of this software and associated documentation files (the "Software"), to deal
in the Software without restriction, including without limitation the rights
to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all
copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE
SOFTWARE.
"""
APACHE = (default_checkpoint() / "LICENSE").read_text(encoding="utf-8")


@pytest.mark.parametrize(("text", "known"), [(APACHE, "Apache-2.0"), (MIT, "MIT")])
def test_a_licence_has_the_id_of_spdx_if_every_word_is_that_ones(
    text: str, known: str, tmp_path: Path
) -> None:
    assert licence_of(tmp_path / "same", text) == {"id": known}
    assert licence_of(tmp_path / "more", f"{text} Not for money.") == {"name": "LICENSE"}
    assert licence_of(tmp_path / "other", text.replace(" of ", " for ", 1)) == {"name": "LICENSE"}
