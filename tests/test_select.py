"""The frontier and selection."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from command_line import m2d
from hypothesis import given
from hypothesis import strategies as st
from tiny_profile import TIMED, cell, profile, steady, target

from m2dexport.errors import M2DError, UsageError
from m2dexport.profile.frontier import frontier, frontier_line, relations
from m2dexport.profile.limits import fits, standings
from m2dexport.profile.manifest import write_profile
from m2dexport.profile.measured_for import measured_otherwise, require_measured_for
from m2dexport.profile.recommend import reasons, recommend
from m2dexport.profile.schema import Cell, Profile
from m2dexport.profile.select import budget_for, select_cell
from m2dexport.profile.target import Budget, Target, load_target

ANY = Budget.model_validate({})


def test_the_best_cell_within_the_limits_is_selected_and_the_binding_limit_named() -> None:
    slow = cell(6, quality=90.0, p95_ms=9.0)
    fast = cell(4, quality=85.0, p95_ms=4.0)
    poor = cell(2, quality=70.0, p95_ms=1.0)
    found = select_cell(profile(slow, fast, poor), Budget(p95_ms=5.0))
    assert (found.cell, found.binding, found.next_better) == (fast, "p95_ms", slow)
    found = select_cell(profile(slow, fast, poor), Budget(p95_ms=50.0))
    assert (found.cell, found.binding, found.next_better) == (slow, None, None)


def test_two_limits_can_bind_together() -> None:
    big = cell(6, quality=90.0, p95_ms=9.0, size_bytes=90_000_000)
    small = cell(2, quality=70.0)
    found = select_cell(profile(big, small), Budget(p95_ms=5.0, size_mb=20.0))
    assert (found.cell, found.binding) == (small, "p95_ms and size_mb")


def test_quality_can_mean_one_metric() -> None:
    cells = profile(cell(6, quality=90.0), cell(2, quality=70.0))
    found = select_cell(cells, Budget(min_quality=80, metric="sts/pearson"))
    assert (found.cell.layers, found.points) == (6, 89.0)
    with pytest.raises(UsageError, match=r"no metric 'sts/kendall'; it has: mean, sts/pearson"):
        select_cell(cells, Budget(min_quality=80, metric="sts/kendall"))


def test_ties_in_quality_go_to_the_cheaper_cell() -> None:
    cells = profile(cell(6, p50_ms=2.0), cell(5, p50_ms=1.0), cell(4, p50_ms=1.0, size_bytes=9))
    assert select_cell(cells, Budget(p95_ms=50)).cell.layers == 4


def test_when_nothing_fits_the_nearest_cell_and_what_it_misses_are_named() -> None:
    cells = profile(cell(6, quality=90.0, p95_ms=9.0), cell(2, quality=70.0, p95_ms=5.5))
    with pytest.raises(M2DError) as caught:
        select_cell(cells, Budget(p95_ms=5.0, min_quality=60))
    assert "2x64-fp32-float32: p95_ms is 5.5 where 5 is allowed" in str(caught.value)
    assert caught.value.exit_code == 1
    with pytest.raises(M2DError, match="min_quality is 90 where 95 is needed"):
        select_cell(cells, Budget(min_quality=95))


_COSTS = st.tuples(
    st.floats(10, 100),
    st.floats(0.5, 50),
    st.integers(10**6, 10**8),
    st.sampled_from([32, 64, 128, 256, 1536]),
)


@given(st.lists(_COSTS, min_size=1, max_size=12))
def test_no_cell_of_the_frontier_is_dominated_and_every_other_one_is(costs) -> None:
    cells = [
        cell(n + 1, quality=q, p50_ms=p, size_bytes=s, bytes_per_vector=b)
        for n, (q, p, s, b) in enumerate(costs)
    ]
    best = frontier(cells)
    assert best
    for one in cells:
        strictly = [
            other
            for other in cells
            if other.mean_quality > one.mean_quality + 0.1
            and other.p50_ms * 1.05 < one.p50_ms
            and other.size_bytes * 1.01 < one.size_bytes
            and other.bytes_per_vector < one.bytes_per_vector
        ]
        if strictly:
            assert one.id not in best
    top = max(cells, key=lambda c: c.mean_quality)
    rivals = [c for c in cells if c.mean_quality >= top.mean_quality - 0.1]
    assert any(c.id in best for c in rivals)


def noisy(points: float, spread: float, seed: int) -> dict[str, object]:
    """Return the quality of a cell whose figure moves with the data by itself."""
    return {"quality": points, "replicates": {"sts/spearman": steady(points, spread, seed)}}


def test_a_difference_that_other_data_could_reverse_is_none() -> None:
    sure, other = cell(6, **noisy(61, 1, 1), p50_ms=9), cell(5, **noisy(60, 1, 1))
    assert frontier([sure, other]) == {sure.id, other.id}
    unsure = cell(6, **noisy(61, 1, 2), p50_ms=9)
    assert frontier([unsure, other]) == {other.id}


def test_latencies_whose_intervals_meet_are_alike() -> None:
    def timed(layers: int, p50_ms: float, low: float, high: float) -> Cell:
        latency = {**TIMED, "p50_ms": p50_ms, "p50_interval": {"low": low, "high": high}}
        return cell(layers, p50_ms=p50_ms, latency=[latency], quality=80.0 + layers)

    fast, slow = timed(2, 1.0, 0.9, 1.1), timed(6, 2.0, 1.8, 2.2)
    assert frontier([fast, slow]) == {fast.id, slow.id}
    assert frontier([fast, timed(6, 2.0, 1.05, 2.2)]) == {"6x64-fp32-float32"}


def test_where_noise_lets_cells_beat_each_other_in_a_circle_the_best_stays() -> None:
    first = cell(1, quality=60.0, p50_ms=1.0, size_bytes=10_000_000)
    second = cell(2, quality=60.15, p50_ms=1.04, size_bytes=10_099_000)
    third = cell(3, quality=60.06, p50_ms=0.965, size_bytes=10_199_000)
    assert frontier([first, second, third]) == {second.id}


def test_the_line_of_a_picture_rises_along_the_frontier() -> None:
    cells = [
        cell(6, quality=90.0, p50_ms=6.0),
        cell(6, 32, quality=85.0, p50_ms=6.0, bytes_per_vector=8),
        cell(2, quality=70.0, p50_ms=1.0),
        cell(2, 32, quality=69.0, p50_ms=1.02),
        cell(1, quality=60.0, p50_ms=2.0, on_frontier=False),
    ]
    assert [each.id for each in frontier_line(cells)] == [cells[2].id, cells[0].id]
    assert frontier_line([]) == ()


def test_a_cell_that_is_measured_for_comparison_beats_none_and_is_never_chosen() -> None:
    full = cell(6, quality=90.0, flags=("reference",))
    asked = cell(2, quality=80.0)
    assert frontier([full, asked]) == {asked.id}
    found = select_cell(profile(full, asked), ANY)
    assert (found.cell, found.best[0].loss, found.next_better) == (asked, 10.0, None)


def test_within_noise_the_smaller_and_faster_cell_is_chosen() -> None:
    """Figures of the shipped checkpoint."""
    fp32 = cell(6, 384, vectors="int8", quality=60.78, p50_ms=6.68, size_bytes=56_600_000)
    int8 = cell(6, 384, "int8", vectors="int8", quality=60.75, p50_ms=4.56, size_bytes=14_800_000)
    shallow = cell(1, 384, "int8", vectors="int8", quality=57.42, p50_ms=0.38, size_bytes=6_100_000)
    found = select_cell(profile(fp32, int8, shallow), Budget(vector_bytes=384))
    assert found.cell == int8
    assert [choice.cell for choice in found.best] == [int8, shallow]


_LIMITS = st.fixed_dictionaries(
    {},
    optional={
        "p50_ms": st.floats(0.5, 60),
        "p95_ms": st.floats(0.5, 60),
        "size_mb": st.floats(1, 100),
        "vector_bytes": st.sampled_from([31, 64, 128, 2000]),
        "min_quality": st.floats(0, 100),
    },
)


@given(st.lists(_COSTS, min_size=1, max_size=12), _LIMITS, st.floats(0, 3))
def test_whatever_the_limits_the_choice_is_on_the_frontier(costs, limits, spread) -> None:
    cells = [
        cell(n + 1, p50_ms=p, p95_ms=p * 1.5, size_bytes=s, bytes_per_vector=b, **quality)
        for n, (q, p, s, b) in enumerate(costs)
        for quality in [noisy(q, spread, n)]
    ]
    budget = Budget.model_validate(limits)
    on = frontier(cells)
    fitting = [each for each in cells if fits(standings(each, each.mean_quality, budget))]
    if not fitting:
        with pytest.raises(M2DError, match="no cell fits the budget; the nearest is "):
            select_cell(profile(*cells), budget)
        return
    found = select_cell(profile(*cells), budget)
    assert found.cell in fitting
    among = [each for each in fitting if each.id in on] or fitting
    assert found.cell in among
    assert (found.beaten_by is None) == (found.cell.id in on)
    compared = relations(cells)
    chosen = cells.index(found.cell)
    for rival in (cells.index(each) for each in among if each.id in on):
        assert not compared.better[rival, chosen]
        cheaper = compared.dearer[chosen, rival] and not compared.dearer[rival, chosen]
        assert compared.better[chosen, rival] or not cheaper


def test_a_cell_that_depends_on_its_batch_is_chosen_with_consent_only(tmp_path: Path) -> None:
    mixing = cell(6, weights="int8-dynamic", quality=90.0, flags=("batch_dependent",))
    other = cell(6, quality=89.0)
    assert frontier([mixing, other]) == {mixing.id, other.id}
    found = select_cell(profile(other, mixing), ANY)
    assert (found.cell, found.without_consent) == (other, mixing)
    found = select_cell(profile(other, mixing), ANY, allow_batch_dependent=True)
    assert (found.cell, found.without_consent) == (mixing, None)
    write_profile(profile(other, mixing), tmp_path / "p.json")
    asked = ("select", tmp_path / "p.json", "--p95-ms", 5)
    assert f"{mixing.id} would be chosen, but" in m2d(*asked).stdout
    assert f"--cell {mixing.id} --allow-batch" in m2d(*asked, "--allow-batch-dependent").stdout


def test_the_loss_is_that_against_the_full_cell_with_the_interval_of_pairs() -> None:
    full = cell(6, 384, **noisy(61, 1, 1))
    small = cell(6, 128, **noisy(60, 1, 1), size_bytes=1_000_000, bytes_per_vector=128)
    (choice,) = select_cell(profile(full, small), Budget(size_mb=5)).best
    assert choice.loss == pytest.approx(1)
    assert choice.loss_interval == pytest.approx((1, 1), abs=0.05)


def test_how_near_a_limit_is_against_noise_is_said() -> None:
    latency = {**TIMED, "p95_ms": 4.8, "p95_interval": {"low": 4.5, "high": 5.3}}
    near = cell(6, p95_ms=4.8, latency=[latency])
    (first, second) = select_cell(profile(near), Budget(p95_ms=5, size_mb=20)).best[0].standings
    assert first.sentence() == "p95 4.8 of 5 ms, within its noise"
    assert second.sentence() == "size 10 of 20 MB"


def test_the_noise_of_a_metric_that_was_asked_for_is_said(tmp_path: Path) -> None:
    write_profile(profile(cell(6, **noisy(80, 1, 1)), cell(2, **noisy(70, 1, 2))), tmp_path / "p")
    asked = ("select", tmp_path / "p", "--metric", "sts/spearman", "--min-quality", "79.5")
    line, _, row, *rest = m2d(*asked).stdout.splitlines()
    low, high = json.loads(m2d(*asked, "--json").stdout)["best"][0]["interval"]
    shown = f"80.00 ±{(high - low) / 2:.1f}"
    assert line.startswith(f"6x64-fp32-float32: sts/spearman {shown}, p50")
    assert shown in row
    assert rest[0] == "Limits: sts/spearman 80.00 where 79.5 is needed, within its noise."
    assert rest[2].startswith("Noise is that of sts/spearman (± is half of its 95% interval)")
    unknown = m2d("select", tmp_path / "p", "--metric", "sts/pearson").stdout
    assert "sts/pearson has no replicates" in unknown
    assert "±" not in unknown


def test_what_one_raised_limit_would_allow_is_said_when_nothing_fits() -> None:
    poor = cell(2, quality=30.0, p95_ms=5.2, size_bytes=10_000_000)
    good = cell(6, quality=90.0, p95_ms=7.8123, size_bytes=19_000_000, p50_ms=2.0)
    both = cell(12, quality=95.0, p95_ms=9.0, size_bytes=90_000_000, p50_ms=3.0)
    with pytest.raises(M2DError) as caught:
        select_cell(profile(both, good, poor), Budget(p95_ms=5, size_mb=20))
    assert str(caught.value) == (
        f"no cell fits the budget; the nearest is {poor.id}: p95_ms is 5.2 where 5 is allowed; "
        f"raise p95_ms to 7.82 for {good.id} with mean 90.00."
    )


def test_a_cell_off_the_frontier_is_chosen_only_where_none_of_it_fits_and_that_is_said() -> None:
    beaten = cell(5, quality=80.0, p50_ms=2.0, p95_ms=3.0)
    winner = cell(6, quality=90.0, p50_ms=2.0, p95_ms=9.0)
    found = select_cell(profile(winner, beaten), Budget(p95_ms=5))
    assert (found.cell, found.beaten_by) == (beaten, winner)
    small = cell(1, quality=50.0, p50_ms=1.0, p95_ms=1.0)
    found = select_cell(profile(winner, beaten, small), Budget(p95_ms=5))
    assert (found.cell, found.beaten_by) == (small, None)
    assert found.passed_over is not None
    assert found.passed_over.cell == beaten


def of_targets(**budgets: dict[str, float]) -> Profile:
    """Return a profile whose targets have the same two cells, at other latencies."""
    cells = [
        cell(layers, quality=70.0 + layers, p95_ms=layers * (place + 1.0), target=name)
        for place, name in enumerate(budgets)
        for layers in (6, 2)
    ]
    targets = [target(cells[0], name, budget=budget) for name, budget in budgets.items()]
    return profile(*cells, targets=targets)


def test_a_target_that_the_profile_holds_has_its_own_cells_and_budget(tmp_path: Path) -> None:
    held = of_targets(local={}, pi={"p95_ms": 9.0, "vector_bytes": 256.0})
    name, budget = budget_for(held, "pi")
    assert (name, budget) == ("pi", Budget(p95_ms=9.0, vector_bytes=256))
    assert select_cell(held, budget, target="pi").cell.layers == 2
    assert select_cell(held, budget, target="local").cell.layers == 6
    name, budget = budget_for(held, "edge-cpu", p95_ms=7.0)
    assert (name, budget.p95_ms) == ("local", 7.0)
    path = tmp_path / "p.json"
    write_profile(held, path)
    assert (
        "several targets; name one by --target: local, pi."
        in m2d("select", path, "--p95-ms", 5).stderr
    )
    assert "--target pi --out" in m2d("select", path, "--target", "pi").stdout


def test_the_cells_worth_shipping_are_the_best_the_knee_and_the_smallest() -> None:
    cells = [
        cell(6, 384, quality=80.0, p50_ms=8.0, size_bytes=60_000_000),
        cell(6, 384, "int8", quality=79.95, p50_ms=4.0, size_bytes=15_000_000),
        cell(4, 384, "int8", quality=79.0, p50_ms=1.0, size_bytes=8_000_000),
        cell(2, 384, "int8", quality=73.0, p50_ms=0.8, size_bytes=6_000_000),
        cell(1, 384, "int8", quality=40.0, p50_ms=0.4, size_bytes=4_000_000),
        cell(6, 32, "int8-dynamic", quality=90.0, flags=("batch_dependent",)),
    ]
    share = [each.model_copy(update={"retention": each.mean_quality / 80}) for each in cells]
    found = recommend(share, Budget(p50_ms=0.5))
    names = (found.best, found.balanced, found.smallest, found.within_budget)
    assert names == tuple(cells[index].id for index in (1, 2, 3, 4))
    whys = {role: reason.why for reason in reasons(found, share) for role in reason.roles}
    assert whys["smallest"] == (
        "it keeps 91% of the reference's quality in 6.0 MB, though it loses 7.0 points on "
        "sts/spearman"
    )
    assert recommend(share, Budget(p50_ms=0.1)).within_budget is None
    assert recommend(share, Budget(p50_ms=9, metric="another/metric")).within_budget is None


def test_noise_is_no_difference() -> None:
    quick = cell(6, quality=90.00, p50_ms=1.00)
    same = cell(5, quality=90.05, p50_ms=1.03)
    assert frontier([quick, same]) == {quick.id, same.id}
    worse = cell(4, quality=89.0, p50_ms=1.03)
    assert frontier([quick, worse]) == {quick.id}


def test_tens_of_microseconds_are_no_difference() -> None:
    first = cell(0, align="full", quality=60.0, p50_ms=0.03)
    second = cell(0, weights="int8", align="full", quality=59.0, p50_ms=0.012)
    assert frontier([first, second]) == {first.id}
    faster = cell(0, weights="int8", align="full", quality=59.0, p50_ms=0.005)
    assert frontier([first, faster]) == {first.id, faster.id}


def test_a_target_of_another_engine_or_provider_is_refused_and_of_other_threads_warned() -> None:
    measured = profile(cell())
    require_measured_for(measured, load_target("edge-cpu"))
    for name in ("edge-openvino", "server-gpu"):
        with pytest.raises(UsageError, match="profile with that target first"):
            require_measured_for(measured, load_target(name))
    with pytest.warns(UserWarning, match="measured with 2 threads, and the target has 1"):
        require_measured_for(measured, load_target("browser"))


def asked(folder: Path, text: str) -> Target:
    """Return a target of onnx on the CPU with more keys."""
    path = folder / "mine.toml"
    path.write_text(f'description = "x"\nengine = "onnx"\n{text}\n')
    return load_target(path)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", None),
        ("threads = 2", None),
        ("threads = 3", None),
        ("threads = 1", "measured with 2 threads, and the target has 1"),
        ('isa = "vnni"', "int8 weights of isa=portable, and the target asks for isa=vnni"),
        ('provider = "ABACUS"', "with onnx on CPUExecutionProvider, .* runs onnx on ABACUS"),
    ],
)
def test_how_a_profile_was_measured_otherwise_is_said(
    tmp_path: Path, text: str, reason: str | None
) -> None:
    found = measured_otherwise(profile(cell(), cell(weights="int8")), asked(tmp_path, text))
    assert found is None if reason is None else re.search(reason, found or "")


def test_int8_weights_for_other_processors_are_refused(tmp_path: Path) -> None:
    target = asked(tmp_path, 'isa = "vnni"')
    with pytest.raises(UsageError, match="isa=vnni; profile with that target first"):
        require_measured_for(profile(cell(), cell(weights="int8")), target)
    require_measured_for(profile(cell(), cell(0, weights="int8", align="full")), target)


def test_a_profile_that_spins_for_longer_than_a_target_allows_is_refused(tmp_path: Path) -> None:
    spinning = {"provider": "CPUExecutionProvider", "threads": 2, "spin_us": 200, "workers": 1}
    measured = profile(cell(device=spinning))
    path = tmp_path / "guest.toml"
    for spin_us in (0, 199, 200):
        path.write_text(f'description = "x"\nengine = "onnx"\nspin_us = {spin_us}\n')
        if spin_us < 200:
            with pytest.raises(UsageError, match=f"spin for 200 micro.* allows {spin_us}; profile"):
                require_measured_for(measured, load_target(path))
    require_measured_for(measured, load_target(path))
