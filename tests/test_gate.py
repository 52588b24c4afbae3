"""The gate: a profile fails when it fell behind its baseline beyond the limits and beyond noise."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from command_line import m2d
from hypothesis import given
from hypothesis import strategies as st
from noisy_cells import noisy, on_a_very_noisy_machine, scored, timed, with_task
from tiny_profile import cell, profile, target

from m2dexport.cli.verdicts import junit_xml, markdown
from m2dexport.errors import UsageError
from m2dexport.profile.gate import Limits, Scope, check_profile
from m2dexport.profile.manifest import write_profile
from m2dexport.profile.schema import Profile

SMALL = cell(2).id
ALL = Scope(all_cells=True)


def failed(profile: Profile, baseline: Profile, **scope: Any) -> list[str | None]:
    checks = check_profile(profile, baseline, scope=Scope(all_cells=True, **scope)).failures
    return [check.figure.name if check.figure else check.failure for check in checks]


def of_checkpoint(measured: Profile, **values: Any) -> Profile:
    info = measured.checkpoint.model_copy(update=values)
    return measured.model_copy(update={"checkpoint": info})


def test_a_profile_passes_against_itself() -> None:
    same = profile(cell(6), scored(80))
    verdict = check_profile(same, same)
    assert not verdict.failures
    assert {check.figure.name for check in verdict.checks} == {"sts/spearman", "latency", "size"}


def test_quality_fails_beyond_the_limit_and_beyond_noise() -> None:
    baseline = profile(cell(6), scored(80))
    assert failed(profile(cell(6), scored(79)), baseline) == ["sts/spearman"]
    assert failed(profile(cell(6), scored(79.6)), baseline) == []
    noise = with_task(profile(cell(6), scored(79, seed=1)))
    verdict = check_profile(noise, baseline, scope=Scope(cells=(SMALL,)))
    assert not verdict.failures
    assert [check.figure.name for check in verdict.checks if check.within_noise] == ["sts/spearman"]


def test_strict_limits_fail_what_is_too_noisy_to_tell() -> None:
    baseline = profile(cell(6), scored(80))
    few = {"replicates": {"sts/spearman": noisy(60, seed=1, spread=15.0)}}
    slow = {"ratio": 1.5, "ratio_interval": {"low": 0.5, "high": 4}}
    fell = profile(cell(6), cell(2, quality=60.0, **few, **slow))
    lenient, strict = (
        check_profile(fell, baseline, Limits(strict=each), Scope(cells=(SMALL,)))
        for each in (False, True)
    )
    assert not lenient.failures
    assert lenient.remarks[0].startswith(
        "2 figures are worse than is allowed, and too noisy to tell, such as sts/spearman of 2x64-"
    )
    failures = [check.failure for check in strict.failures]
    assert (
        failures[0] == "sts/spearman fell by 20.00 points, and 0.5 are allowed, which may be noise"
    )
    assert failures[1].startswith("latency rose 1.50 times")
    assert "too noisy" not in " ".join(strict.remarks)
    same = check_profile(baseline, baseline, Limits(strict=True))
    assert not same.failures


def test_a_very_noisy_machine_hides_a_tenth_and_no_doubling() -> None:
    baseline = profile(cell(6), timed(0.1))
    of_noise = profile(cell(6), timed(0.14)), profile(cell(6), timed(0.3))
    little, much = (
        check_profile(on_a_very_noisy_machine(each), baseline, scope=ALL) for each in of_noise
    )
    assert not little.failures
    (noisy_one,) = [check for check in little.checks if check.within_noise]
    (case,) = ElementTree.fromstring(junit_xml(little).encode()).findall(".//skipped/..")
    assert (case.get("name"), noisy_one.figure.name) == ("latency", "latency")
    assert markdown(little).startswith("## m2dexport check: passed, 1 too noisy to tell\n")
    (failure,) = [check.failure for check in much.failures]
    assert failure == "latency rose 3.00 times, and 1.1 are allowed"


def test_microseconds_of_a_token_table_fail_under_no_limits() -> None:
    wide = {"low": 0.001, "high": 0.1}
    slow = profile(cell(6), cell(2, ratio=0.015, ratio_interval=wide))
    fast = profile(cell(6), cell(2, ratio=0.01, ratio_interval=wide))
    verdict = check_profile(slow, fast, Limits(strict=True), Scope(all_cells=True))
    assert not verdict.failures


@pytest.mark.parametrize("limits", [{"quality_drop": "nan"}, {"slowdown": "inf"}, {"growth": 0.5}])
def test_a_limit_that_limits_nothing_is_refused(limits: dict[str, Any]) -> None:
    same = profile(cell(6))
    (name, value), *_ = limits.items()
    with pytest.raises(UsageError, match=f"--max-{name.replace('_', '-')} is {value}; it must be"):
        check_profile(same, same, Limits(**{name: float(value)}))


def test_a_cell_that_ran_by_other_threads_or_elsewhere_is_named() -> None:
    device = cell(2).device
    ran = [{"threads": 1}, {"provider": "CUDAExecutionProvider"}, {"spin_us": 10}]
    now = [cell(2, device=device.model_copy(update=each).model_dump()) for each in ran]
    baseline = profile(cell(6), cell(2))
    said = [
        [
            r
            for r in check_profile(profile(cell(6), each), baseline, scope=ALL).remarks
            if " ran " in r
        ]
        for each in now
    ]
    before = f"local: {SMALL} ran on CPUExecutionProvider by 2 threads, and runs on "
    assert said == [
        [f"{before}CPUExecutionProvider by 1 threads."],
        [f"{before}CUDAExecutionProvider by 2 threads."],
        [],
    ]


def test_latency_fails_beyond_the_limit_and_beyond_noise() -> None:
    baseline = profile(cell(6), timed(0.5))
    assert failed(profile(cell(6), timed(0.6)), baseline) == ["latency"]
    assert failed(profile(cell(6), timed(0.54)), baseline) == []
    assert failed(profile(cell(6), timed(0.6, width=1.5)), baseline) == []
    assert failed(profile(cell(6, p50_ms=2.0), timed(0.5)), baseline) == []  # a slower machine


def test_a_file_that_grew_or_a_cell_that_is_missing_or_failed_fails() -> None:
    baseline = profile(cell(6), cell(2))
    assert failed(profile(cell(6), cell(2, size_bytes=11_000_000)), baseline) == ["size"]
    assert failed(profile(cell(6)), baseline) == ["was not measured"]
    nan = {
        **{"engine": "onnx", "layers": 2, "align": "none", "weights": "fp32", "reason": "NaN"},
        "cells": [SMALL],
    }
    now = profile(cell(6), failures=[nan])
    assert failed(now, baseline) == ["failed when measured: NaN"]


def test_the_reference_and_the_recommended_cells_are_checked_by_default() -> None:
    told = {
        **dict.fromkeys(("best", "balanced"), cell(6).id),
        **{"smallest": cell(1).id, "within_budget": cell(2).id},
    }
    cells = (cell(6), cell(3), cell(2), cell(1))
    baseline = profile(*cells, targets=[target(cell(6), "local", recommended=told)])
    checked = {check.cell for check in check_profile(baseline, baseline).checks}
    assert checked == {cell(6).id, cell(1).id, cell(2).id}


def test_a_baseline_of_another_checkpoint_counts_when_that_is_the_point() -> None:
    now = profile(cell(6), cell(2))
    retrained = of_checkpoint(now, sha256="1" * 64)
    with pytest.raises(UsageError, match="pass --other-checkpoint"):
        check_profile(retrained, now)
    verdict = check_profile(retrained, now, scope=Scope(other_checkpoint=True))
    assert not verdict.failures
    assert "The checkpoint is another" in verdict.remarks[0]
    pooled = of_checkpoint(now, model_sha256="1" * 64)
    with pytest.raises(UsageError, match="of the same weights with another tokenizer"):
        check_profile(pooled, now)
    verdict = check_profile(pooled, now, scope=Scope(other_checkpoint=True))
    assert "The checkpoint has the same weights, and another tokenizer" in verdict.remarks[0]
    deeper = of_checkpoint(now, sha256="1" * 64, layers=12)
    with pytest.raises(UsageError, match="of 6 layers and 384 dims, and the profile of one of 12"):
        check_profile(deeper, now, scope=Scope(other_checkpoint=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shard": "1/2"}, "the profile is the shard 1/2; join all shards"),
        ({"tasks": ()}, r"the baseline has the task sts/spearman, and the profile has not"),
        ({"targets": ("edge",)}, "the baseline has the target local, and the profile has edge"),
    ],
)
def test_what_does_not_compare_is_refused_in_a_sentence(change, message: str) -> None:
    baseline = profile(cell(6), cell(2))
    if "targets" in change:
        now = profile(cell(6, target="edge"), targets=[target(cell(6), "edge")])
    else:
        now = baseline.model_copy(update=change)
    with pytest.raises(UsageError, match=message):
        check_profile(now, baseline)
    with pytest.raises(UsageError, match="other content than the baseline's"):
        check_profile(with_task(baseline, sha256="1" * 64), baseline)
    with pytest.raises(UsageError, match="the baseline has no cell 'x'"):
        check_profile(baseline, baseline, scope=Scope(cells=("x",)))
    with pytest.raises(UsageError, match="leave one out"):
        check_profile(baseline, baseline, scope=Scope(cells=(SMALL,), all_cells=True))


@given(
    points=st.floats(70, 85),
    ratio=st.floats(0.2, 2),
    size=st.integers(9_000_000, 12_000_000),
    limits=st.tuples(st.floats(0, 5), st.floats(1, 2), st.floats(1, 2)),
    more=st.tuples(st.floats(0, 5), st.floats(0, 1), st.floats(0, 1)),
)
def test_looser_limits_fail_no_more_figures(points, ratio, size, limits, more) -> None:
    interval = {"low": ratio / 1.05, "high": ratio * 1.05}
    now = profile(cell(6), scored(points, ratio=ratio, ratio_interval=interval, size_bytes=size))
    baseline = profile(cell(6), scored(80.0))
    loose = Limits(*(a + b for a, b in zip(limits, more, strict=True)))
    strict_failures, loose_failures = (
        {check.figure.name for check in check_profile(now, baseline, each).failures}
        for each in (Limits(*limits), loose)
    )
    assert loose_failures <= strict_failures


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a baseline, a profile that fell behind, and no sign of GitHub."""
    for name in ("GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    write_profile(profile(cell(6), timed(0.5)), "baseline.json")
    write_profile(profile(cell(6), timed(0.9)), "slow.json")
    return tmp_path


def check(*arguments: object) -> Any:
    return m2d("check", *arguments, "--baseline", "baseline.json", "--all")


def test_the_exit_code_says_what_became_of_the_gate(files: Path) -> None:
    passed, fell = check("baseline.json"), check("slow.json")
    assert passed.exit_code == 0, passed.output
    assert fell.exit_code == 1
    assert "FAILED" in fell.stdout
    assert max(map(len, fell.stdout.splitlines()[:4])) <= 80
    assert f"1 of 6 figures, the first of {SMALL} (local): latency rose 1.80 times" in fell.stderr
    assert "::error" not in fell.output
    assert check("slow.json", "--max-slowdown", 2).exit_code == 0
    assert check("slow.json", "--max-slowdown", 0.5).exit_code == 2
    for option in ("--max-quality-drop", "--max-slowdown", "--max-growth"):
        for value in ("nan", "inf", "-1"):
            refused = check("slow.json", option, value)
            assert refused.exit_code == 2
            assert f"Invalid value for '{option}': {value}" in refused.stderr
    assert check("missing.json").exit_code == 2
    facts = json.loads(check("slow.json", "--json").stdout)
    assert facts["passed"] is False
    assert [each["figure"]["name"] for each in facts["checks"] if each["failure"]] == ["latency"]


def test_junit_has_a_case_per_figure_and_markdown_a_row(files: Path) -> None:
    check("slow.json", "--junit", "out/check.xml", "--markdown", "out/check.md")
    suite = ElementTree.parse("out/check.xml").getroot().find("testsuite")
    assert (suite.get("tests"), suite.get("failures")) == ("6", "1")
    failure = suite.find(f"testcase[@classname='local.{SMALL}'][@name='latency']/failure")
    assert "latency rose 1.80 times, and 1.1 are allowed" in failure.get("message")
    rows = [line for line in Path("out/check.md").read_text().splitlines() if line[:1] == "|"]
    assert len(rows) == 2 + 6
    assert rows[2].endswith("| FAILED |")


def test_github_is_told_where_it_runs_the_check(files: Path, monkeypatch) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(files / "summary.md"))
    (files / "summary.md").write_text("before\n")
    told = check("slow.json", "--json")
    (line,) = [line for line in told.stderr.splitlines() if line.startswith("::")]
    assert line.startswith(f"::error title=m2dexport check::{SMALL} (local): latency rose 1.80")
    json.loads(told.stdout)
    assert (files / "summary.md").read_text().startswith("before\n## m2dexport check: failed")


def test_a_device_picks_a_cell_from_profile_json_without_pydantic(tmp_path: Path) -> None:
    """By the block of docs/profile.md, which uses json and nothing else."""
    page = (Path(__file__).parent.parent / "docs" / "profile.md").read_text(encoding="utf-8")
    block = page.partition("## Read without m2dexport")[2].partition("```python\n")[2]
    code = block.partition("```")[0]
    write_profile(profile(cell(6, p95_ms=9.0), cell(2)), tmp_path / "profile" / "profile.json")
    alone = "import sys\nfor name in ('pydantic', 'torch', 'm2dexport'): sys.modules[name] = None\n"
    ran = subprocess.run(
        [sys.executable, "-c", alone + code],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith(SMALL)
