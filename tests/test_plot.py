"""What a person sees."""

from __future__ import annotations

from pathlib import Path

from tiny_profile import cell, profile, target

from m2dexport.cli.cell_tables import View, print_cells
from m2dexport.cli.choices import print_selection
from m2dexport.profile.plot import plot_frontier, write_report
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


def test_the_picture_has_every_cell_and_labels_the_frontier() -> None:
    axes = plot_frontier(profile(*CELLS)).axes[0]
    drawn = sum(len(points.get_offsets()) for points in axes.collections)
    assert drawn == len(CELLS)
    assert [text.get_text() for text in axes.texts] == ["2x64", "6x128", "6x384"]
    assert {text.get_text() for text in axes.get_legend().get_texts()} == {
        "fp32",
        "int8",
        "frontier",
    }


def test_the_report_is_a_manifest_and_two_pictures(tmp_path: Path) -> None:
    written = write_report(profile(*CELLS), tmp_path / "profile")
    assert [path.name for path in written] == ["profile.json", "frontier.png", "frontier.svg"]
    assert written[1].read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in written[2].read_bytes()
    assert sorted((tmp_path / "profile").iterdir()) == sorted(written)


def test_the_label_of_quality_lies_within_the_picture_whatever_the_number_of_tasks() -> None:
    whole = profile(*CELLS)
    tasks = [
        whole.tasks[0].model_copy(update={"name": f"a-task-of-some-name-{i}"}) for i in range(7)
    ]
    figure = plot_frontier(whole.model_copy(update={"tasks": tuple(tasks)}))
    figure.draw_without_rendering()
    label = figure.axes[0].yaxis.label
    extent, picture = label.get_window_extent(), figure.bbox
    assert picture.y0 <= extent.y0 < extent.y1 <= picture.y1
    assert picture.x0 <= extent.x0
    assert all(task.name in label.get_text().replace("\n", " ") for task in tasks)


ALIGNED = (
    cell(0, 64, "int8", align="full", quality=65.0, p50_ms=0.1, engine="static"),
    cell(2, 64, "int8", align="full", quality=80.0, p50_ms=1.05),
)


def test_aligned_cells_are_hollow_and_named_so_and_depth_0_is_among_them() -> None:
    axes = plot_frontier(profile(*CELLS, *ALIGNED)).axes[0]
    drawn = sum(len(points.get_offsets()) for points in axes.collections)
    assert drawn == len(CELLS) + len(ALIGNED)
    assert [text.get_text() for text in axes.texts] == ["0ax64", "2ax64", "6x128", "6x384"]
    hollow = [points for points in axes.collections if points.get_label() == "int8, aligned"]
    assert [len(points.get_offsets()) for points in hollow] == [2]
    assert hollow[0].get_facecolor().tolist() == [[1.0, 1.0, 1.0, 1.0]]
    assert hollow[0].get_edgecolor().tolist() != hollow[0].get_facecolor().tolist()
    assert axes.get_title().endswith("a: aligned")


def test_the_threads_that_are_told_are_those_of_the_transformers(capsys) -> None:
    """Depth 0 comes first, and runs on another engine."""
    many = {"provider": "CPU", "threads": 64, "spin_us": 0, "workers": 1}
    static = cell(0, 64, "int8", align="full", engine="static", device=many)
    measured = profile(static, *CELLS, targets=[target(CELLS[0], "local")])
    print_cells(measured, View())
    assert capsys.readouterr().out.startswith("a processor (avx2), up to 2 threads;")
    assert ", up to 2 threads," in plot_frontier(measured).axes[0].get_xlabel()


def test_a_profile_with_aligned_cells_is_written_as_pictures(tmp_path: Path) -> None:
    written = write_report(profile(*CELLS, *ALIGNED), tmp_path / "profile")
    assert b"<svg" in written[2].read_bytes()
