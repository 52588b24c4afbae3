"""Colours of pictures and page: WCAG 2.2 asks for a contrast of 3:1 of what is to be recognised."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from contrast import contrast_of
from large_profile import large_profile
from matplotlib.colors import to_rgb

from m2dexport import report
from m2dexport.report.pictures import plot_frontier
from m2dexport.report.style import COLOURS, PARTS

STYLE = (Path(report.__file__).parent / "web" / "page.css").read_text(encoding="utf-8")
PAPERS = sorted(set(re.findall(r"--paper: (#[0-9a-f]{6});", STYLE)))


@pytest.mark.parametrize("paper", PAPERS)
def test_every_colour_is_told_from_the_page_behind_it(paper: str) -> None:
    assert len(PAPERS) == 2  # bright and dark
    for name, colour in (*COLOURS.items(), *PARTS.items()):
        if colour is not None:  # else it is that of text
            assert contrast_of(to_rgb(colour), to_rgb(paper)) > 3, name


def test_every_mark_of_the_picture_is_told_from_white() -> None:
    (axes,) = plot_frontier(large_profile(tasks=1)).axes
    sizes = set()
    for group in axes.collections:
        for *ink, opacity in group.get_edgecolor():
            assert contrast_of([opacity * part + 1 - opacity for part in ink], (1, 1, 1)) > 3
        sizes |= set(getattr(group, "get_sizes", list)())
    assert len(sizes) == 2  # on the frontier and off it
