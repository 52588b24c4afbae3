"""The action and the example workflow: their shell steps run as GitHub would run them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Client, Listener
from pathlib import Path
from shutil import copyfile
from threading import Thread
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from command_line import m2d

from m2dexport.data import default_task_paths
from m2dexport.profile.intervals import Interval
from m2dexport.profile.manifest import read_profile
from m2dexport.profile.schema import Cell

ROOT = Path(__file__).parent.parent
ACTION = ROOT / "action.yml"
WORKFLOW = ROOT / "examples" / "ci" / "m2dexport.yml"
#: As GitHub runs a step of `shell: bash`.
BASH = ("bash", "--noprofile", "--norc", "-eo", "pipefail", "-c")
SOCKET = "socket"  # in the folder that the steps run in: longer paths are refused
#: Stands on the PATH for m2dexport, and has the test's process, where torch is loaded, run it.
STAND_IN = f"""#!{sys.executable}
import os, sys
from multiprocessing.connection import Client
with Client(os.environ["M2D_SOCKET"], "AF_UNIX") as test:
    test.send(sys.argv[1:])
    code, out, err = test.recv()
sys.stdout.write(out)
sys.stderr.write(err)
sys.exit(code)
"""
TARGET = """description = "one graph"
engine = "onnx"
threads = 1
[grid]
align = ["none"]
layers = [4]
dims = [32]
weights = ["fp32"]
vectors = ["float32", "ubinary"]
[latency]
shapes = [[1, 8]]
[budget]
size_mb = 50.0
"""

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the steps are bash's")


@dataclass(frozen=True)
class Repository:
    """A checked-out repository with what the steps name."""

    folder: Path
    environment: Mapping[str, str]

    def run(self, step: Mapping[str, Any], **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*BASH, step["run"]],
            cwd=self.folder,
            env={**self.environment, **variables},
            capture_output=True,
            text=True,
            check=False,
        )

    def outputs(self) -> dict[str, str]:
        """Return what the steps wrote for those after them."""
        lines = (self.folder / "outputs").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines)


@pytest.fixture
def repository(tmp_path: Path, bert: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Repository]:
    lines = default_task_paths()[0].read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "pairs.tsv").write_text("".join(lines[:60]), encoding="utf-8")
    for name in ("small", "phone"):
        (tmp_path / f"{name}.toml").write_text(TARGET)
    (tmp_path / "model").symlink_to(bert)
    (tmp_path / "bin").mkdir()
    stand_in = tmp_path / "bin" / "m2dexport"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    environment = {
        **os.environ,
        "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "GITHUB_OUTPUT": str(tmp_path / "outputs"),
        "M2D_SOCKET": SOCKET,
    }
    with serving():
        yield Repository(tmp_path, environment)


@contextmanager
def serving() -> Iterator[None]:
    """Run what the stand-in is asked for, one command after the other."""

    def serve(listener: Listener) -> None:
        while True:
            with listener.accept() as shell:
                arguments = shell.recv()
                if arguments is None:
                    return
                result = m2d(*arguments)
                shell.send((result.exit_code, result.stdout, result.stderr))

    with Listener(SOCKET, "AF_UNIX") as listener:
        thread = Thread(target=serve, args=(listener,))
        thread.start()
        yield
        with Client(SOCKET, "AF_UNIX") as last:
            last.send(None)
        thread.join()


def shell_steps(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the steps that run in a shell, but for those that install."""
    return [step for step in steps if "run" in step and step["name"] != "Install"]


def test_the_example_workflow_goes_from_a_checkpoint_to_a_checked_profile(repository) -> None:
    workflow = yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))
    (job,) = workflow["jobs"].values()
    variables = {
        **workflow["env"],
        **{"MODEL": "model", "EVAL": "pairs.tsv", "TARGETS": "small.toml phone.toml"},
        "SLICE": "--layers 1 --dim 16",
    }
    assert variables.keys() == workflow["env"].keys()
    steps = shell_steps(job["steps"])
    for step in steps:
        ran = repository.run(step, **variables)
        assert ran.returncode == 0, f"{step['name']}\n{ran.stdout}{ran.stderr}"
    assert ran.stdout.startswith("::notice title=m2dexport check::There is no profiles/baseline.js")
    (upload,) = [step for step in job["steps"] if "upload-artifact" in step.get("uses", "")]
    out = repository.folder / upload["with"]["path"]
    for made in ("dist/small.m2d", "dist/phone.m2d", "sub-model", "profile/profile.json"):
        assert (out / made).exists(), made
    (repository.folder / "profiles").mkdir()
    copyfile(out / "profile" / "profile.json", repository.folder / variables["BASELINE"])
    ran = repository.run(steps[-1], **variables)
    assert ran.returncode == 0, ran.stderr
    assert ElementTree.parse(out / "check.xml").getroot().find(".//testcase") is not None
    assert "m2dexport check: passed" in (repository.folder / "summary.md").read_text()


