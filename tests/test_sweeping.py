"""The options of ``profile``: the plans that they make, and what they refuse before the work."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import m2d

from m2dexport.data import shipped_targets
from m2dexport.errors import M2DError, UsageError
from m2dexport.profile import sweep
from m2dexport.profile.plan import Plan
from m2dexport.profile.sweep import Course


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """What a command asks to be measured: its plans and its course. Nothing is."""

    def ask(*options: object) -> tuple[list[Plan], Course]:
        found: list[Any] = []

        def measure(_model: Any, _tasks: Any, _texts: Any, plans: Any, course: Any, _: Any) -> None:
            found.extend([list(plans), course])
            raise UsageError("enough.")

        monkeypatch.setattr(sweep, "profile_checkpoint", measure)
        result = m2d("profile", "--out", tmp_path / "p", *options)
        assert (result.exit_code, result.stdout) == (2, ""), result.output
        assert result.stderr.endswith("enough.\n"), result.stderr
        assert not (tmp_path / "p").exists()
        plans, course = found
        return plans, course

    return ask


def test_a_grid_needs_no_toml(asked: Any) -> None:
    (plan,), _ = asked(
        *("--layers", "1,3", "--dim", "64", "--weights", "int8,fp16", "--vectors", "ubinary"),
        *("--threads", 1, "--shapes", "1x8,4x32", "--align", "none"),
    )
    assert (plan.layers, plan.dims) == ((1, 3), (64,))
    assert (plan.weights, plan.vectors) == (("int8", "fp16"), ("ubinary",))
    assert (plan.device.threads, plan.shapes, plan.align) == (1, ((1, 8), (4, 32)), ("none",))
    (plan,), _ = asked("--align", "none")
    assert plan.layers == (1, 2, 3, 4, 5, 6)


def test_targets_and_engines_make_a_plan_each(asked: Any) -> None:
    plans, course = asked(
        *("--target", "edge-cpu", "--target", "browser", "--engine", "onnx,openvino"),
        *("--dim", "32"),
    )
    assert [(plan.target, plan.engine) for plan in plans] == [
        *(("edge-cpu", "onnx"), ("edge-cpu", "openvino")),
        *(("browser", "onnx"), ("browser", "openvino")),
    ]
    assert {plan.dims for plan in plans} == {(32,)}
    assert plans[1].device.provider is None
    assert set(course.targets) == {"edge-cpu", "browser"}


def test_quick_measures_less_and_thorough_times_longer(asked: Any) -> None:
    (plain,), _ = asked()
    (quick,), course = asked("--quick", "--shard", "2/3")
    (thorough,), _ = asked("--thorough")
    assert (quick.weights, quick.vectors) == (("fp32", "int8"), ("float32", "int8"))
    assert (quick.layers, quick.dims) == (plain.layers, plain.dims)
    assert (len(quick.shapes), course.shard) == (1, (2, 3))
    assert 100 <= quick.repeats < thorough.repeats  # fewer mean no p95
    assert thorough.shapes == plain.shapes


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--quick", "--thorough"), "--quick and --thorough exclude each other"),
        (("--target", "browser", "--target", "browser"), "two targets are named browser"),
        (("--shard", "3/2"), "'3/2' is not one of several parts, such as 2/3"),
        (("--shapes", "1,16"), "'1,16' is not a list of shapes such as 1x16,16x32"),
        (("--shapes", "9999x9999"), "has more than 262,144 tokens"),
        (("--weights", "int3"), "'int3' is none of fp32, fp16"),
        (("--shard", "1/9"), "there are 3 passes to deal out (fp32, fp16, int8), too few for 9"),
    ],
)
def test_what_cannot_be_is_refused_before_the_work(tmp_path: Path, options, sentence: str) -> None:
    result = m2d("profile", "--out", tmp_path / "p", *options)
    assert (result.exit_code, result.stdout) == (2, "")
    assert sentence in " ".join(result.stderr.split())
    assert not (tmp_path / "p").exists()


def test_the_help_names_the_targets_that_ship() -> None:
    shown = "".join(m2d("profile", "--help").stdout.split())
    assert all(name in shown for name in shipped_targets())


@pytest.mark.parametrize("parts", [0, 1])
@pytest.mark.parametrize("by", ["the disk", "Ctrl-C", "SIGTERM"])
def test_what_stops_a_sweep_says_whether_anything_measured_is_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, by: str, parts: int
) -> None:
    def stop(_model: Any, _tasks: Any, _texts: Any, _plans: Any, course: Any, _: Any) -> None:
        for step in range(parts):
            course.parts.remember("memory", step, lambda: 1)
        if by == "Ctrl-C":
            raise KeyboardInterrupt
        if by == "SIGTERM":
            sys.exit(143)  # as the handler of ``main`` does
        try:
            (tmp_path / "none").read_bytes()
        except OSError as error:
            raise M2DError("it stopped.") from error

    monkeypatch.setattr(sweep, "profile_checkpoint", stop)
    result = m2d("profile", "--out", tmp_path / "p")
    kept = "; what was measured is kept: run the same command again to go on"
    if by != "the disk":
        said = f"\nInterrupted{kept if parts else '; nothing was measured'}.\n"
        assert (result.exit_code, result.stderr) == (130 if by == "Ctrl-C" else 143, said)
    else:
        assert (result.exit_code, result.stderr) == (
            1,
            f"Error: it stopped{kept if parts else ''}.\n",
        )


def test_a_cluster_that_does_not_answer_is_one_sentence(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    result = m2d("profile", "--ray", "127.0.0.1:1", "--out", tmp_path / "p")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: there is no Ray cluster at 127.0.0.1:1: ")
    assert result.stderr.endswith("; start one, or name the address of its head.\n")
    assert not (tmp_path / "p").exists()
