"""Labels of points in a matplotlib picture, where they sit on no point and on no other label."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_PADDING = 1.0  # pixels around a label that stay free
_MARK = 5.0  # pixels from a point to where its mark ends
#: Ways from a point to its label's centre: near ones first, at each distance all around.
_DISTANCES = (1.0, 1.8, 2.8, 4.0, 5.5)
_ANGLES = (135, 315, 45, 225, 90, 270, 180, 0)  # degrees; first up and to the left

Doubles = NDArray[np.float64]


def place_labels(axes: Any, labels: Sequence[tuple[str, float, float]], points: Doubles) -> None:
    """Write a label beside each point, with a thin line to it where it is not next to it.

    Each label takes the nearest place that is within the axes, and free of points and of the labels
    before it; where there is none, the place with the fewest points in it that no label has.

    Args:
        axes: matplotlib's, of a figure that was drawn, so that its layout is final.
        labels: text, x and y of the point that is labelled.
        points: x and y of everything that labels must not cover, (points, 2).
    """
    figure = axes.figure
    pixel = 72 / figure.dpi  # in points, which are the same at any dots per inch
    taken: list[Doubles] = []
    frame = axes.get_window_extent()
    obstacles = axes.transData.transform(points)
    for text, x, y in labels:
        origin = axes.transData.transform((x, y))
        note = axes.annotate(
            text,
            (x, y),
            xytext=(0, 0),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=9,
            zorder=6,
        )
        extent = note.get_window_extent()
        half = np.array([extent.width, extent.height]) / 2 + _PADDING
        offset = _free_place(origin, half, obstacles, taken, frame)
        taken.append(np.concatenate([origin + offset - half, origin + offset + half]))
        note.set_position(offset * pixel)
        if np.abs(offset / half).max() > _DISTANCES[1]:
            axes.annotate(
                "",
                (x, y),
                xytext=tuple((offset - np.sign(offset) * half * 0.7) * pixel),
                textcoords="offset points",
                arrowprops={"arrowstyle": "-", "color": "#888888", "lw": 0.7},
                zorder=1,
            )


def _free_place(
    origin: Doubles, half: Doubles, obstacles: Doubles, taken: Sequence[Doubles], frame: Any
) -> Doubles:
    """Return the way in pixels from a point to the centre of its label."""
    low, high = np.array([frame.x0, frame.y0]), np.array([frame.x1, frame.y1])
    best, fewest = np.zeros(2), np.inf
    for distance, angle in itertools.product(_DISTANCES, _ANGLES):
        way = np.array([np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))])
        offset = np.sign(np.round(way, 6)) * (half * distance + _MARK)
        first, last = origin + offset - half, origin + offset + half
        if (first < low).any() or (last > high).any():
            continue
        if any((first < box[2:]).all() and (last > box[:2]).all() for box in taken):
            continue
        inside = ((obstacles > first - _MARK) & (obstacles < last + _MARK)).all(axis=1).sum()
        if inside < fewest:
            best, fewest = offset, inside
        if inside == 0:
            break
    return best
