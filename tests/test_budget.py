"""Targets, the frontier and selection."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_profile import cell, profile

from m2dexport.errors import M2DError, UsageError
from m2dexport.profile.select import frontier, select_cell
from m2dexport.profile.target import Budget, budget_from, load_target

SHIPPED = ("browser", "edge-cpu", "server-cpu", "server-gpu")


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_target_is_valid_and_limits_something(name: str) -> None:
    target = load_target(name)
    assert target.description
    assert budget_from(name) == target.budget


def test_a_target_is_found_by_name_and_by_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('description = "x"\nengine = "onnx"\nprovider = "CPUExecutionProvider"\n')
    assert load_target(path).threads is None
    with pytest.raises(UsageError, match=r"those are: browser, edge-cpu, edge-openvino, server"):
        load_target("edge")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("threds = 2", r"mine\.toml has an unknown key threds \(did you mean threads\?\); allowed"),
        ("[budget]\nsize = 2", r"unknown key budget\.size \(did you mean size_mb\?\); allowed are"),
        ("threads = 0", r"threads is 0; input should be greater than 0"),
        ('[grid]\nweights = ["int9"]', r"grid\.weights\.0 is 'int9'; input should be 'fp32'"),
        ("[latency]\nshapes = []", r"latency\.shapes is \[\]"),
        ("threads =", r"cannot be read as TOML"),
    ],
)
def test_a_wrong_target_is_named_by_file_and_key(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.toml"
    head = 'description = "x"\nengine = "onnx"\nprovider = "CPUExecutionProvider"\n'
    path.write_text(head + text + "\n")
    with pytest.raises(UsageError, match=message):
        load_target(path)


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('description = "x"\nprovider = "y"\n')
    with pytest.raises(UsageError, match="lacks the key engine"):
        load_target(path)


def test_options_replace_the_limits_of_a_target() -> None:
    budget = budget_from("edge-cpu", p95_ms=3.0, size_mb=None)
    assert budget.p95_ms == 3.0
    assert budget.size_mb == load_target("edge-cpu").budget.size_mb


def test_a_budget_without_limits_is_refused() -> None:
    with pytest.raises(UsageError, match="no limit is given"):
        budget_from(None)
    with pytest.raises(UsageError, match="p95_ms is -1"):
        budget_from(None, p95_ms=-1)


def test_a_floor_of_zero_is_a_limit() -> None:
    assert budget_from(None, min_quality=0.0).min_quality == 0


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


def test_noise_is_no_difference() -> None:
    quick = cell(6, quality=90.00, p50_ms=1.00)
    same = cell(5, quality=90.05, p50_ms=1.03)
    assert frontier([quick, same]) == {quick.id, same.id}
    worse = cell(4, quality=89.0, p50_ms=1.03)
    assert frontier([quick, worse]) == {quick.id}
