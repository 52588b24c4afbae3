"""build --budget: bundles for targets, from a profile or after measuring, in one call."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
from click.testing import Result
from command_line import m2d
from tiny_profile import cell, profile

import m2dexport
from m2dexport.data import default_task_paths
from m2dexport.errors import BundleError
from m2dexport.profile import release
from m2dexport.profile.schema import Profile
from m2dexport.profile.select import Selection, select_cell
from m2dexport.profile.target import load_target
from m2dexport.runtime.archive import open_bundle
from m2dexport.runtime.index import read_index
from m2dexport.runtime.loading import load

#: Small enough to be measured in seconds; a test adds a budget.
TARGET = """
description = "a tiny grid"
engine = "onnx"
threads = 1
[grid]
layers = [2]
dims = [16, 32]
weights = ["fp32"]
vectors = ["float32", "ubinary"]
align = ["none"]
[latency]
shapes = [[1, 8]]
[budget]
"""
#: The same for a GPU, whose graphs onnxruntime runs where there is none.
ELSEWHERE = TARGET.replace('"onnx"', '"tensorrt-rtx"\ngpus = ["8.9"]')
ANY, BITS, NOTHING = "p95_ms = 1e6", "vector_bytes = 4", "size_mb = 0.001"

pytestmark = pytest.mark.usefixtures("unmeasured_memory")


@dataclass(frozen=True)
class Profiled:
    """A folder with a profile of a tiny checkpoint and with targets."""

    folder: Path
    model: Path

    def target(self, name: str, budget: str = ANY, text: str = TARGET) -> Path:
        path = self.folder / f"{name}.toml"
        path.write_text(text + budget)
        return path

    def profile(self) -> Profile:
        return m2dexport.read_profile(self.folder / "p" / "profile.json")

    def best(self, target: Path) -> Selection:
        """Return what ``select`` names for a target."""
        return select_cell(self.profile(), load_target(target).budget)

    def build(self, *targets: Path, out: Path, options: tuple[object, ...] = ()) -> Result:
        """Run ``build --budget`` with the profile."""
        named = [word for target in targets for word in ("--budget", target)]
        profile = ("--profile", self.folder / "p" / "profile.json", "--model", self.model)
        return m2d("build", *named, *profile, "--out", out, *options)

    def measure(self, *targets: Path, out: Path, options: tuple[object, ...] = ()) -> Result:
        """Run ``build --budget`` without one."""
        named = [word for target in targets for word in ("--budget", target)]
        evaluation = ("--eval", self.folder / "pairs.tsv")
        return m2d("build", *named, "--model", self.model, *evaluation, "--out", out, *options)


@pytest.fixture(scope="module")
def profiled(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Profiled:
    folder = tmp_path_factory.mktemp("release")
    lines = default_task_paths()[0].read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "pairs.tsv").write_text("".join(lines[:40]), encoding="utf-8")
    made = Profiled(folder, bert)
    target = made.target("grid")
    measured = m2d(
        *("profile", "--model", bert, "--target", target, "--eval", folder / "pairs.tsv"),
        *("--out", folder / "p"),
    )
    assert measured.exit_code == 0, measured.output
    return made


@pytest.fixture
def sweeps(profiled: Profiled, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The plans that were measured; what a sweep gives is the profile that there is."""
    plans: list[Any] = []

    def measured(checkpoint: Any, tasks: Any, texts: Any, plan: Any, **options: Any) -> Any:
        plans.append(plan)
        options["on_progress"]("export", 0, 1)
        return profiled.profile()

    monkeypatch.setattr(release, "profile_checkpoint", measured)
    return plans


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ids of the cells that were built."""
    cells: list[str] = []
    real: Callable[..., Any] = release.bundle_cell

    def counted(profile: Any, cell: str, *rest: Any, **options: Any) -> Any:
        cells.append(cell)
        return real(profile, cell, *rest, **options)

    monkeypatch.setattr(release, "bundle_cell", counted)
    return cells


def said(result: Result) -> str:
    """Return stderr without the lines of steps that took a while."""
    lines = result.stderr.splitlines(keepends=True)
    return "".join(line for line in lines if not re.search(r": [\d,]+ in \d+ s$", line))


def refused(result: Result) -> str:
    """Return the one sentence with which a command refused to begin."""
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    (sentence,) = result.stderr.splitlines()
    return sentence


def test_each_target_gets_its_best_cell_as_a_bundle_that_verifies(
    profiled: Profiled, sweeps: list[Any], tmp_path: Path
) -> None:
    targets = profiled.target("wide"), profiled.target("bits", BITS)
    shown = profiled.build(*targets, out=tmp_path / "dist")
    assert shown.exit_code == 0, shown.output
    assert not sweeps
    header, *rows = shown.stdout.splitlines()
    assert header.split()[:4] == ["target", "cell", "mean", "p50"]
    best = [profiled.best(target).cell for target in targets]
    assert [row.split()[:2] for row in rows[:2]] == [["wide", best[0].id], ["bits", best[1].id]]
    assert max(map(len, [header, *rows[:2]])) <= 100
    for target, chosen, row in zip(targets, best, rows[2:], strict=True):
        path = tmp_path / "dist" / f"{target.stem}.m2d"
        assert row == m2d("verify", path).stdout.rstrip()
        spec = load(path).spec
        assert (spec.dim, spec.vectors, spec.device.threads) == (chosen.dim, chosen.vectors, 1)


def test_what_fits_no_cell_is_an_error_and_the_other_targets_are_built(
    profiled: Profiled, tmp_path: Path
) -> None:
    targets = profiled.target("none", NOTHING), profiled.target("wide")
    shown = profiled.build(*targets, out=tmp_path / "dist")
    assert shown.exit_code == 1
    assert said(shown).startswith("Error: none: no cell fits the budget; the nearest is 2x")
    assert [row.split()[:2] for row in shown.stdout.splitlines()[1:3]] == [
        ["none", "failed"],
        ["wide", profiled.best(targets[1]).cell.id],
    ]
    assert [path.name for path in (tmp_path / "dist").iterdir()] == ["wide.m2d"]


def test_a_script_reads_what_became_of_each_target(profiled: Profiled, tmp_path: Path) -> None:
    targets = (
        profiled.target("none", NOTHING),
        profiled.target("bits", BITS),
    )
    shown = profiled.build(*targets, out=tmp_path / "dist", options=("--json",))
    assert shown.exit_code == 1
    none, bits = json.loads(shown.stdout)
    assert none["failure"].startswith("no cell fits the budget")
    assert (none["cell"], none["bundle"], none["points"]) == (None, None, None)
    assert (bits["failure"], bits["measured"], bits["unchecked"]) == (None, False, [])
    best = profiled.best(targets[1])
    assert bits["cell"]["id"] == best.cell.id
    assert (bits["points"], bits["metric"], bits["binding"]) == (best.points, "mean", best.binding)
    path = tmp_path / "dist" / "bits.m2d"
    assert bits["bundle"]["path"] == str(path)
    assert bits["bundle"]["size_bytes"] == path.stat().st_size
    assert bits["bundle"]["space_id"] == load(path).spec.space_id


def test_without_a_profile_targets_of_one_plan_are_measured_once(
    profiled: Profiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = []
    real = release.profile_checkpoint

    def counted(*arguments: Any, **options: Any) -> Any:
        plans.append(arguments[3])
        return real(*arguments, **options)

    monkeypatch.setattr(release, "profile_checkpoint", counted)
    targets = profiled.target("wide"), profiled.target("bits", BITS)
    shown = profiled.measure(*targets, out=tmp_path, options=("--json",))
    assert (shown.exit_code, said(shown)) == (0, "")
    found = {each["target"]: each for each in json.loads(shown.stdout)}
    assert [each["measured"] for each in found.values()] == [True, True]
    assert found["bits"]["cell"]["bytes_per_vector"] <= 4
    assert [plan.dims for plan in plans] == [(16, 32)]


def test_a_profile_that_was_measured_otherwise_is_not_used(
    profiled: Profiled, sweeps: list[Any], tmp_path: Path
) -> None:
    other = TARGET.replace('"onnx"', '"openvino"')
    targets = profiled.target("wide"), profiled.target("other", ANY, other)
    shown = profiled.build(*targets, out=tmp_path, options=("--json",))
    assert shown.exit_code == 0, shown.output
    assert [each["measured"] for each in json.loads(shown.stdout)] == [False, True]
    assert said(shown) == (
        "Warning: the profile was measured with onnx on CPUExecutionProvider, and the target runs "
        "openvino on CPU; other is measured now.\n"
    )
    assert [plan.engine for plan in sweeps] == ["openvino"]


def test_a_target_that_cannot_be_measured_does_not_keep_the_others_from_it(
    profiled: Profiled, tmp_path: Path
) -> None:
    elsewhere = TARGET.replace("threads = 1", 'provider = "ABACUS"')
    targets = (
        profiled.target("elsewhere", ANY, elsewhere),
        profiled.target("deep", ANY, TARGET.replace("[2]", "[9]")),
        profiled.target("wide"),
    )
    shown = profiled.build(*targets[:1], *targets[2:], out=tmp_path / "a")
    assert shown.exit_code == 1
    assert "Error: elsewhere: ABACUS is not in this onnxruntime" in shown.stderr
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["wide.m2d"]
    shown = profiled.measure(targets[1], out=tmp_path / "b")
    assert shown.exit_code == 1
    assert said(shown) == "Error: deep: the checkpoint has 0 to 4 layers, not 9.\n"
    assert not (tmp_path / "b").exists()


def test_a_device_that_is_not_here_is_stood_in_for_by_the_oracle_of_its_engine(
    profiled: Profiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_gpu(monkeypatch)
    limits = "p95_ms = 1e-6\nmemory_mb = 1\nvector_bytes = 4"
    target = profiled.target("elsewhere", limits, ELSEWHERE)
    shown = profiled.measure(target, out=tmp_path)
    assert shown.exit_code == 0, shown.output
    row, report, unchecked = shown.stdout.splitlines()[1:]
    assert row.split()[3:5] == ["-", "-"]  # neither p50 nor p95
    assert " golden texts reproduced" in report
    assert unchecked.startswith(
        "elsewhere: not checked here: p95_ms, memory_mb, since tensorrt-rtx needs an NVIDIA GPU"
    )
    path = tmp_path / "elsewhere.m2d"
    files = open_bundle(path)
    assert json.loads(files["artifact.json"])["device"]["provider"] is None
    assert b'gpus = ["8.9"]' in files["engine.toml"]
    assert b"best = [1, 8]" in files["engine.toml"]  # the shape that the target times
    assert m2d("verify", path, "--provider", "CPU").exit_code == 0
    assert "tensorrt-rtx needs an NVIDIA GPU" in m2d("verify", path).stderr


def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime")
    none = runtime.cudaError_t.cudaErrorNoDevice
    monkeypatch.setattr(runtime, "cudaGetDeviceCount", lambda: (none, None))


def test_a_provider_that_is_not_here_is_built_for_on_the_cpu(
    profiled: Profiled, tmp_path: Path
) -> None:
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("the provider is here")
    text = TARGET.replace("threads = 1", 'provider = "CUDAExecutionProvider"')
    target = profiled.target("gpu", ANY, text)
    shown = profiled.measure(target, out=tmp_path, options=("--json",))
    assert shown.exit_code == 0, shown.output
    (found,) = json.loads(shown.stdout)
    assert found["unchecked"] == ["p95_ms"]
    assert "CUDAExecutionProvider is not in this onnxruntime" in found["lacks"]
    assert (found["cell"]["p95_ms"], found["cell"]["latency"]) == (None, None)
    path = tmp_path / "gpu.m2d"
    spec = json.loads(open_bundle(path)["artifact.json"])
    assert spec["device"]["provider"] == "CUDAExecutionProvider"
    assert "CUDAExecutionProvider is not in this onnxruntime" in m2d("verify", path).stderr


def test_depth_0_runs_on_its_own_engine_whatever_the_device_of_the_target_is(
    profiled: Profiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    static = cell(0, engine="static", align="full")
    deployments = []

    def bundled(*arguments: Any, **_: Any) -> None:
        deployments.append(arguments[4])

    no_gpu(monkeypatch)
    monkeypatch.setattr(release, "profile_checkpoint", lambda *_, **__: profile(static))
    monkeypatch.setattr(release, "bundle_cell", bundled)
    monkeypatch.setattr(release, "verify_bundle", lambda *_: None)
    target, checkpoint = profiled.target("elsewhere", ANY, ELSEWHERE), profiled.model
    m2dexport.build_for_targets(m2dexport.open_checkpoint(checkpoint), [target], tmp_path)
    assert [each.device for each in deployments] == [None]


def test_bundles_that_are_there_are_refused_before_any_work_and_replaced_with_force(
    profiled: Profiled, built: list[str], tmp_path: Path
) -> None:
    targets = profiled.target("bits", BITS), profiled.target("wide")
    (tmp_path / "wide.m2d").write_text("mine")
    assert "wide.m2d already exists" in refused(profiled.build(*targets, out=tmp_path))
    assert not built
    assert (tmp_path / "wide.m2d").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["wide.m2d"]
    shown = profiled.build(targets[1], out=tmp_path, options=("--force",))
    assert shown.exit_code == 0, shown.output
    assert built == [profiled.best(targets[1]).cell.id]
    assert read_index(tmp_path / "wide.m2d")


def test_a_bundle_that_does_not_verify_is_not_kept(
    profiled: Profiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise BundleError("it does not reproduce its golden vectors.")

    monkeypatch.setattr(release, "verify_bundle", fails)
    shown = profiled.build(profiled.target("bits", BITS), out=tmp_path)
    assert shown.exit_code == 1
    assert said(shown) == "Error: bits: it does not reproduce its golden vectors.\n"
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--layers", 2),
        ("--dim", 16),
        ("--weights", "fp32"),
        ("--vectors", "int8"),
        ("--engine", "onnx"),
        ("--threads", 1),
        ("--max-drop", 1),
        ("--index", "x.m2d"),
    ],
)
def test_what_a_target_says_is_not_said_beside_it(option: str, value: object) -> None:
    sentence = refused(m2d("build", "--budget", "edge-cpu", option, value))
    assert sentence == (
        f"Error: {option} does not go with --budget, whose target says what is built; leave one of "
        "them out."
    )


def test_options_that_lack_their_partner_are_refused(profiled: Profiled, tmp_path: Path) -> None:
    assert "--profile goes with --budget" in refused(m2d("build", "--profile", "x", "--out", "y"))
    assert "name the artifact folder with --out" in refused(m2d("build"))
    target = profiled.target("wide")
    shown = profiled.build(target, out=tmp_path / "dist", options=("--pooling", "cls"))
    assert "--pooling and --trained are as in the --profile" in refused(shown)


def test_targets_that_cannot_be_told_apart_or_limit_nothing_are_refused(
    profiled: Profiled, tmp_path: Path
) -> None:
    target, free = profiled.target("wide"), profiled.target("free", "")
    assert "two targets are named wide" in refused(profiled.build(target, target, out=tmp_path))
    assert "the target free limits nothing" in refused(profiled.build(free, out=tmp_path))
    assert not any(tmp_path.iterdir())


def test_a_program_builds_for_targets_and_sees_the_steps(
    profiled: Profiled, sweeps: list[Any], tmp_path: Path
) -> None:
    steps: list[str] = []
    (found,) = m2dexport.build_for_targets(
        m2dexport.open_checkpoint(profiled.model),
        [profiled.target("bits", BITS)],
        tmp_path,
        m2dexport.Basis(),
        lambda step, *_: steps.append(step),
    )
    assert found.failure is None
    assert found.path == tmp_path / "bits.m2d"
    assert found.report is not None
    assert list(dict.fromkeys(steps)) == ["bits: export", "bits: build"]
