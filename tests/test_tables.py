"""Tables of cells: as wide as the terminal, and no id is cut."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from command_line import m2d
from hypothesis import given
from hypothesis import strategies as st
from tiny_profile import cell, profile, steady, target

from m2dexport.cli.cell_tables import View, print_cells, print_profile
from m2dexport.cli.columns import columns_of, fitting
from m2dexport.profile.manifest import write_profile
from m2dexport.profile.schema import Cell, Profile, Recommended, Shape
from m2dexport.report.card import card_section
from m2dexport.report.facts import shape_words
from m2dexport.report.page import page_of

LONG = cell(24, 1024, "int8-weight-only", vectors="ubinary", align="full", engine="openvino")
CELLS = (
    cell(6, 384, quality=90.0, p50_ms=6.0, on_frontier=False),
    cell(6, 128, "int8", quality=89.0, p50_ms=3.0, flags=("untrained",)),
    cell(2, 64, "int8", quality=70.0, p50_ms=1.0, p95_ms=12.0),
    cell(1, 64, "int8", quality=60.0, p50_ms=2.0, on_frontier=False),
    LONG,
)
WORTH = {"best": CELLS[1].id, "balanced": CELLS[2].id, "smallest": CELLS[2].id}


def measured(**values: object) -> Profile:
    where = target(CELLS[0], "local", recommended={**WORTH, "within_budget": None}, **values)
    return profile(*CELLS, targets=[where])


def lines_at(width: int, capsys: pytest.CaptureFixture[str], monkeypatch) -> list[str]:
    """Return what a terminal of this width shows."""
    monkeypatch.setattr("m2dexport.cli.cell_tables.terminal_width", lambda: width)
    print_cells(measured(), View(every=True))
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("width", [20, 60, 80, 120])
def test_an_id_is_never_cut_and_rows_fit_where_the_id_does(width, capsys, monkeypatch) -> None:
    lines = lines_at(width, capsys, monkeypatch)
    start = next(i for i, line in enumerate(lines) if line.startswith("cell"))
    rows = lines[start : start + 1 + len(CELLS)]
    assert {row.split()[0] for row in rows[1:]} == {each.id for each in CELLS}
    assert max(map(len, (row.rstrip() for row in rows))) <= max(width, len(LONG.id))
    assert ("p50 ms" in rows[0]) == (width >= 80)


def test_a_terminal_of_80_columns_shows_two_tasks_and_one_of_60_the_first(
    capsys, monkeypatch
) -> None:
    points = {"stsb-dev/spearman": 84.26, "limit-small/ndcg@10": 28.86}
    spread = {name: {"low": each - 1.5, "high": each + 1.5} for name, each in points.items()}
    mean = {"mean_quality": 56.56, "mean_interval": {"low": 55.36, "high": 57.76}}
    facts = {"quality": points, "intervals": spread, "replicates": {}, **mean}
    whole = cell(0, 128, "int8", vectors="ubinary", align="full").model_dump()
    small = Cell.model_validate({**whole, **facts})
    tasks = [
        {"name": name, "kind": kind, "main_metric": metric, "texts": 10, "sha256": "0" * 64}
        for name, kind, metric in (
            ("stsb-dev", "sts", "spearman"),
            ("limit-small", "retrieval", "ndcg@10"),
        )
    ]
    for width, shown in ((80, list(points.values())), (60, [84.26])):
        monkeypatch.setattr("m2dexport.cli.cell_tables.terminal_width", lambda width=width: width)
        print_cells(profile(small, tasks=tasks), View())
        lines = capsys.readouterr().out.splitlines()
        row = next(line for line in lines if line.startswith(small.id))
        assert len(row) <= width
        assert [each for each in points.values() if f"{each:.2f} ±1.5" in row] == shown
        heading = lines[lines.index(row) - 2]
        assert heading.split() == ["stsb-dev/", "limit-small/"][: len(shown)]


@given(st.integers(1, 150))
def test_as_many_columns_are_shown_as_a_line_has_room_for(width: int) -> None:
    columns = columns_of(measured(), {})
    names = ["cell", "mean", "p50", "p95", "size"]
    shown = fitting(columns, names, CELLS, width)
    needed = sum(max(len(column.text(each)) for each in CELLS) for column in shown)
    assert needed + 2 * (len(shown) - 1) <= max(width, len(LONG.id))
    assert [column.name for column in fitting(columns, names, CELLS, None)] == names


def test_the_recommended_cells_and_the_reference_come_first_then_the_frontier(capsys) -> None:
    print_cells(measured(), View())
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "a processor (avx2), up to 2 threads; latency of 1 text of 16 tokens, without tokenization"
    )
    rows = [line.split()[:4] for line in lines[2:6]]
    assert [row[:2] for row in rows[:3]] == [
        [CELLS[1].id, "best"],
        [CELLS[2].id, "balanced,"],
        [CELLS[0].id, "reference"],
    ]
    assert rows[3][0] == LONG.id
    assert lines[6].startswith("4 of 5 cells: those recommended, then the frontier")


def test_a_p95_of_ten_times_the_p50_is_commented_on(capsys) -> None:
    print_cells(measured(), View())
    assert f"ten times p50 or more: {CELLS[2].id} (1.00 and 12.00 ms). " in capsys.readouterr().out


def test_quality_stands_with_its_interval(capsys) -> None:
    wide = cell(6, quality=60.75, mean_interval={"low": 59.5, "high": 62.0})
    print_cells(profile(wide), View(columns=("cell", "mean")))
    assert "60.75 ±1.2" in capsys.readouterr().out


def test_the_end_of_a_run_names_what_is_worth_shipping_and_why(capsys) -> None:
    print_profile(measured(), Path("my profile/profile.json"))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:5]] == [CELLS[1].id, CELLS[2].id, CELLS[0].id]
    assert lines[5] == (
        f"Best: {CELLS[1].id}, since no cell of the grid is better beyond noise, and of those as "
        "good it is the cheapest."
    )
    assert lines[6].startswith(f"Balanced: {CELLS[2].id}, since dearer cells ")
    assert "; smallest, since it " in lines[6]
    assert lines[-1] == (
        f"Next: m2dexport bundle 'my profile/profile.json' --cell {CELLS[1].id} --out "
        f"{CELLS[1].id}.m2d"
    )


def test_a_cell_has_one_sentence_and_of_many_losses_the_largest(capsys) -> None:
    names = [f"t{n}/spearman" for n in range(8)]
    kept, lost = ({name: 90.0 - n * step for n, name in enumerate(names)} for step in (0, 1))
    whole, small = (
        each.model_copy(
            update={"quality": of, "replicates": {name: steady(of[name]) for name in names}}
        )
        for each, of in ((CELLS[0], kept), (CELLS[1], lost))
    )
    task = profile(*CELLS).tasks[0].model_dump()
    worth = {**dict.fromkeys(WORTH, small.id), "within_budget": None}
    made = profile(
        *(whole, small),
        tasks=[{**task, "name": f"t{n}"} for n in range(8)],
        targets=[target(whole, "local", recommended=worth)],
    )
    print_profile(made, Path("p.json"))
    out = capsys.readouterr().out
    losses = ", though it loses 7.0 points on t7/spearman, 6.0 on t6/spearman, and on 5 more."
    for said in (out, page_of(made), card_section(made, "card.png")):
        assert said.count("though it loses") == said.count(losses) == 1
        assert said.lower().count("since no cell of the grid is better") == 1
    assert out.count(f": {small.id}, since ") == 1


def test_samples_that_do_not_take_what_they_share_are_told_in_one_line(tmp_path, capsys) -> None:
    between = {"low": 0.7, "high": 0.99}
    fine = {"cell": CELLS[0].id, "p50_ms": 6.0, "shared_p50_ms": 6.2, "ratio_interval": between}
    off = {"cell": CELLS[2].id, "p50_ms": 4.97, "shared_p50_ms": 7.01, "ratio_interval": between}
    write_profile(measured(samples=[fine, off]), tmp_path / "off.json")
    write_profile(measured(samples=[fine]), tmp_path / "fine.json")
    said = (
        f"{CELLS[2].id} has a p50 of 4.97 ms by itself, 0.71 times (0.70 to 0.99) that of what it "
        "shares its latency with, 7.01 ms: read the latencies of its depth with care."
    )
    print_profile(measured(samples=[fine, off]), tmp_path / "off.json")
    for out in (capsys.readouterr().out, m2d("profile", "show", tmp_path / "off.json").stdout):
        assert out.splitlines().count(said) == 1
    assert "with care" not in m2d("profile", "show", tmp_path / "fine.json").stdout
    page = page_of(measured(samples=[fine, off]))
    assert said in page
    assert "(6.2 ms): the same within noise" in page
    assert "(7.01 ms): they differ beyond noise" in page


def test_every_target_has_its_table_and_a_command_that_names_it(capsys) -> None:
    other = cell(6, target="pi", quality=50.0)
    worth = Recommended(best=other.id, balanced=other.id, smallest=other.id, within_budget=other.id)
    targets = [target(CELLS[0], "local"), target(other, "pi", recommended=worth.model_dump())]
    both = profile(*CELLS, other, targets=targets)
    print_profile(both, Path("p.json"))
    out = capsys.readouterr().out
    assert "pi: a processor (avx2)" in out
    assert "Within the budget: 6x64-fp32-float32, since" in out
    assert "--cell 6x64-fp32-float32 --target pi --out" in out
    print_cells(both, View(target="pi"))
    assert CELLS[1].id not in capsys.readouterr().out


def test_cells_are_sorted_by_a_column_the_best_first(capsys) -> None:
    for column, first in (("p50", CELLS[2]), ("mean", CELLS[0]), ("p95 ms", CELLS[1])):
        print_cells(measured(), View(every=True, sort=column, columns=("cell", column)))
        assert capsys.readouterr().out.splitlines()[2].startswith(first.id)


def test_csv_has_every_figure_unrounded_and_json_the_whole_profile(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    write_profile(measured(), path)
    shown = m2d("profile", "show", tmp_path, "--all", "--csv")  # the folder of it
    assert "one output" in m2d("profile", "show", path, "--csv", "--json").stderr
    rows = list(csv.DictReader(io.StringIO(shown.stdout)))
    assert {row["cell"] for row in rows} == {each.id for each in CELLS}
    assert rows[0]["sts/spearman"] == "89.0"
    assert rows[0]["text_p50_ms"] == ""
    few = m2d("profile", "show", path, "--csv", "--columns", "cell, p95", "--sort", "p95").stdout
    assert few.splitlines()[0] == "cell,p95_ms"
    assert "replicates" in m2d("profile", "show", path, "--json").stdout
    refused = m2d("profile", "show", path, "--sort", "speed")
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "there is no column 'speed'; there are: cell, target, " in refused.stderr


def test_a_shape_is_told_as_it_was_timed_and_what_cut_it() -> None:
    assert shape_words(Shape(batch=1, sequence=16)) == "1 text of 16 tokens"
    assert shape_words(Shape(batch=16, sequence=1)) == "16 texts of 1 token"
    cut = shape_words(Shape(batch=2, sequence=256), Shape(batch=2, sequence=1024))
    assert cut == "2 texts of 256 tokens (cut from 1024)"
