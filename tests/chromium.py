"""Chromium for the tests of what people look at."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from contrast import contrast_of
from playwright.sync_api import sync_playwright

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_QUIET = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


@contextmanager
def chromium() -> Iterator[Browser]:
    """Yield the browser that is installed; without one, the test fails."""
    with sync_playwright() as started:
        found = next(filter(None, map(shutil.which, _NAMES)), started.chromium.executable_path)
        if not Path(found).exists():
            pytest.fail(
                "pages are tested in Chromium, which is not installed; run: "
                "apt-get install chromium, or python -m playwright install chromium"
            )
        opened = started.chromium.launch(executable_path=found, args=list(_QUIET))
        yield opened
        opened.close()


def contrast(page: Page, selector: str) -> float:
    """Return the contrast of a text to the page behind it, as WCAG 2.2 defines it."""
    colours = page.evaluate(
        """(selector) => {
        const text = getComputedStyle(document.querySelector(selector));
        const ink = selector.includes("text") ? text.fill : text.color;
        return [ink, getComputedStyle(document.body).backgroundColor]
          .map(c => c.match(/[0-9.]+/g).slice(0, 3).map(Number));
        }""",
        selector,
    )
    ink, paper = ([c / 255 for c in colour] for colour in colours)
    return contrast_of(ink, paper)
