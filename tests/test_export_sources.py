"""export: what it reads is verified first, and never replaced by what it writes."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import m2d
from tiny import edit_json
from tiny_artifact import relisted, tiny_artifact

from m2dexport.runtime.archive import GOLDEN, open_bundle, write_archive
from m2dexport.runtime.artifact import spec_from_json
from m2dexport.runtime.bundle import write_bundle
from m2dexport.runtime.manifest import MANIFEST, manifest_of


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("out", ["a/art", "a", ".", "a/art/out", "link", "a/../a/art"])
def test_an_export_leaves_its_source_alone(
    out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_artifact(tmp_path / "a" / "art")
    Path("link").symlink_to("a/art")
    before = contents(tmp_path)
    said = m2d("export", "a/art", "--for", "onnx", "--out", out, "--force")
    assert said.exit_code == 2
    assert "an export leaves its source as it is" in said.stderr
    assert contents(tmp_path) == before


def test_an_export_leaves_its_bundle_alone(tmp_path: Path) -> None:
    bundle = write_bundle(tiny_artifact(tmp_path / "art"), tmp_path / "out" / "a.m2d").path
    said = m2d("export", bundle, "--for", "onnx", "--out", tmp_path / "out", "--force")
    assert said.exit_code == 2
    assert bundle.exists()


def test_another_artifact_is_not_replaced_by_an_export(tmp_path: Path) -> None:
    one, two = (tiny_artifact(tmp_path / f"{seed}", seed=seed) for seed in (0, 1))
    before = contents(tmp_path)
    said = m2d("export", one, "--for", "onnx", "--out", two, "--force")
    assert said.exit_code == 2
    assert "--force replaces only exports" in said.stderr
    assert contents(tmp_path) == before
    (tmp_path / "empty").mkdir()
    said = m2d("export", one, "--for", "onnx", "--out", tmp_path / "empty", "--force")
    assert said.exit_code == 0


def test_a_bundle_that_drifts_is_not_exported(tmp_path: Path) -> None:
    files, others = (
        open_bundle(
            write_bundle(tiny_artifact(tmp_path / name, seed=seed), tmp_path / f"{name}.m2d").path
        )
        for seed, name in enumerate("ab")
    )
    drifting = {**files, GOLDEN: others[GOLDEN]}
    del drifting[MANIFEST]
    manifest = manifest_of(drifting, spec_from_json(files["artifact.json"], tmp_path), {})
    write_archive(tmp_path / "c.m2d", {**drifting, MANIFEST: manifest.to_json()})
    said = m2d("export", tmp_path / "c.m2d", "--for", "onnx", "--out", tmp_path / "out")
    assert said.exit_code == 3
    assert "does not reproduce its golden vectors" in said.stderr
    assert not (tmp_path / "out").exists()


def test_an_artifact_whose_files_do_not_belong_together_is_not_exported(tmp_path: Path) -> None:
    folder = tiny_artifact(tmp_path / "a")
    edit_json(folder / "artifact.json", prompts={"query": "search: ", "document": ""})
    said = m2d("export", relisted(folder), "--for", "onnx", "--out", tmp_path / "out")
    assert said.exit_code == 4
    assert "is of space" in said.stderr
    assert not (tmp_path / "out").exists()
