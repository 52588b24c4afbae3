"""Pictures of layers x dims, tasks and size, by matplotlib."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from m2dexport.profile.flags import collapsed_on
from m2dexport.profile.schema import MEAN, Cell, Profile
from m2dexport.report.data import query_points, size_cells, size_parts
from m2dexport.report.style import PARTS, SCALE, SCALE_TURN, literal

_NAME = 28  # characters of a task's name along an axis
_TITLE = 44  # characters of a picture's title that fit above a panel

Points = Mapping[tuple[int, int], float]  # (layers, dim) -> a figure


def plot_maps(profile: Profile) -> Any:
    """Return a matplotlib figure of mean quality and of retention, layers x dims.

    Columns: plain cells, aligned cells, and the queries of aligned cells on the full depth's index.
    Weights and vectors are those of the first target's reference. Figures of the same tasks are on
    one scale.
    """
    from matplotlib.figure import Figure

    reference = profile.reference_cell()
    columns = _columns(profile)
    keys = [key for points, _ in columns.values() for key in points]
    layers, dims = (sorted({key[axis] for key in keys}) for axis in (0, 1))
    figure = Figure(figsize=(4.6 * len(columns), 7), layout="constrained")
    upper, lower = figure.subplots(2, len(columns), squeeze=False)
    asked = [name for name in columns if name.startswith("queries")]
    alone = asked if profile.query_mains != profile.mains else []
    for group in ([name for name in columns if name not in alone], alone):
        panels = [(upper[list(columns).index(name)], columns[name][0]) for name in group]
        if panels:
            span = _span([value for _, points in panels for value in points.values()])
            _draw_maps(panels, layers, dims, "{:.1f}", span)
    shares = [
        {key: 100 * value / whole for key, value in points.items()} if whole else {}
        for points, whole in columns.values()
    ]
    _draw_maps(list(zip(lower, shares, strict=True)), layers, dims, "{:.0f}", (40, 100))
    for words, panels in (("quality, points", upper), ("retention, %", lower)):
        for axes, name in zip(panels, columns, strict=True):
            axes.set_title(f"{words}: {name}", fontsize=10)
    title = (
        f"Mean quality, {reference.weights} weights, {reference.vectors} vectors; "
        f"retention against {reference.id}"
    )
    wrapped = textwrap.fill(title, _TITLE * len(columns), break_on_hyphens=False)
    figure.suptitle(wrapped, fontsize=11)
    return figure


def _columns(profile: Profile) -> dict[str, tuple[Points, float]]:
    """Return the figures of each kind of cells that there is, and the reference's."""
    cells, reference = _like_reference(profile), profile.reference_cell()
    native = [reference.quality[name] for name in profile.query_mains]
    queries = zip(cells, query_points(profile, cells), strict=True)
    columns: dict[str, tuple[Points, float]] = {
        "plain": (_grid(cells, "none"), reference.mean_quality),
        "aligned": (_grid(cells, "full"), reference.mean_quality),
        f"queries on an index of depth {profile.checkpoint.layers}": (
            {(c.layers, c.dim): points[MEAN] for c, points in queries if MEAN in points},
            float(np.mean(native)) if native else 0.0,
        ),
    }
    return {name: column for name, column in columns.items() if column[0]}


def plot_tasks(profile: Profile) -> Any:
    """Return a matplotlib figure of every cell's retention on every task: where cells collapse.

    Weights and vectors are those of the first target's reference. A cross marks the tasks on which
    a cell that is flagged ``collapsed`` did so.
    """
    from matplotlib.figure import Figure

    metrics, reference = profile.mains, profile.reference_cell()
    cells = sorted(_like_reference(profile), key=lambda c: (-c.layers, -c.dim))
    collapsed = collapsed_on(cells, metrics)
    groups = [[cell for cell in cells if cell.align == align] for align in ("none", "full")]
    groups = [group for group in groups if group]
    longest = max(map(len, groups))
    width = (1.6 + 0.62 * len(metrics)) * len(groups)
    figure = Figure(figsize=(max(width, 5), max(4, 2.2 + 0.24 * longest)), layout="constrained")
    for axes, group in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups, strict=True):
        shares = np.array([[_retained(cell, reference, m) for m in metrics] for cell in group])
        axes.imshow(shares, cmap=SCALE, vmin=0, vmax=100, aspect="auto")
        for (row, column), share in np.ndenumerate(shares):
            fallen = metrics[column] in collapsed.get(group[row].id, ())
            _write(axes, column, row, f"{share:.0f}{' ×' if fallen else ''}", share, (0, 100))
        axes.set_xticks(range(len(metrics)), _short_names(metrics), rotation=60, ha="right")
        axes.set_yticks(range(len(group)), [f"{c.layers}x{c.dim}" for c in group], fontsize=8)
        axes.set_title("aligned" if group[0].align == "full" else "plain", fontsize=10)
    figure.suptitle(
        textwrap.fill(f"Retention per task, % of {reference.id}; ×: collapsed", _TITLE), fontsize=11
    )
    return figure


