"""What ``profile`` writes: profile.json and the picture of its frontier."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from m2dexport.files import atomic_file, require_file
from m2dexport.profile.frontier import frontier_line
from m2dexport.profile.manifest import write_profile
from m2dexport.profile.schema import Cell, Profile

PROFILE = "profile.json"
PICTURES = ("frontier.png", "frontier.svg")

_LABEL_WIDTH = 60  # characters that fit along the axis of quality

# Okabe and Ito's colours, told apart with every kind of colour vision; markers tell them apart in
# print.
_STYLE = {
    "fp32": ("#0072B2", "o"),
    "fp16": ("#E69F00", "s"),
    "bf16": ("#D55E00", "s"),
    "int8": ("#009E73", "^"),
    "int8-dynamic": ("#56B4E9", "v"),
    "int8-static": ("#CC79A7", "D"),
    "int8-weight-only": ("#000000", "P"),
    "int4-weight-only": ("#999999", "X"),
}


def require_report_folder(folder: Path, *, force: bool = False) -> None:
    """Refuse a folder that ``write_report`` could not write to, before anything is measured.

    Raises:
        UsageError: when it is a file, cannot be written to, or holds one of the files and
            ``force`` does not say that they are to be replaced.
    """
    for name in (PROFILE, *PICTURES):
        require_file(folder / name, force=force)


def write_report(profile: Profile, folder: Path, *, force: bool = False) -> tuple[Path, ...]:
    """Write profile.json and the pictures of its frontier; return their paths.

    Raises:
        UsageError: as ``require_report_folder``.
    """
    write_profile(profile, folder / PROFILE, force=force)
    figure = plot_frontier(profile)
    for name in PICTURES:
        with atomic_file(folder / name, force=force) as temporary:
            figure.savefig(temporary, dpi=150)
    return tuple(folder / name for name in (PROFILE, *PICTURES))


def plot_frontier(profile: Profile) -> Any:
    """Return a matplotlib figure of quality against p50 latency.

    Each (layers, align, weights) is drawn at its best dim and vector precision, and below it,
    faintly, the others. Aligned cells have hollow marks. The line joins the cells that no cell
    beats in both quality and latency.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.add_subplot()
    for weights in dict.fromkeys(cell.weights for cell in profile.cells):
        _draw_cells(axes, [cell for cell in profile.cells if cell.weights == weights])
    line = frontier_line(profile.cells)
    axes.plot(*_points(line), color="#444444", linewidth=1, zorder=2, label="frontier")
    # The line is sorted by latency: of cells that share a label, the fastest carries it.
    labelled = {(cell.layers, cell.align, cell.dim): cell for cell in reversed(line)}
    for index, cell in enumerate(reversed(labelled.values())):
        above = index % 2 == 0  # to the left above the line, or to the right below it
        axes.annotate(
            f"{cell.layers}{'a' if _is_mapped(cell) else ''}x{cell.dim}",
            (cell.p50_ms, cell.mean_quality),
            xytext=(-4, 6) if above else (4, -6),
            textcoords="offset points",
            ha="right" if above else "left",
            va="bottom" if above else "top",
            fontsize=9,
        )
    target = profile.target()
    shape = target.shapes[0]
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(
        lambda value, _: f"{value:g}" if _leads_with(value, "25") else ""
    )
    axes.set_xlabel(
        f"p50 latency, ms ({shape.batch} text of {shape.sequence} tokens, "
        f"up to {profile.threads()} threads, {target.machine.cpu})"
    )
    names = ", ".join(task.name for task in profile.tasks)
    words = f"quality, points (mean of {names})"
    axes.set_ylabel(textwrap.fill(words, _LABEL_WIDTH, break_on_hyphens=False))
    aligned = "; a: aligned" if any(_is_mapped(cell) for cell in profile.cells) else ""
    axes.set_title(f"Latency and quality of every cell; labels: layers x dim{aligned}")
    axes.grid(alpha=0.25)
    axes.margins(y=0.12)
    axes.legend(title="weights", loc="lower right", fontsize=9)
    return figure


def _leads_with(value: float, digits: str) -> bool:
    return f"{value:e}"[0] in digits


def _points(cells: Sequence[Cell]) -> tuple[list[float], list[float]]:
    return [cell.p50_ms for cell in cells], [cell.mean_quality for cell in cells]


def _draw_cells(axes: Any, cells: Sequence[Cell]) -> None:
    """Draw the cells of one weight precision: aligned ones hollow, others filled."""
    weights = cells[0].weights
    colour, marker = _STYLE[weights]
    best = _best_per_latency(cells)
    rest = [cell for cell in cells if cell not in best]
    axes.scatter(*_points(rest), s=14, c=colour, marker=marker, alpha=0.25, linewidths=0)
    for mapped in (False, True):
        drawn = [cell for cell in best if _is_mapped(cell) == mapped]
        if drawn:
            face = "white" if mapped else colour
            name = f"{weights}, aligned" if mapped else weights
            axes.scatter(
                *_points(drawn),
                s=60,
                facecolors=face,
                edgecolors=colour,
                linewidths=1.5,
                marker=marker,
                label=name,
                zorder=3,
            )


def _is_mapped(cell: Cell) -> bool:
    return cell.align == "full"


def _best_per_latency(cells: Sequence[Cell]) -> list[Cell]:
    """Return the best cell of each depth: cells of one depth and precision share their latency."""
    best: dict[tuple[int, str], Cell] = {}
    for cell in cells:
        key = cell.layers, cell.align
        if key not in best or cell.mean_quality > best[key].mean_quality:
            best[key] = cell
    return list(best.values())
