"""What a person sees."""

from __future__ import annotations

from pathlib import Path

from tiny_profile import cell, profile, target

from m2dexport.cli.cell_tables import View, print_cells
from m2dexport.cli.choices import print_selection
from m2dexport.profile.select import select_cell
from m2dexport.profile.target import Budget

CELLS = (
    cell(6, 384, quality=90.0, p50_ms=6.0),
    cell(6, 128, "int8", quality=89.0, p50_ms=3.0, flags=("untrained",)),
    cell(2, 64, "int8", quality=70.0, p50_ms=1.0),
    cell(1, 64, "int8", quality=60.0, p50_ms=2.0, on_frontier=False),
)


def test_a_selection_names_cell_limit_and_next_command(capsys) -> None:
    print_selection(select_cell(profile(*CELLS), Budget(p50_ms=4)), Path("profile.json"))
    out = capsys.readouterr().out
    assert out.startswith("6x128-int8-float32: mean 89.00, p50 3.00 ms")
    assert "[untrained]" in out
    assert "p50_ms binds: without it, 6x384-fp32-float32 is better." in out
    assert "m2dexport bundle profile.json --cell 6x128-int8-float32" in out


def test_the_next_command_can_be_pasted_whatever_the_path(capsys) -> None:
    print_selection(select_cell(profile(*CELLS), Budget(p50_ms=4)), Path("my [b]profile[/b].json"))
    assert "m2dexport bundle 'my [b]profile[/b].json' --cell" in capsys.readouterr().out


def test_the_threads_that_are_told_are_those_of_the_transformers(capsys) -> None:
    """Depth 0 comes first, and runs on another engine."""
    many = {"provider": "CPU", "threads": 64, "spin_us": 0, "workers": 1}
    static = cell(0, 64, "int8", align="full", engine="static", device=many)
    measured = profile(static, *CELLS, targets=[target(CELLS[0], "local")])
    print_cells(measured, View())
    assert capsys.readouterr().out.startswith("a processor (avx2), up to 2 threads;")
