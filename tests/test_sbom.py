"""The bill of materials of a bundle: CycloneDX's own schema accepts it, and it names every file."""

from __future__ import annotations

import json
from pathlib import Path

import cyclonedx.schema
import jsonschema
import pytest
from referencing import Registry, Resource
from tiny_artifact import tiny_artifact, tiny_spec

from m2dexport.runtime.bundle import write_bundle
from m2dexport.runtime.cells import open_cells
from m2dexport.runtime.sbom import sbom_of

SCHEMAS = Path(cyclonedx.schema.__file__).parent / "_res"


def validator() -> jsonschema.Draft7Validator:
    """Return what checks a text by the schema of version 1.6, which the package carries."""
    named = {
        "bom-1.6.SNAPSHOT.schema.json": "bom-1.6.schema.json",
        "spdx.SNAPSHOT.schema.json": "spdx.schema.json",
        "jsf-0.82.SNAPSHOT.schema.json": "jsf-0.82.schema.json",
    }
    schemas = {
        name: json.loads((SCHEMAS / file).read_text(encoding="utf-8"))
        for file, name in named.items()
    }
    resources = [
        (f"http://cyclonedx.org/schema/{name}", Resource.from_contents(schema))
        for name, schema in schemas.items()
    ]
    return jsonschema.Draft7Validator(
        schemas["bom-1.6.schema.json"], registry=Registry().with_resources(resources)
    )


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    artifact = tiny_artifact(tmp_path / "artifact", tiny_spec(weights="int8", vectors="int8"))
    (artifact / "LICENSE").write_text("Do as you like.\n")
    return write_bundle(artifact, tmp_path / "edge.m2d").path


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
