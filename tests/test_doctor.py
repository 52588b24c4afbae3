"""doctor: what an environment has, said also where it is broken."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import onnxruntime
import pytest
from command_line import m2d

import m2dexport
from m2dexport.cores import usable_cores
from m2dexport.engines import ENGINES, engine_runner, engine_version
from m2dexport.runtime import doctor

LOADER = "libonnx_core.so.1: cannot open shared object file"


def wheel(folder: Path, name: str, version: str, package: str) -> None:
    """Write what pip leaves of a wheel, for the environment to find first."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "top_level.txt").write_text(package)


def notes() -> str:
    return " ".join(doctor.examine().notes)


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    """What doctor prints in an environment where onnxruntime cannot be loaded."""
    folder = tmp_path_factory.mktemp("broken")
    (folder / "onnxruntime").mkdir()
    (folder / "onnxruntime" / "__init__.py").write_text(f'raise ImportError("{LOADER}")')
    path = os.pathsep.join([str(folder), str(Path(m2dexport.__file__).parent.parent)])
    return subprocess.run(
        [sys.executable, "-m", "m2dexport", "doctor"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_engine_is_named_with_its_version_and_what_it_offers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Another test may have imported it with a stand-in for the package.
    monkeypatch.delitem(sys.modules, "m2dexport.engines.tensorrt.run", raising=False)
    found = json.loads(m2d("doctor", "--json").stdout)
    assert [each["name"] for each in found["engines"]] == list(ENGINES)
    for each in found["engines"]:
        if not find_spec(ENGINES[each["name"]].package):  # the data-centre TensorRT's
            assert 'pip install "m2dexport[tensorrt]"' in each["problem"]
            continue
        assert (each["package"], each["installed"]) == engine_version(each["name"])
        assert each["devices"] == list(engine_runner(each["name"]).devices())
        assert (each["too_old_for"], each["broken_build"]) == ({}, None)
        assert each["problem"] is None or "needs an NVIDIA GPU" in each["problem"]
    assert found["usable_cores"] == usable_cores()
    packages = {each["name"]: each for each in found["packages"]}
    assert {"numpy", "tokenizers", "torch", "nncf", "sentence-transformers"} <= packages.keys()
    assert packages["torch"]["extra"] == "export"
    assert found["problem"] is None


def test_the_report_fits_80_columns() -> None:
    shown = m2d("doctor")
    assert shown.exit_code == 0, shown.output
    assert max(map(len, shown.stdout.splitlines())) <= 80
    for word in (m2dexport.__version__, f"onnxruntime {onnxruntime.__version__}", "cores usable"):
        assert word in shown.stdout


def test_a_missing_engine_is_named_with_its_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "m2dexport.engines.openvino.run", raising=False)
    monkeypatch.setitem(sys.modules, "openvino", None)
    shown = m2d("doctor")
    assert shown.exit_code == 0, shown.output
    assert any('pip install "m2dexport[openvino]".' in line for line in shown.stdout.splitlines())


def test_what_the_loader_says_of_a_broken_engine_is_shown_and_the_others_go_on(broken) -> None:
    said = " ".join(broken.stdout.split())
    assert f"ImportError: {LOADER}" in said
    assert f"static numpy {engine_version('static')[1]} (needs 1.26 or newer): CPU" in said


def test_a_default_engine_that_does_not_work_is_an_error(broken) -> None:
    assert broken.returncode == 1
    assert broken.stderr == f"Error: the engine onnx does not work here: ImportError: {LOADER}\n"


def test_wheels_that_overwrite_each_other_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "overwrite" not in notes()
    wheel(tmp_path, "onnxruntime_gpu", "1.32.0", "onnxruntime")
    monkeypatch.syspath_prepend(tmp_path)
    assert "onnxruntime and onnxruntime-gpu both bring the package onnxruntime" in notes()


def test_packages_that_are_too_old_are_named_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel(tmp_path, "tokenizers", "0.19.1", "tokenizers")
    wheel(tmp_path, "torch", "2.5.0+cpu", "torch")
    monkeypatch.syspath_prepend(tmp_path)
    found = notes()
    assert "tokenizers 0.19.1 is installed and m2dexport needs 0.20 or newer" in found
    assert 'run: pip install --upgrade "m2dexport[export]"' in found


def test_an_onnxruntime_for_numpy_1_beside_numpy_2_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel(tmp_path, "onnxruntime", "1.18.1", "onnxruntime")
    wheel(tmp_path, "numpy", "2.0.0", "numpy")
    monkeypatch.syspath_prepend(tmp_path)
    assert "onnxruntime 1.18.1 was built for numpy 1 and numpy 2.0.0 is installed" in notes()


def test_weights_that_an_engine_is_too_old_for_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "__version__", "1.20.1")
    shown = " ".join(m2d("doctor").stdout.split())
    assert "weights=int8-weight-only needs onnxruntime 1.22 or newer" in shown


@pytest.mark.parametrize(("driver", "noted"), [(False, True), (True, False)])
def test_cuda_libraries_without_a_driver_are_noted(
    driver: bool, noted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "version.py").write_text("cuda: Optional[str] = '13.0'\n")
    real, fake = importlib.util.find_spec, SimpleNamespace(submodule_search_locations=[tmp_path])
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: fake if name == "torch" else real(name)
    )
    monkeypatch.setattr(doctor, "_has_nvidia_driver", lambda: driver)
    assert ("the libraries of CUDA 13.0" in notes()) == noted
