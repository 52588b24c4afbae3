"""Two profiles compared: what moved beyond noise, whichever machine measured it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from command_line import m2d
from hypothesis import given
from hypothesis import strategies as st
from noisy_cells import on_a_very_noisy_machine, scored, timed, with_task
from tiny_profile import cell, profile, target

from m2dexport.errors import UsageError
from m2dexport.profile.compare import Figure, compare_profiles, quotient
from m2dexport.profile.intervals import Interval
from m2dexport.profile.manifest import read_profile, write_profile
from m2dexport.profile.schema import Profile


def figure(before: Profile, after: Profile, name: str) -> Figure:
    (change,) = [c for c in compare_profiles(before, after).changes if c.cell == cell(2).id]
    return next(each for each in change.figures if each.name == name)


def test_paired_noise_cancels_and_that_of_other_data_does_not() -> None:
    before, alike = profile(scored(80)), profile(scored(79))
    paired = figure(before, alike, "sts/spearman")
    assert (paired.paired, paired.moved) == (True, True)
    assert paired.change == pytest.approx(-1)
    assert paired.interval.high < -0.8
    other = with_task(profile(scored(79, seed=1)), sha256="1" * 64)
    unpaired = figure(before, other, "sts/spearman")
    assert (unpaired.paired, unpaired.moved) == (False, False)
    assert unpaired.interval.low < -5
    assert "other content" in " ".join(compare_profiles(before, other).remarks)


def test_a_difference_below_a_tenth_of_a_point_is_none_however_sure() -> None:
    assert not figure(profile(scored(80)), profile(scored(79.95)), "sts/spearman").moved


def test_latency_is_compared_by_ratio_so_that_two_machines_compare() -> None:
    before = profile(cell(6), timed(0.5, p50_ms=0.5))
    slow = profile(cell(6, p50_ms=3.0), timed(0.5, p50_ms=1.5))
    assert not figure(before, slow, "latency").moved
    slower = figure(before, profile(cell(6), timed(0.7)), "latency")
    assert slower.moved
    assert slower.change == pytest.approx(1.4)
    assert slower.interval.low > 1.3
    unsure = profile(cell(6), timed(0.7, width=1.6))
    assert not figure(before, unsure, "latency").moved


def test_a_very_noisy_machine_hides_less_than_twice_the_latency_either_way() -> None:
    before, slower, slow = profile(timed(0.1)), profile(timed(0.14)), profile(timed(0.3))
    noisy = on_a_very_noisy_machine(before)
    for one, other in ((noisy, slower), (slower, noisy)):
        assert not figure(one, other, "latency").moved
    assert figure(before, slower, "latency").moved
    for one, other in ((noisy, slow), (slow, noisy)):
        assert figure(one, other, "latency").moved


def test_microseconds_of_a_token_table_are_no_slowdown() -> None:
    before, after = (profile(cell(6), timed(ratio)) for ratio in (0.01, 0.015))
    assert not figure(before, after, "latency").moved


def test_latency_is_left_out_where_the_reference_is_another_cell() -> None:
    comparison = compare_profiles(profile(cell(6), cell(2)), profile(cell(4), cell(2)))
    assert [each.name for each in comparison.changes[0].figures] == [
        *("sts/spearman", "size", "memory")
    ]
    assert "so latency is not compared" in " ".join(comparison.remarks)


def test_what_came_went_failed_or_was_measured_otherwise_is_named() -> None:
    before = profile(cell(6), cell(2), cell(3))
    failed = {
        **{"engine": "onnx", "layers": 3, "align": "none", "weights": "fp32", "reason": "NaN"},
        "cells": [cell(3).id],
    }
    machine = {**target(cell(6), "local")["machine"], "cpu": "another"}
    after = profile(
        *(cell(6), cell(2), cell(4)),
        failures=[failed],
        tools={"m2dexport": "0.2.0"},
        targets=[target(cell(6), "local", machine=machine), target(cell(6), "edge")],
    )
    after = after.model_copy(
        update={"cells": (*after.cells, cell(6, target="edge"))},
    )
    comparison = compare_profiles(before, after)
    assert [each.cell for each in comparison.came if each.target == "local"] == [cell(4).id]
    assert [(each.cell, each.reason) for each in comparison.went] == [(cell(3).id, "NaN")]
    said = " ".join(comparison.remarks)
    assert "m2dexport was 0.1.0 and is 0.2.0." in said
    assert "the machine was a processor, 2 cores, and is another, 2 cores" in said
    assert "The target edge came." in said
    assert not [c for c in compare_profiles(before, after, "local").came if c.target == "edge"]
    with pytest.raises(UsageError, match="no target edge"):
        compare_profiles(before, after, "edge")


def test_a_failure_on_one_target_is_none_on_another(tmp_path: Path) -> None:
    failed = {
        **{"target": "edge", "engine": "onnx", "layers": 3, "align": "none", "weights": "fp32"},
        **{"reason": "NaN", "cells": [cell(3).id]},
    }
    both = [target(cell(6), "local"), target(cell(6), "edge")]
    cells = [cell(layers, target=name) for name in ("local", "edge") for layers in (6, 3)]
    before = profile(*cells, targets=both)
    after = profile(*(each for each in cells if each.layers == 6), targets=both, failures=[failed])
    went = compare_profiles(before, after).went
    assert [(each.target, each.reason) for each in went] == [("local", None), ("edge", "NaN")]
    write_profile(after, tmp_path / "p.json")
    assert "Failed, 1 cell of edge: NaN" in m2d("profile", "show", tmp_path / "p.json").stdout
    aligned = {**failed, "align": "full", "cells": [cell(3, align="full").id]}
    again = profile(cell(6, target="edge"), targets=both[1:], failures=[failed, aligned])
    write_profile(again, tmp_path / "again.json")
    said = m2d("profile", "show", tmp_path / "again.json").stdout
    assert said.count("NaN") == said.count("Failed, 2 cells: NaN") == 1
    for name, said in (("edge", "failed when measured: NaN"), ("local", "has no cell")):
        with pytest.raises(UsageError, match=said):
            read_profile(tmp_path / "p.json").cell(cell(3).id, name)


@given(
    points=st.tuples(*[st.floats(1, 99)] * 2),
    ratios=st.tuples(*[st.floats(0.01, 50)] * 2),
    seeds=st.tuples(*[st.integers(0, 3)] * 2),
)
def test_looking_back_finds_the_same_moves_with_the_opposite_sign(points, ratios, seeds) -> None:
    one, two = (
        profile(
            cell(6),
            scored(p, seed, ratio=r, ratio_interval={"low": r / 1.1, "high": r * 1.1}),
        )
        for p, r, seed in zip(points, ratios, seeds, strict=True)
    )
    there, back = (compare_profiles(*pair).changes[1] for pair in ((one, two), (two, one)))
    for out, home in zip(there.figures, back.figures, strict=True):
        if out.kind == "quality":
            assert out.moved == home.moved
            assert out.change == pytest.approx(-home.change)
            assert out.interval.low == pytest.approx(-home.interval.high, abs=1e-6)
        else:
            assert out.change == pytest.approx(1 / home.change)
    assert not any(f.moved for c in compare_profiles(one, one).changes for f in c.figures)


def test_the_interval_of_a_quotient_covers_it_in_19_of_20_measurements() -> None:
    """Log-normal noise of 5% above and of 10% below, with the intervals that it has."""
    random = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        values = [
            (true * np.exp(random.normal(scale=noise)), np.exp(1.96 * noise))
            for true, noise in ((3.0, 0.05), (2.0, 0.1))
        ]
        (above, a), (below, b) = values
        _, interval = quotient(
            above,
            Interval(low=above / a, high=above * a),
            below,
            Interval(low=below / b, high=below * b),
        )
        held += interval.low <= 1.5 <= interval.high
    assert 0.92 <= held / 400 <= 0.98


def test_diff_prints_what_moved_within_80_columns(tmp_path: Path) -> None:
    long = {"weights": "int8-weight-only", "vectors": "int8-symmetric", "align": "full"}
    name = cell(2, **long).id
    write_profile(profile(cell(6), cell(2), cell(2, **long)), tmp_path / "a.json")
    slower = cell(2, **long, quality=70.0, ratio=2.0, ratio_interval={"low": 1.9, "high": 2.1})
    write_profile(profile(cell(6), cell(2), slower), tmp_path / "b.json")
    arguments = ["profile", "diff", tmp_path / "a.json", tmp_path / "b.json"]
    shown = m2d(*arguments)
    assert shown.exit_code == 0, shown.output
    table = shown.stdout.splitlines()[:4]
    assert table[1] == f"{name} (local)"
    assert [line.split()[0] for line in table[2:]] == ["sts/spearman", "latency"]
    assert max(map(len, table)) <= 80
    assert f"{cell(2).id} (local)" not in shown.stdout
    assert f"{cell(2).id} (local)" in m2d(*arguments, "--all").stdout
    facts = json.loads(m2d(*arguments, "--json").stdout)
    (change,) = facts["changes"]
    assert change["cell"] == name
    assert change["figures"][0]["change"] == pytest.approx(-10)
