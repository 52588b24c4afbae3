"""The grid: which cells plans ask for, which passes give them, and how those are dealt out."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m2dexport.engines import Device
from m2dexport.errors import UsageError
from m2dexport.profile.grid import dealt, index_pass, passes_of, places_of, reference_id
from m2dexport.profile.plan import Plan

PLAN = Plan((0, 1, 3), (32, 64), target="a", reference=(6, 96, "fp32", "float32"))
OTHER = replace(PLAN, target="b", device=Device(threads=1), shapes=((4, 64),))
OPENVINO = replace(PLAN, engine="openvino", weights=("int8", "fp32"))


def names(plan: Plan) -> list[tuple[str, str]]:
    return [(each.weights, each.plan.engine) for each in passes_of([plan])]


def test_the_reference_stands_beside_a_grid_that_lacks_it() -> None:
    small = replace(PLAN, layers=(1,), dims=(32,), weights=("int8",), vectors=("ubinary",))
    places = places_of([small])
    assert list(places) == [
        "6x96-fp32-float32",
        "1x32-int8-ubinary",
        "1x32-aligned-int8-ubinary",
    ]
    assert [place.only_reference for place in places.values()] == [True, False, False]
    assert names(small) == [("fp32", "onnx"), ("int8", "onnx")]
    whole = replace(PLAN, layers=(1, 6), dims=(32, 96))
    assert not any(place.only_reference for place in places_of([whole]).values())


def test_targets_share_passes_and_engines_do_not() -> None:
    assert len(passes_of([PLAN, OTHER])) == len(passes_of([PLAN])) == 3
    gpu = replace(PLAN, target="c", device=Device("CUDAExecutionProvider"))
    assert len(passes_of([PLAN, gpu])) == 6
    found = passes_of([PLAN, OPENVINO])
    assert [(each.name, each.leads, each.crosses) for each in found] == [
        ("fp32", True, True),
        ("fp32 openvino", True, False),
        ("fp16", False, False),
        ("int8", False, False),
        ("int8 openvino", False, False),
    ]
    assert index_pass(found[4], found) == found[1]
    assert index_pass(found[1], found) is None


def test_depth_0_is_one_cell_whatever_the_engine() -> None:
    places = places_of([PLAN, OPENVINO])
    static = [name for name, place in places.items() if place.graph.layers == 0]
    assert len(static) == 2 * 3 * 3
    assert {places[name].plan for name in static} == {PLAN}


def test_a_pass_holds_the_grids_of_all_targets() -> None:
    wide = replace(OTHER, dims=(128,), layers=(2,), align=("none",))
    first = passes_of([PLAN, wide])[0]
    assert first.plan.layers == (0, 1, 2, 3, 6)
    assert first.plan.dims == (32, 64, 96, 128)
    assert "2x128-fp32-int8" in first.wanted
    assert "2x32-fp32-int8" not in first.wanted


@given(
    plans=st.sampled_from([(PLAN,), (PLAN, OTHER), (PLAN, OPENVINO), (OPENVINO,)]),
    parts=st.integers(1, 5),
)
def test_shards_are_the_whole_and_each_has_the_reference(
    plans: tuple[Plan, ...], parts: int
) -> None:
    whole = passes_of(plans)
    if parts > len(whole):
        with pytest.raises(UsageError, match=f"there are {len(whole)} passes to deal out"):
            dealt(whole, (1, parts))
        return
    shards = [dealt(whole, (number, parts)) for number in range(1, parts + 1)]
    own = [each for shard in shards for each in shard if each.own]
    assert sorted(each.name for each in own) == sorted(each.name for each in whole)
    for shard in shards:
        assert reference_id(plans[0]) in shard[0].wanted
        assert all(each.wanted == each.references for each in shard if not each.own)
