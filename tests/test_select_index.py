"""The choice of what queries an index that another cell wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import m2d
from tiny_profile import cell, profile

from m2dexport.errors import M2DError, UsageError
from m2dexport.profile.manifest import write_profile
from m2dexport.profile.schema import Cell, Profile
from m2dexport.profile.select import select_cell
from m2dexport.profile.target import Budget

ANY = Budget.model_validate({})


def retrieving(made: Cell, points: float) -> Cell:
    """Return a cell with these points of retrieval, too."""
    quality = {**made.quality, "r/ndcg@10": points, "r/recall@10": points + 10}
    mean = (quality["sts/spearman"] + points) / 2
    update = {
        "quality": quality,
        "mean_quality": mean,
        "mean_interval": {"low": mean, "high": mean},
    }
    return Cell.model_validate({**made.model_dump(), **update})


INDEX = retrieving(cell(6, vectors="int8", p50_ms=6.0), 60.0)


def asking(layers: int, points: float, weights: str = "fp32", **values: object) -> Cell:
    """Return a cell whose queries have these points on what INDEX wrote."""
    found = {INDEX.id: {"r/ndcg@10": points, "r/recall@10": points + 10}}
    values = {"align": "none" if layers == 6 else "full", "p50_ms": layers or 0.1, **values}
    made = cell(layers, weights=weights, vectors="int8", as_query=found, quality=99.0, **values)
    return retrieving(made, points)


def searched(*cells: Cell) -> Profile:
    """Return a profile of INDEX and of these cells that was measured on retrieval."""
    names = {"r": ("retrieval", "ndcg@10"), "sts": ("sts", "spearman")}
    tasks = [
        {"name": name, "kind": kind, "main_metric": metric, "texts": 10, "sha256": "0" * 64}
        for name, (kind, metric) in names.items()
    ]
    return profile(INDEX, *cells, tasks=tasks)


def test_quality_on_an_index_is_that_of_queries_to_it() -> None:
    static, aligned = asking(0, 40.0, p50_ms=0.1), asking(2, 50.0)
    found = select_cell(searched(static, aligned), ANY, INDEX.id)
    assert (found.cell, found.points, found.index, found.native) == (INDEX, 60.0, INDEX, 60.0)
    assert found.encoders == ((INDEX, 60.0), (aligned, 50.0), (static, 40.0))
    assert (found.binding, found.next_better) == (None, None)
    found = select_cell(searched(static, aligned), Budget(metric="r/recall@10"), INDEX.id)
    assert [points for _, points in found.encoders] == [70.0, 60.0, 50.0]


def test_only_cells_that_may_be_put_to_an_index_can_be_chosen_for_it() -> None:
    plain = asking(2, 80.0, align="none")
    other_dim = cell(2, 32, vectors="int8", align="full", quality=99.0)
    other_codes = cell(1, vectors="ubinary", align="full", quality=99.0)
    allowed = [asking(0, 30.0), asking(1, 40.0), asking(6, 59.0, "int8", p50_ms=3.0)]
    found = select_cell(searched(plain, other_dim, other_codes, *allowed), ANY, INDEX.id)
    assert {each.id for each, _ in found.encoders} == {INDEX.id, *(each.id for each in allowed)}


def test_slower_and_worse_encoders_are_not_listed() -> None:
    worse = asking(3, 40.0, p50_ms=5.0)
    better = asking(2, 50.0, p50_ms=2.0)
    found = select_cell(searched(worse, better), ANY, INDEX.id)
    assert [each for each, _ in found.encoders] == [INDEX, better]


def test_within_the_noise_of_quality_the_faster_encoder_is_chosen() -> None:
    slow, fast = asking(2, 59.95), asking(1, 59.91)
    assert select_cell(searched(slow, fast), ANY, INDEX.id).cell == fast
    slower = asking(1, 59.91, p50_ms=7.0)
    assert select_cell(searched(slower), ANY, INDEX.id).cell == INDEX
    found = select_cell(searched(asking(1, 59.89)), ANY, INDEX.id)
    assert (found.cell, found.points) == (INDEX, 60.0)


def test_limits_bind_for_an_index_as_they_do_without_one() -> None:
    measured = searched(asking(2, 50.0, p95_ms=2.0), asking(0, 40.0, p95_ms=0.5))
    found = select_cell(measured, Budget(p95_ms=1.0), INDEX.id)
    assert (found.cell.layers, found.binding) == (0, "p95_ms")
    assert found.next_better is not None
    assert found.next_better.layers == 6
    with pytest.raises(M2DError, match=r"p95_ms is 0\.5 where 0\.1 is allowed"):
        select_cell(measured, Budget(p95_ms=0.1), INDEX.id)
    with pytest.raises(M2DError, match="min_quality is 60 where 95 is needed"):
        select_cell(measured, Budget(min_quality=95), INDEX.id)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("2x64-aligned-fp32-int8", "is a cell of depth 2, .* name a cell of 6 layers"),
        ("6x64-fp32-ubinary", "the profile has no cell '6x64-fp32-ubinary'"),
    ],
)
def test_an_index_that_no_encoder_speaks_is_refused(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        select_cell(searched(asking(2, 50.0)), ANY, name)


def test_a_metric_that_queries_lack_is_refused() -> None:
    for metric in ("sts/spearman", "r/map"):
        with pytest.raises(UsageError, match=rf"no metric '{metric}' of queries; it has: mean, r/"):
            select_cell(searched(asking(2, 50.0)), Budget(metric=metric), INDEX.id)


def test_a_profile_without_retrieval_says_that_no_queries_were_measured() -> None:
    with pytest.raises(UsageError, match=r"holds no retrieval, .* --eval of a BEIR folder"):
        select_cell(profile(INDEX), ANY, INDEX.id)


def test_the_encoders_of_an_index_are_printed_and_can_be_read_by_a_script(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    write_profile(searched(asking(2, 50.0), asking(0, 40.0, p50_ms=0.1)), path)
    chosen = ("select", path, "--index-cell", INDEX.id, "--p50-ms", 3)
    found = m2d(*chosen)
    assert found.exit_code == 0, found.output
    table, rest = found.stdout.splitlines()[:4], found.stdout.splitlines()[4:]
    assert [row.split()[:3] for row in table[1:]] == [
        [INDEX.id, "60.00", "0.00"],
        ["2x64-aligned-fp32-int8", "50.00", "10.00"],
        ["0x64-aligned-fp32-int8", "40.00", "20.00"],
    ]
    assert rest[0].startswith(
        f"2x64-aligned-fp32-int8: mean 50.00 as a query encoder of {INDEX.id}, whose own queries "
        "have 60.00, p50 2.00 ms"
    )
    best = [row.split()[:3] for row in rest[2:4]]
    assert best == [
        ["2x64-aligned-fp32-int8", "50.00", "10.00"],
        ["0x64-aligned-fp32-int8", "40.00", "20.00"],
    ]
    assert rest[4:6] == [
        "Limits: p50 2 of 3 ms.",
        f"p50_ms binds: without it, {INDEX.id} is better.",
    ]
    assert "--cell 2x64-aligned-fp32-int8 --index INDEX.m2d --out" in rest[6]
    told = json.loads(m2d(*chosen, "--json").stdout)
    assert told["cell"]["id"] == "2x64-aligned-fp32-int8"
    assert {key: told[key] for key in ("points", "native", "binding", "index_cell")} == {
        "points": 50.0,
        "native": 60.0,
        "binding": "p50_ms",
        "index_cell": INDEX.id,
    }
    assert [(each["cell"], each["points"]) for each in told["encoders"]] == [
        (INDEX.id, 60.0),
        ("2x64-aligned-fp32-int8", 50.0),
        ("0x64-aligned-fp32-int8", 40.0),
    ]


def test_without_an_index_a_script_reads_that_there_is_none(tmp_path: Path) -> None:
    write_profile(searched(), tmp_path / "profile.json")
    told = json.loads(m2d("select", tmp_path / "profile.json", "--p50-ms", 9, "--json").stdout)
    assert (told["index_cell"], told["native"], told["encoders"]) == (None, None, [])


def test_an_index_needs_no_other_limit_and_is_refused_in_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    write_profile(searched(asking(2, 50.0)), path)
    assert m2d("select", path, "--index-cell", INDEX.id).exit_code == 0
    found = m2d("select", path, "--index-cell", "2x64-aligned-fp32-int8")
    assert (found.exit_code, found.stdout) == (2, "")
    (sentence,) = found.stderr.splitlines()
    assert "name a cell of 6 layers" in sentence
