"""Flags: what a cell's figures say against it, beyond noise."""

from __future__ import annotations

import numpy as np
from tiny_profile import TIMED, cell, steady

from m2dexport.profile.flags import judged
from m2dexport.profile.schema import Cell


def flags(*cells: Cell, trained: tuple[tuple[int, int], ...] | None = None) -> dict[str, set[str]]:
    """Return the flags of cells by id; not those of cells that cost more for nothing."""
    return {each.id: set(each.flags) - {"not_significant"} for each in judged(cells, trained)}


def on_tasks(layers: int, dim: int, *points: float, **values: object) -> Cell:
    """Return a cell with points on several tasks, which move by one with other data."""
    names = [f"task{place}/ndcg@10" for place in range(len(points))]
    return cell(
        layers,
        dim,
        quality=float(np.mean(points)),
        **values,
    ).model_copy(
        update={
            "quality": dict(zip(names, points, strict=True)),
            "replicates": {
                name: steady(each, 1.0, seed)
                for seed, (name, each) in enumerate(zip(names, points, strict=True))
            },
        }
    )


def test_a_cell_that_falls_below_half_of_a_smaller_one_on_one_task_has_collapsed() -> None:
    """As Starbucks' (10, 512) did on Quora: .0178, where (8, 256) has .7808."""
    smaller = on_tasks(8, 256, 78.08, 60.0)
    fallen = on_tasks(10, 512, 1.78, 65.0)
    other_weights = on_tasks(10, 512, 20.0, 65.0, weights="int8")
    wider_only = on_tasks(6, 768, 30.0, 60.0)
    found = flags(smaller, fallen, other_weights, wider_only)
    assert {name for name, each in found.items() if "collapsed" in each} == {fallen.id}


def test_what_other_data_could_lift_above_half_has_not_collapsed() -> None:
    smaller, near = on_tasks(8, 256, 60.0), on_tasks(10, 256, 28.6)
    loose = near.model_copy(update={"replicates": {"task0/ndcg@10": steady(28.6, 1.0, 9)}})
    assert "collapsed" in flags(smaller, near)[near.id]
    assert "collapsed" not in flags(smaller, loose)[loose.id]


def test_a_deeper_cell_is_below_a_shallower_one_beyond_noise_only() -> None:
    shallow = on_tasks(2, 64, 70.0)
    below, within = on_tasks(4, 64, 69.0), on_tasks(4, 64, 69.95)
    assert flags(shallow, below)[below.id] == {"below_shallower"}
    assert flags(shallow, within)[within.id] == set()
    above_next = on_tasks(6, 64, 69.5)
    assert flags(shallow, below, above_next)[above_next.id] == set()


def test_a_cell_is_slower_than_fp32_where_their_intervals_do_not_meet() -> None:
    def timed(low: float) -> Cell:
        latency = {**TIMED, "p50_ms": 2.0, "p50_interval": {"low": low, "high": 2.2}}
        return cell(weights="int8", quality=80.0, p50_ms=2.0, latency=[latency])

    fp32, slow = cell(quality=80.0, p50_ms=1.0), timed(1.8)
    assert flags(fp32, slow)[slow.id] == {"slower_than_fp32"}
    assert flags(fp32, timed(0.9))[slow.id] == set()


def test_a_cell_that_costs_more_for_nothing_that_is_certain_says_so() -> None:
    cheap = cell(2, quality=80.0, p50_ms=1.0)
    dear = cell(6, quality=80.05, p50_ms=3.0)
    sure = cell(12, quality=85.0, p50_ms=9.0)
    found = {each.id: each for each in judged([cheap, dear, sure], None)}
    assert [each.flags for each in found.values()] == [(), ("not_significant",), ()]
    assert [each.on_frontier for each in found.values()] == [True, False, True]


def test_what_a_cell_is_stays_and_what_it_was_found_to_be_is_found_again() -> None:
    mixing = cell(2, flags=("collapsed", "batch_dependent", "mixed_precision"))
    aligned = cell(1, align="full", p50_ms=0.5, quality=60.0)
    found = flags(mixing, aligned, trained=((6, 64),))
    assert found[mixing.id] == {"untrained", "batch_dependent", "mixed_precision"}
    assert found[aligned.id] == set()
    assert judged((), None) == ()