def test_the_action_profiles_builds_and_stops_at_a_profile_that_fell_behind(repository) -> None:
    action = yaml.safe_load(ACTION.read_text(encoding="utf-8"))
    assert action["runs"]["using"] == "composite"
    inputs = {name: each["default"] for name, each in action["inputs"].items()}
    inputs |= {"model": "model", "targets": "small.toml", "eval": "pairs.tsv", "out": "out"}
    codes = {}
    for step in shell_steps(action["runs"]["steps"]):
        assert step["shell"] == "bash"
        if step["id"] == "check":
            better_baseline(repository.folder / "out/profile/profile.json", "baseline.json")
            inputs["baseline"] = "baseline.json"
        ran = repository.run(step, **environment_of(step, inputs))
        codes[step["id"]] = ran.returncode
    assert codes == {"profile": 0, "build": 0, "check": 1}, ran.stdout + ran.stderr
    assert "::error title=m2dexport check::4x32-fp32-float32" in ran.stderr
    declared = {
        name: re.fullmatch(r"\$\{\{ steps\.(\w+)\.outputs\.(\w+) \}\}", each["value"]).groups()
        for name, each in action["outputs"].items()
    }
    written = repository.outputs()
    assert {step for step, _ in declared.values()} <= codes.keys()
    assert sorted(key for _, key in declared.values()) == sorted(written)
    assert all((repository.folder / path).exists() for path in written.values())


def test_a_baseline_that_is_not_there_is_a_warning(repository) -> None:
    (check,) = [
        s for s in yaml.safe_load(ACTION.read_text())["runs"]["steps"] if s.get("id") == "check"
    ]
    variables = {"BASELINE": "profiles/typo.json", "OPTIONS": "", "OUT": "out"}
    ran = repository.run(check, **variables)
    assert ran.returncode == 0
    assert ran.stdout.startswith("::warning title=m2dexport check::There is no profiles/typo.json")
    assert "::" not in repository.run(check, **{**variables, "BASELINE": ""}).stdout


@pytest.mark.parametrize("path", [ACTION, WORKFLOW], ids=["action", "workflow"])
def test_the_check_runs_where_no_cell_fits_a_budget(path: Path) -> None:
    """GitHub skips a step after one that failed, unless it says when it runs."""
    stored = yaml.safe_load(path.read_text(encoding="utf-8"))
    steps = stored["runs"]["steps"] if path == ACTION else stored["jobs"]["bundles"]["steps"]
    (check,) = [step for step in steps if "m2dexport check " in step.get("run", "")]
    assert check["if"] == "${{ !cancelled() && steps.profile.outcome == 'success' }}"
    assert "profile" in [step.get("id") for step in steps]


def environment_of(step: Mapping[str, Any], inputs: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of a step of the action, whose values are inputs."""
    names = {
        key: re.fullmatch(r"\$\{\{ inputs\.([\w-]+) \}\}", value)[1]
        for key, value in step["env"].items()
    }
    return {key: inputs[name] for key, name in names.items()}


def better_baseline(path: Path, out: str) -> None:
    """Write a baseline that the profile has fallen 9 points behind."""
    from m2dexport.profile.manifest import write_profile

    measured = read_profile(path)
    better = tuple(_raised(cell, 9) for cell in measured.cells)
    write_profile(measured.model_copy(update={"cells": better}), out)


def _raised(cell: Cell, points: float) -> Cell:
    """Return a cell that is better by so many points in all that it says of quality."""

    def moved(interval: Interval) -> Interval:
        return Interval(low=interval.low + points, high=interval.high + points)

    return cell.model_copy(
        update={
            "quality": {name: value + points for name, value in cell.quality.items()},
            "intervals": {name: moved(each) for name, each in cell.intervals.items()},
            "mean_quality": cell.mean_quality + points,
            "mean_interval": moved(cell.mean_interval),
        }
    )


def test_the_steps_of_the_action_take_their_inputs_as_variables_only() -> None:
    """An expression inside a script would run what an input says."""
    for step in yaml.safe_load(ACTION.read_text(encoding="utf-8"))["runs"]["steps"]:
        assert "${{" not in step.get("run", ""), step["name"]
