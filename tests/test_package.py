"""The package as a whole: what it ships, and what it imports."""

from __future__ import annotations

import pkgutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import m2dexport

ROOT = Path(__file__).parent.parent


def test_the_version_is_that_of_the_project_file() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{m2dexport.__version__}"' in project


def test_every_module_is_imported() -> None:
    """In one process: only an engine's module and threadpoolctl set a variable; no logger opens."""
    names = [info.name for info in pkgutil.walk_packages(m2dexport.__path__, "m2dexport.")]
    assert len(names) > 60
    if not find_spec("tensorrt"):  # which no registry has
        names.remove("m2dexport.engines.tensorrt.run")
    code = (
        "import importlib, logging, os, sys\n"
        "before = dict(os.environ)\n"
        f"for name in {[n for n in names if not n.endswith('__main__')]}:\n"
        "    importlib.import_module(name)\n"
        "new = {*os.environ} - {*before}\n"
        "assert new <= {'ORT_DISABLE_TELEMETRY', 'KMP_DUPLICATE_LIB_OK'}, new\n"
        "assert not logging.getLogger('m2dexport').handlers\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (0, ""), ran.stderr


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
