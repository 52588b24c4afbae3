"""The package as a whole: what it ships, and what it imports."""

from __future__ import annotations

import re
from pathlib import Path

import m2dexport

ROOT = Path(__file__).parent.parent


def test_the_version_is_that_of_the_project_file() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{m2dexport.__version__}"' in project


def test_no_module_imports_a_later_step() -> None:
    """Data flows one way: the imports between modules have no cycle, and none imports cli."""
    package = Path(m2dexport.__file__).parent
    imports: dict[str, set[str]] = {}
    for path in package.rglob("*.py"):
        name = path.relative_to(package).with_suffix("").parts[0]  # a module, or a folder of them
        found = re.findall(r"^\s*from m2dexport\.(\w+)", path.read_text(encoding="utf-8"), re.M)
        imports.setdefault(name, set()).update({*found} - {name})
    assert imports.pop("__main__") == {"cli"}
    assert imports["cli"]
    assert not any("cli" in found for found in imports.values())
    done: set[str] = set()
    while len(done) < len(imports):
        ready = {name for name, needed in imports.items() if needed <= done} - done
        assert ready, f"a cycle among {sorted(imports.keys() - done)}"
        done |= ready


def test_the_wheel_carries_checkpoint_data_targets_and_licences(tmp_path: Path) -> None:
    from hatchling.builders.wheel import WheelBuilder

    names = {file.distribution_path for file in WheelBuilder(str(ROOT)).recurse_included_files()}
    for name in (
        "m2dexport/py.typed",
        "m2dexport/data/calibration.txt",
        "m2dexport/data/profile.schema.json",
        "m2dexport/data/checkpoint/model.safetensors",
        "m2dexport/data/checkpoint/LICENSE",
        "m2dexport/data/checkpoint/NOTICE",
        "m2dexport/data/eval/stsb-dev.tsv",
        "m2dexport/data/eval/limit-small/qrels.jsonl",
    ):
        assert name in names
    forced = WheelBuilder(str(ROOT)).config.get_force_include()
    assert "m2dexport/profiles" in forced.values()
