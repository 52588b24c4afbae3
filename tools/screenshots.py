"""Take the screenshots of a report that the documents show: bright and dark, wide and narrow.

python tools/screenshots.py profile/report.html --out docs/images

Needs Chromium, and playwright (pip install -e ".[dev]").
"""

from __future__ import annotations

import argparse
import io
import shutil
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

#: Name -> width and height of the window, colour scheme, and what is at its top.
SHOTS = {
    "report-light": (1200, 1000, "light", "#choice"),
    "report-dark": (1200, 800, "dark", "#maps"),
    "report-phone": (360, 740, "light", "#plane"),
}
_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_COLOURS = 128  # of a palette; a page has few, and its picture then takes a third of the bytes


def main() -> None:
    """Write a PNG for each of ``SHOTS``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("report", type=Path, help="report.html")
    parser.add_argument("--out", type=Path, default=Path("docs/images"), help="folder")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as started:
        found = next(filter(None, map(shutil.which, _NAMES)), started.chromium.executable_path)
        browser = started.chromium.launch(
            executable_path=found, args=["--no-sandbox", "--disable-gpu"]
        )
        for name, (width, height, scheme, top) in SHOTS.items():
            page = browser.new_context(
                viewport={"width": width, "height": height}, color_scheme=scheme, offline=True
            ).new_page()
            page.goto(options.report.absolute().as_uri())
            page.wait_for_selector("html[data-ready]", state="attached")
            page.evaluate(
                f"document.querySelector('{top}').scrollIntoView({{behavior: 'instant'}})"
            )
            image = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
            path = options.out / f"{name}.png"
            image.quantize(_COLOURS).save(path, optimize=True)
            print(f"{path}: {path.stat().st_size / 1000:.0f} kB")
            page.context.close()
        browser.close()


if __name__ == "__main__":
    main()
