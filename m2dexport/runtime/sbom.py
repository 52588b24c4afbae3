"""A bill of materials of a bundle, in CycloneDX 1.6 as JSON.

It says what the bundle holds (every file with its sha256), what made it, what it needs to run, and
under which licences. It has no date, and its serial number follows from the manifest: all is worked
out from the bundle, but for the licences of what it needs, which are those that the releases here
state. https://cyclonedx.org/docs/1.6/json/ describes the fields.
"""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from m2dexport.engines import ENGINES
from m2dexport.runtime.artifact import ArtifactSpec
from m2dexport.runtime.cells import open_cells
from m2dexport.runtime.manifest import MANIFEST, Manifest

_VERSION = "1.6"
_NOTICE = "NOTICE"  # how the names of files begin that go with a licence
#: Keys of an artifact's provenance that are no packages, but hashes of models or what was chosen.
_MODEL_HASHES = ("checkpoint", "sub_model", "full_model", "full_tokenizer")
#: SPDX's id of a licence -> its whole text with single spaces, of which the group's sha256 follows.
_KNOWN_LICENSES = {
    "Apache-2.0": (
        r"(Apache License .* END OF TERMS AND CONDITIONS)"
        r"( APPENDIX: How to apply .{1,1500} limitations under the License\.)?",
        "59d8f0ba87ad9a2f1a431123c8d16646e5b89ba53653e818f16d136d77263c99",
    ),
    "MIT": (
        r"(?:(?:The )?MIT License(?: \(MIT\))? )?Copyright [^.:;]{1,100}?\.? "
        r"(Permission is hereby granted, .* IN THE SOFTWARE\.)",
        "fe2a9817987f862eaced948f0468c7f51d2fedfc48c5c505b246a49a3870e9a5",
    ),
}
_LONGEST_LICENSE = 20_000  # characters of those
#: What packages call a licence in their metadata where that is the name in SPDX's list -> its id.
_SPDX_NAMES = {"MIT License": "MIT", "Apache License 2.0": "Apache-2.0"}
_OSI = "License :: OSI Approved :: "


def sbom_of(path: Path) -> str:
    """Return the bill of materials of a bundle as JSON.

    The same bundle gives the same text where the same packages are installed.

    Raises:
        UsageError: when there is no such file.
        BundleError: when it is damaged.
    """
    opened = open_cells(path)
    manifest, specs = opened.manifest, {cell: opened.spec(cell) for cell in opened.cells}
    sha256 = hashlib.sha256(opened.entries[MANIFEST]).hexdigest()
    needed = _needed(specs.values())
    models = [_model(name, spec) for name, spec in sorted(specs.items())]
    bom = {
        "bomFormat": "CycloneDX",
        "specVersion": _VERSION,
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_OID, sha256)}",
        "version": 1,
        "metadata": {
            "component": {
                "type": "application",
                "bom-ref": "bundle",
                "name": " ".join(sorted(specs)),
                "licenses": _licenses(manifest),
                "properties": _notices(manifest),
                "hashes": _hashes(sha256),
                "description": f"m2dexport bundle; the hash is of its {MANIFEST}",
            },
            "tools": {"components": _makers(manifest)},
        },
        "components": [*models, *_files(manifest), *needed],
        "dependencies": [
            {"ref": "bundle", "dependsOn": [each["bom-ref"] for each in (*models, *needed)]}
        ],
    }
    return json.dumps(bom, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _model(name: str, spec: ArtifactSpec) -> dict[str, Any]:
    facts = {
        "engine": spec.engine,
        "space_id": spec.space_id,
        **{key: spec.provenance[key] for key in _MODEL_HASHES if key in spec.provenance},
        **({"calibration_texts_sha256": spec.fitted_to} if spec.fitted_to else {}),
    }
    return {
        "type": "machine-learning-model",
        "bom-ref": f"model:{name}",
        "name": name,
        "properties": _properties(facts),
    }


def _files(manifest: Manifest) -> list[dict[str, Any]]:
    return [
        {
            "type": "file",
            "bom-ref": f"file:{name}",
            "name": name,
            "hashes": _hashes(entry.sha256),
            "properties": _properties({"bytes": str(entry.size)}),
        }
        for name, entry in sorted(manifest.files.items())
    ]


def _needed(specs: Iterable[ArtifactSpec]) -> list[dict[str, Any]]:
    """Return the packages that run the bundle, with the oldest version where one is known."""
    oldest = {"numpy": "", "tokenizers": ""}
    for spec in specs:
        package = ENGINES[spec.engine].package
        # Of two cells, the one that needs the newer engine decides.
        oldest[package] = max(oldest.get(package, ""), spec.min_engine, key=_by_number)
    return [
        {
            "type": "library",
            "bom-ref": f"needs:{package}",
            "name": package,
            "purl": f"pkg:pypi/{package.replace('_', '-')}",
            **_stated_license(package),
            "properties": _properties({"oldest": least, "license_of_release": _release(package)}),
        }
        for package, least in sorted(oldest.items())
    ]


def _properties(facts: Mapping[str, str]) -> list[dict[str, str]]:
    """Return facts as CycloneDX has them, but for empty ones."""
    return [
        {"name": f"m2dexport:{key}", "value": value}
        for key, value in sorted(facts.items())
        if value
    ]


def _release(package: str) -> str:
    """Return the version that is installed; none: empty."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _stated_license(package: str) -> dict[str, Any]:
    """Return the licence that an installed package states; of one that states none, nothing.

    That is its SPDX expression; else SPDX's id of the licence that it names, else that name.
    """
    if not _release(package):
        return {}
    stated = metadata.metadata(package)
    expressions = stated.get_all("License-Expression") or []
    if expressions:
        return {"licenses": [{"expression": expressions[0]}]}
    named = [each for each in stated.get_all("Classifier") or [] if each.startswith(_OSI)]
    names = [each.removeprefix(_OSI) for each in named]
    known = [{"id": _SPDX_NAMES[n]} if n in _SPDX_NAMES else {"name": n} for n in names]
    return {"licenses": [{"license": each} for each in known]} if known else {}


def _by_number(version: str) -> list[int]:
    return [int(part) for part in version.split(".") if part]


def _makers(manifest: Manifest) -> list[dict[str, Any]]:
    """Return the packages that made the bundle, with their versions."""
    return [
        {"type": "library", "name": name, "version": version}
        for name, version in sorted(manifest.created_by.items())
        if version[:1].isdigit() and not name.startswith(("full_", *_MODEL_HASHES))
    ]


def _licenses(manifest: Manifest) -> list[dict[str, Any]]:
    return [
        {"license": {**_called(name, text), "text": {"contentType": "text/plain", "content": text}}}
        for name, text in sorted(manifest.licenses.items())
        if not name.startswith(_NOTICE)
    ]


def _notices(manifest: Manifest) -> list[dict[str, str]]:
    """Return what must be handed on beside a licence and is none: NOTICE files, by their names."""
    texts = manifest.licenses.items()
    return _properties({name: text for name, text in texts if name.startswith(_NOTICE)})


def _called(name: str, text: str) -> dict[str, str]:
    """Return SPDX's id of a licence that is word by word a known one, else its file's name."""
    words = " ".join(text.split())
    for known, (pattern, sha256) in _KNOWN_LICENSES.items():
        found = re.fullmatch(pattern, words) if len(words) <= _LONGEST_LICENSE else None
        if found and hashlib.sha256(found[1].encode()).hexdigest() == sha256:
            return {"id": known}
    return {"name": name}


def _hashes(sha256: str) -> list[dict[str, str]]:
    return [{"alg": "SHA-256", "content": sha256}]