def plot_size(profile: Profile) -> Any:
    """Return a matplotlib figure of what the files consist of: a bar for each of ``size_cells``."""
    from matplotlib.figure import Figure

    cells = size_cells(profile.of_target())
    figure = Figure(figsize=(max(6.0, 1.5 + 0.34 * len(cells)), 4.5), layout="constrained")
    axes = figure.subplots()
    bottom = np.zeros(len(cells))
    weights = list(dict.fromkeys(cell.weights for cell in cells))
    at = np.arange(len(cells)) + np.array([weights.index(c.weights) for c in cells])  # with gaps
    for index, (name, colour) in enumerate(PARTS.items()):
        heights = np.array([size_parts(cell)[index] / 1e6 for cell in cells])
        axes.bar(at, heights, bottom=bottom, color=colour, label=name)
        bottom += heights
    axes.set_xticks(at, [str(cell.layers) for cell in cells])
    for name in weights:
        own = [x for x, cell in zip(at, cells, strict=True) if cell.weights == name]
        axes.annotate(
            name,
            (float(np.mean(own)), 0),
            xycoords=("data", "axes fraction"),
            xytext=(0, -24),
            textcoords="offset points",
            ha="center",
            va="top",
        )
    axes.set_xlabel("layers, of each weight precision", labelpad=20)
    axes.set_ylabel("MB")
    axes.set_title("What the files consist of")
    axes.grid(axis="y", alpha=0.25)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1))
    return figure


def _like_reference(profile: Profile) -> list[Cell]:
    """Return the cells with the weights, vectors and engine of the reference, and depth 0."""
    reference = profile.reference_cell()
    return [
        cell
        for cell in profile.of_target()
        if (cell.weights, cell.vectors) == (reference.weights, reference.vectors)
        and (cell.layers == 0 or cell.engine == reference.engine)
    ]


def _grid(cells: Sequence[Cell], align: str) -> Points:
    return {(c.layers, c.dim): c.mean_quality for c in cells if c.align == align}


def _span(values: Sequence[float]) -> tuple[float, float]:
    """Return the ends of a scale; that of one value has it in its middle."""
    low, high = min(values), max(values)
    return (low, high) if low < high else (low - 1, high + 1)


def _draw_maps(
    panels: Sequence[tuple[Any, Points]],
    layers: Sequence[int],
    dims: Sequence[int],
    form: str,
    span: tuple[float, float],
) -> None:
    """Draw figures into axes, all on one scale, with its colours beside the last."""
    for axes, points in panels:
        values = np.full((len(layers), len(dims)), np.nan)
        for (layer, dim), value in points.items():
            values[layers.index(layer), dims.index(dim)] = value
        low, high = span
        image = axes.imshow(values, cmap=SCALE, vmin=low, vmax=high, aspect="auto", origin="lower")
        for (row, column), value in np.ndenumerate(values):
            if not np.isnan(value):
                _write(axes, column, row, form.format(value), value, span)
        axes.set_xticks(range(len(dims)), map(str, dims))
        axes.set_yticks(range(len(layers)), map(str, layers))
        axes.set_xlabel("dims")
        axes.set_ylabel("layers")
    axes.figure.colorbar(image, ax=[each for each, _ in panels], aspect=30, pad=0.02)


def _write(
    axes: Any, x: float, y: float, text: str, value: float, span: tuple[float, float]
) -> None:
    """Write a figure on its colour: white on the dark part of the scale, black on the bright."""
    low, high = span
    dark = value < low + SCALE_TURN * (high - low)
    axes.text(x, y, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")


def _retained(cell: Cell, reference: Cell, metric: str) -> float:
    whole = reference.quality[metric]
    return 100 * cell.quality[metric] / whole if whole else float("nan")


def _short_names(metrics: Sequence[str]) -> list[str]:
    names = [metric.rpartition("/")[0] for metric in metrics]
    return [literal(name if len(name) <= _NAME else f"{name[:_NAME]}…") for name in names]
