"""The frontier and selection."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_profile import cell, profile

from m2dexport.errors import M2DError, UsageError
from m2dexport.profile.select import frontier, require_measured_for, select_cell
from m2dexport.profile.target import Budget, load_target


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


def test_a_target_of_another_engine_or_provider_is_refused_and_of_other_threads_warned() -> None:
    measured = profile(cell())
    require_measured_for(measured, load_target("edge-cpu"))
    for name in ("edge-openvino", "server-gpu"):
        with pytest.raises(UsageError, match="profile with that target first"):
            require_measured_for(measured, load_target(name))
    with pytest.warns(UserWarning, match="measured with 2 threads, and the target has 1"):
        require_measured_for(measured, load_target("browser"))
