"""The pictures of a profile, by matplotlib: PNG and SVG."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from m2dexport.precisions import VECTOR_PRECISIONS, WEIGHT_PRECISIONS
from m2dexport.profile.frontier import frontier_line
from m2dexport.profile.intervals import Interval
from m2dexport.profile.schema import MEAN, Cell, Profile, TargetInfo
from m2dexport.report import facts
from m2dexport.report.labels import place_labels
from m2dexport.report.style import COLOURS, MARKS, literal

_INK = "#000000"
_LABEL_WIDTH = 62  # characters that fit along the axis of quality
_X_WIDTH = 100  # along that of latency


def plot_frontier(profile: Profile, target: str | None = None) -> Any:
    """Return a matplotlib figure of quality against p50 latency: a panel for a target, or for each.

    Every cell is there: weights by colour, vectors by mark, aligned cells hollow. Cells of the
    frontier are large and have their 95% intervals. The line joins those that no cell beats in both
    quality and latency; the others are ahead in size or in bytes per vector. Limits of the
    target's budget are dashed.

    Raises:
        UsageError: when the profile has no such target.
    """
    from matplotlib.figure import Figure

    targets = profile.targets if target is None else (profile.target(target),)
    figure = Figure(figsize=(9.5, 6 * len(targets)), layout="constrained")
    panels = figure.subplots(len(targets), squeeze=False)[:, 0]
    for axes, each in zip(panels, targets, strict=True):
        _draw_cells(axes, profile.of_target(each.name))
        _dress(axes, profile, each)
        _draw_budget(axes, each)
        _legend(axes, profile.of_target(each.name), bool(_lines_of(each)))
    figure.draw_without_rendering()  # the layout is known from here on
    for axes, each in zip(panels, targets, strict=True):
        _label(axes, profile, each)
    return figure


def _draw_cells(axes: Any, cells: Sequence[Cell]) -> None:
    """Draw the cells of a target, a group of points for each way that they look."""
    groups: dict[tuple[str, str, bool, bool], list[Cell]] = {}
    for cell in cells:
        key = cell.weights, cell.vectors, cell.align == "full", cell.on_frontier
        groups.setdefault(key, []).append(cell)
    for (weights, vectors, mapped, ahead), group in groups.items():
        colour = COLOURS[weights] or _INK
        axes.scatter(
            [cell.p50_ms for cell in group],
            [cell.mean_quality for cell in group],
            s=70 if ahead else 12,
            facecolors="white" if mapped else colour,
            edgecolors=colour,
            linewidths=1.8 if ahead else 0.7,
            marker=MARKS[vectors][0],
            zorder=4 if ahead else 2,
        )
    for cell in (each for each in cells if each.on_frontier):
        _draw_intervals(axes, cell)
    line = frontier_line(cells)
    axes.plot(
        [cell.p50_ms for cell in line],
        [cell.mean_quality for cell in line],
        color="#444444",
        linewidth=1,
        zorder=3,
    )


def _draw_intervals(axes: Any, cell: Cell) -> None:
    def span(value: float, interval: Interval) -> list[list[float]]:
        return [[max(value - interval.low, 0)], [max(interval.high - value, 0)]]

    x, y, colour = cell.p50_ms, cell.mean_quality, COLOURS[cell.weights] or _INK
    across, up = span(x, cell.latency[0].p50_interval), span(y, cell.mean_interval)
    axes.errorbar(x, y, up, across, ecolor=colour, elinewidth=0.8, zorder=2)


def _dress(axes: Any, profile: Profile, target: TargetInfo) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(
        lambda value, _: f"{value:g}" if _leads_with(value, "25") else ""
    )
    words = f"p50 latency, ms ({facts.latency_words(profile, target)})"
    axes.set_xlabel(textwrap.fill(literal(words), _X_WIDTH))
    names = literal(", ".join(task.name for task in profile.tasks))
    words = f"quality, points (mean of {names}; 95% intervals)"
    axes.set_ylabel(textwrap.fill(words, _LABEL_WIDTH, break_on_hyphens=False))
    aligned = "; a: aligned" if any(cell.align == "full" for cell in profile.cells) else ""
    where = literal(f", {target.name}") if len(profile.targets) > 1 else ""
    axes.set_title(f"Latency and quality of every cell{where}; labels: layers x dim{aligned}")
    axes.grid(alpha=0.25)
    axes.margins(x=0.06, y=0.1)


def _leads_with(value: float, digits: str) -> bool:
    return f"{value:e}"[0] in digits


def _lines_of(target: TargetInfo) -> dict[str, float]:
    """Return the limits that are lines in this picture; a p95 bounds p50 from above, too."""
    known = ["p50_ms", "p95_ms"]
    known += ["min_quality"] if target.budget.get("metric", MEAN) == MEAN else []
    return {key: float(target.budget[key]) for key in known if key in target.budget}


def _draw_budget(axes: Any, target: TargetInfo) -> None:
    for key, limit in _lines_of(target).items():
        draw, words = (
            (axes.axhline, f"quality {limit:g}")
            if key == "min_quality"
            else (axes.axvline, f"{key[:3]} {limit:g} ms")
        )
        draw(limit, color="#D55E00", linewidth=1, linestyle="--", zorder=1)
        place = (0.01, limit) if key == "min_quality" else (limit, 0.01)
        axes.annotate(
            words,
            place,
            xycoords=axes.get_yaxis_transform()
            if key == "min_quality"
            else axes.get_xaxis_transform(),
            xytext=(3, 3),
            textcoords="offset points",
            color="#A04000",
            fontsize=8,
            rotation=0 if key == "min_quality" else 90,
        )


def _legend(axes: Any, cells: Sequence[Cell], limited: bool) -> None:
    """Explain colours, marks, hollow marks and lines, beside the picture and not on its points."""
    from matplotlib.lines import Line2D

    weights = {cell.weights for cell in cells}
    vectors = {cell.vectors for cell in cells}

    def mark(name: str, colour: str, sign: str, face: str | None = None) -> Any:
        face = colour if face is None else face
        return Line2D([], [], ls="", marker=sign, c=colour, mfc=face, label=name)

    handles = [
        *(mark(w, COLOURS[w] or _INK, "o") for w in WEIGHT_PRECISIONS if w in weights),
        *(mark(v, "#666666", MARKS[v][0]) for v in VECTOR_PRECISIONS if v in vectors),
    ]
    if any(cell.align == "full" for cell in cells):
        handles.append(mark("aligned", "#666666", "o", "white"))
    handles.append(Line2D([], [], color="#444444", linewidth=1, label="frontier"))
    if limited:
        handles.append(Line2D([], [], color="#D55E00", linewidth=1, ls="--", label="budget"))
    title = "weights: colour\nvectors: mark"
    axes.legend(handles=handles, title=title, loc="upper left", bbox_to_anchor=(1.01, 1))


def _label(axes: Any, profile: Profile, target: TargetInfo) -> None:
    """Name the cells along the frontier, the recommended ones, and the reference.

    Of cells that share a label, the first of these carries it, and along the frontier the fastest.
    """
    cells = profile.of_target(target.name)
    several = len({cell.engine for cell in cells if cell.layers > 0}) > 1
    picks = [pick.cell for pick in facts.picks(profile, target)]
    labels: dict[str, Cell] = {}
    for cell in (*frontier_line(cells), *picks, profile.reference_cell(target.name)):
        engine = f" {cell.engine}" if several and cell.layers > 0 else ""
        name = f"{cell.layers}{'a' if cell.align == 'full' else ''}x{cell.dim}{engine}"
        labels.setdefault(name, cell)
    place_labels(
        axes,
        [(name, cell.p50_ms, cell.mean_quality) for name, cell in labels.items()],
        _covered(axes, cells, _lines_of(target)),
    )


def _covered(axes: Any, cells: Sequence[Cell], limits: Mapping[str, float]) -> Any:
    """Return what no label may cover, (points, 2): cells, intervals, and along every line."""
    line = [(cell.p50_ms, cell.mean_quality) for cell in frontier_line(cells)]
    ahead = [cell for cell in cells if cell.on_frontier]
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    lines = [
        *itertools.pairwise(line),
        *(((c.p50_ms, c.mean_interval.low), (c.p50_ms, c.mean_interval.high)) for c in ahead),
        *(
            ((left, limit), (right, limit))
            if key == "min_quality"
            else ((limit, low), (limit, high))
            for key, limit in limits.items()
        ),
    ]
    # Even on a logarithmic axis; fifty points leave no room for a label between two of them.
    along = [np.column_stack([np.geomspace(*x, 50), np.linspace(*y, 50)]) for x, y in _ends(lines)]
    return np.vstack([[(cell.p50_ms, cell.mean_quality) for cell in cells], *along])


def _ends(
    lines: Iterable[tuple[tuple[float, float], tuple[float, float]]],
) -> Iterator[tuple[tuple[float, float], tuple[float, float]]]:
    """Yield from and to where a line goes across, and from and to where it goes up."""
    for (left, low), (right, high) in lines:
        yield (left, right), (low, high)
