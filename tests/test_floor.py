"""Depth 0 in a profile: how it is measured, and what does not clear it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tiny_artifact import letter_tokenizer
from tiny_profile import made_up

from m2dexport.checkpoint.static import static_tokenizer_json
from m2dexport.engines.numpy import make
from m2dexport.errors import M2DError
from m2dexport.measure.footprint import measure_footprint
from m2dexport.measure.latency import Conditions, measure_latency
from m2dexport.precisions import WeightPrecision
from m2dexport.profile.cells import join_cells
from m2dexport.profile.floor import Floor, floor_of, token_ids
from m2dexport.profile.maps import Maps
from m2dexport.profile.plan import Plan
from m2dexport.quantize.recipes import Requirement
from m2dexport.runtime.tokenizer import load_tokenizer
from m2dexport.strict import parse_json
from m2dexport.vectors.codecs import Ranges, cosines, normalize
from m2dexport.vectors.pairs import StsTask

TEXTS = ("find: a guitar", "find: 42", "", "guitar guitar")
ROWS = 200  # more than the tokenizer knows, and enough to be quantized
RNG = np.random.default_rng(0)
TASK = StsTask("sts", ("a", "b"), ("c", "d"), (0.0, 1.0), "0")


def maps(**tables: np.ndarray) -> Maps:  # type: ignore[type-arg]
    """Return the maps of a profile of depth 0: "d32" is its table of 32 dims."""
    by_dim = {int(name[1:]): table for name, table in tables.items()}
    ranges = {dim: Ranges(np.full(dim, -1.0), np.full(dim, 1.0)) for dim in by_dim}
    stored = static_tokenizer_json(parse_json(letter_tokenizer(16), "tokenizer"), 16)
    return Maps({}, by_dim, json.dumps(stored), ranges, {})


def table(dim: int) -> np.ndarray:  # type: ignore[type-arg]
    return RNG.standard_normal((ROWS, dim)).astype(np.float32)


@pytest.mark.parametrize(
    ("weights", "least"),
    [("fp32", 1 - 1e-6), ("fp16", 0.99999), ("int8", 0.999), ("int4-weight-only", 0.95)],
)
def test_the_vector_of_a_text_is_the_direction_of_the_sum_of_its_tokens(
    tmp_path: Path, weights: WeightPrecision, least: float
) -> None:
    given = maps(d32=table(32), d64=table(64))
    tokenizer = load_tokenizer(given.tokenizer_json)
    found = dict(floor_of(given, weights, token_ids(given, TEXTS), "find: ", tmp_path))
    assert list(found) == [32, 64]
    for dim, floor in found.items():
        assert isinstance(floor, Floor)
        assert (floor.view.layers, floor.view.align, floor.view.dim) == (0, "full", dim)
        assert floor.view.ranges is given.ranges[dim]
        sums = [given.tables[dim][tokenizer.encode(text).ids].sum(axis=0) for text in TEXTS]
        expected = normalize(np.stack(sums))
        near = cosines(floor.view.vectors, expected)
        assert near.min() > least


def test_what_is_measured_of_depth_0_is_the_file_of_its_table(tmp_path: Path) -> None:
    given = maps(d32=table(32))
    ((_, floor),) = floor_of(given, "int8", token_ids(given, TEXTS), "", tmp_path)
    assert isinstance(floor, Floor)
    assert floor.candidate.engine == "static"
    codes, scales = (ROWS + 1) * 32, (ROWS + 1) * 4  # a row for padding
    assert floor.candidate.size_bytes == pytest.approx(codes + scales, abs=250)
    conditions = Conditions(ROWS, 3)
    (points,) = measure_latency({"a": floor.candidate}, [(1, 8)], conditions).values()
    assert not isinstance(points, M2DError)
    assert 0 < points[0].p50_ms <= points[0].p95_ms
    assert measure_footprint(floor.candidate, [(1, 8)], conditions).peak_memory_bytes > 1e6


def test_a_dim_that_fails_does_not_take_the_others_along(tmp_path: Path) -> None:
    broken = table(64)
    broken[3, 5] = np.nan
    given = maps(d64=broken, d32=table(32))
    found = dict(floor_of(given, "int8", token_ids(given, TEXTS), "", tmp_path))
    assert isinstance(found[64], M2DError)
    assert "NaN" in str(found[64])
    assert isinstance(found[32], Floor)


def test_a_precision_that_turns_vectors_too_far_fails(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(make.PRECISIONS, "int8", Requirement("1.26", floor=1.1))
    given = maps(d32=table(32))
    ((_, found),) = floor_of(given, "int8", token_ids(given, TEXTS), "", tmp_path)
    assert str(found).startswith("depth 0 of 32 dims in int8 has a mean cosine of 1.0000")


@pytest.mark.parametrize("weights", ["bf16", "int8-dynamic"])
def test_weights_that_the_engine_of_depth_0_lacks_are_left_out(tmp_path: Path, weights) -> None:
    assert not list(floor_of(maps(d32=table(32)), weights, [], "", tmp_path))
    assert not any(tmp_path.iterdir())


PLAN = Plan((0, 1, 2, 3), (32, 64), ("fp32", "int8"), ("float32", "int8"), ((1, 8),))
FLOOR = "0x64-aligned-fp32-int8"  # of 64 bytes


def flags(*, trained: object = None, **figures: tuple[float, float]) -> dict[str, set[str]]:
    """Return the flags of made-up cells, by id; "_" stands for "-"."""
    given = {name.strip("_").replace("_", "-"): value for name, value in figures.items()}
    whole = {"3x64-fp32-float32": (90.0, 9.0), FLOOR: (60.0, 0.1)}
    cells = join_cells(made_up({**whole, **given}), PLAN, [TASK], trained)  # type: ignore[arg-type]
    return {cell.id: set(cell.flags) for cell in cells}


@pytest.mark.parametrize(
    ("name", "points", "p50_ms", "flagged"),
    [
        ("1x64-fp32-int8", 59.8, 0.2, True),
        ("1x64-fp32-int8", 59.95, 0.2, False),  # within the noise of quality
        ("1x64-fp32-int8", 61.0, 0.2, False),
        ("1x64-fp32-int8", 50.0, 0.1, False),  # as fast
        ("1x64-fp32-int8", 50.0, 0.05, False),
        ("1x32-fp32-int8", 50.0, 0.2, False),  # fewer bytes per vector
        ("1x32-fp32-float32", 50.0, 0.2, True),  # more bytes, of fewer dims
        ("2x64-aligned-int8-int8", 50.0, 0.2, True),
        ("2x64-aligned-int8-int8", 70.0, 0.2, False),
    ],
)
def test_a_transformer_is_flagged_where_depth_0_gives_more_faster_in_no_more_bytes(
    name: str, points: float, p50_ms: float, flagged: bool
) -> None:
    found = flags(**{name.replace("-", "_"): (points, p50_ms)})
    assert ("below_static" in found[name]) == flagged
    assert "below_static" not in found["3x64-fp32-float32"]


def test_depth_0_is_not_flagged_for_another_dim_of_its_own() -> None:
    found = flags(**{"0x32_aligned_fp32_float32": (40.0, 0.2)})
    assert found["0x32-aligned-fp32-float32"] == set()


def test_without_depth_0_nothing_is_below_it() -> None:
    figures = {"1x64-fp32-int8": (10.0, 0.2), "3x64-fp32-float32": (90.0, 9.0)}
    cells = join_cells(made_up(figures), PLAN, [TASK], None)
    assert all("below_static" not in cell.flags for cell in cells)


def test_depth_0_is_no_shallower_depth_and_aligned_cells_compare_with_aligned_ones() -> None:
    found = flags(
        **{
            "1x64_fp32_int8": (55.0, 1.0),
            "1x64_aligned_fp32_int8": (80.0, 1.0),
            "2x64_fp32_int8": (70.0, 2.0),
            "2x64_aligned_fp32_int8": (75.0, 2.0),
        }
    )
    below = {name for name, given in found.items() if "below_shallower" in given}
    assert below == {"2x64-aligned-fp32-int8"}


def test_what_was_fitted_needs_no_training() -> None:
    found = flags(
        trained=((3, 64),),
        **{"1x64_fp32_int8": (55.0, 1.0), "1x64_aligned_fp32_int8": (80.0, 1.0)},
    )
    assert {name for name, given in found.items() if "untrained" in given} == {"1x64-fp32-int8"}
