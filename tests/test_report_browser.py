"""report.html as a person uses it, in Chromium: wide, narrow, dark, on paper, by keyboard."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from chromium import chromium, contrast
from contrast import contrast_of
from large_profile import large_profile
from playwright.sync_api import expect

from m2dexport.report.page import page_of

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

_POINTS = (
    "document.getElementById('scatter').data.filter(t => t.customdata).flatMap(t => t.customdata)"
)
_BUTTONS = {"Download plot as a PNG", "Zoom", "Pan", "Zoom in", "Zoom out", "Reset axes"}
_TICK = "#scatter .xtick text"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as opened:
        yield opened


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(page_of(large_profile(("edge", "server"), 3, (256, 384))), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def said() -> list[str]:
    """What the page said on the console, what failed in it, and what it asked for."""
    return []


@pytest.fixture(scope="module")
def wide(browser: Browser, file: Path, said: list[str]) -> Page:
    return opened(browser, file, said, viewport={"width": 1280, "height": 900})


def opened(browser: Browser, file: Path, said: list[str], **options: Any) -> Page:
    page = browser.new_context(offline=True, **options).new_page()
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: said.append(request.url))
    page.goto(file.as_uri())
    page.wait_for_selector("html[data-ready]", state="attached")
    assert said == [file.as_uri()]
    said.clear()
    return page


def contrasts_of_marks(page: Page) -> list[float]:
    """Return the contrast of each kind of mark of the scatter, as opaque as it is, to the page."""
    behind, marks = page.evaluate(
        """() => {
        const parts = (colour) => colour.match(/[0-9.]+/g).slice(0, 3).map(each => each / 255);
        const marks = [...document.querySelectorAll("#scatter .scatterlayer path.point")];
        const kinds = new Set(marks.map(mark => getComputedStyle(mark))
          .filter(mark => mark.stroke !== "none")
          .map(mark => JSON.stringify([parts(mark.stroke), Number(mark.opacity)])));
        return [parts(getComputedStyle(document.body).backgroundColor), [...kinds].map(JSON.parse)];
        }"""
    )
    mixed = [
        [opacity * c + (1 - opacity) * b for c, b in zip(colour, behind, strict=True)]
        for colour, opacity in marks
    ]
    assert len(mixed) > 3  # weights, on the frontier and off it
    return [contrast_of(colour, behind) for colour in mixed]


def width(page: Page) -> int:
    return int(page.evaluate("document.documentElement.scrollWidth"))


def test_the_page_opens_offline_with_every_cell_of_a_target_and_no_word_on_the_console(
    wide: Page, said: list[str]
) -> None:
    cells = wide.evaluate("C.target.filter(name => name === 'edge').length")
    assert wide.evaluate(f"{_POINTS}.length") == cells > 300
    assert width(wide) == 1280
    assert wide.title() == "Profile of the checkpoint that ships with m2dexport"
    charts = wide.evaluate("[...document.querySelectorAll('.chart')].map(c => !!c.data)")
    assert charts == [True] * 7
    buttons = wide.evaluate(
        "[...document.querySelectorAll('.modebar-btn')].map(b => b.dataset.title)"
    )
    assert set(buttons) == _BUTTONS  # none of which sends figures anywhere
    assert said == []


def test_a_filter_is_reached_by_tab_and_changes_the_points(wide: Page) -> None:
    before = wide.evaluate(f"{_POINTS}.length")
    wide.evaluate("document.activeElement.blur()")
    for _ in range(60):
        wide.keyboard.press("Tab")
        if wide.evaluate("document.activeElement.value") == "fp32":
            break
    assert wide.evaluate("document.activeElement.type") == "checkbox"
    assert wide.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    wide.keyboard.press("Space")
    rest = wide.evaluate(f"{_POINTS}.map(i => C.weights[i])")
    assert 0 < len(rest) < before and "fp32" not in rest
    assert f"{len(rest)} of {before} cells are shown" in wide.inner_text("#shown")
    wide.keyboard.press("Space")
    wide.check("#frontier input")
    assert wide.evaluate(f"{_POINTS}.every(i => C.frontier[i])")
    wide.uncheck("#frontier input")
    assert wide.evaluate(f"{_POINTS}.length") == before


def test_hover_has_every_figure_of_a_cell_and_a_click_shows_its_commands(wide: Page) -> None:
    wide.evaluate("document.getElementById('scatter').scrollIntoView({behavior: 'instant'})")
    marks = wide.locator("#scatter .scatterlayer .trace:nth-child(3) path.point")
    marks.last.hover(force=True)
    wide.wait_for_selector("#scatter .hoverlayer text")
    words = wide.text_content("#scatter .hoverlayer") or ""
    for figure in ("mean: ", "p95, p99 ms: ", "peak memory: ", "bytes per vector: ", "flags: "):
        assert figure in words
    hovered = next(name for name in wide.evaluate("C.id") if words.startswith(name))
    marks.last.click(force=True)
    assert f"--cell {hovered} " in wide.inner_text("#bundle")


def test_a_cell_is_chosen_by_keyboard_and_its_figures_and_commands_follow(wide: Page) -> None:
    wide.focus("#cell")
    wide.keyboard.type("4x256-int8-ub")
    assert wide.inner_text("#bundle").startswith(
        "m2dexport bundle profile.json --cell 4x256-int8-ubinary"
    )
    assert "--layers 4 --dim 256" in wide.inner_text("#build")
    assert "4x256-int8-ubinary" in wide.inner_text("#cell-figures")


def test_budgets_axes_maps_and_targets_follow_the_controls(wide: Page) -> None:
    shapes = "document.getElementById('scatter').layout.shapes.map(s => s.x0)"
    assert wide.evaluate(shapes) == [1.5, 0]
    wide.select_option("#x", "p95")
    assert wide.evaluate(shapes) == [2, 0]
    compared = "['none', 'full'].map(k => document.getElementById(`map-${k}`).data[0])"
    scales = wide.evaluate(f"{compared}.map(map => [map.zmin, map.zmax, map.showscale])")
    assert scales[0] == scales[1] and scales[0][0] < scales[0][1] and scales[0][2]
    wide.select_option("#map-figure", "retention")
    shown = wide.evaluate("document.getElementById('map-none').data[0].z.flat().at(-1)")
    assert shown == pytest.approx(100)
    marked = wide.evaluate(
        "document.getElementById('tasks-none').data[1].text.filter(t => /×/.test(t))"
    )
    assert len(marked) == 1
    wide.select_option("#target", "server")
    assert wide.evaluate(shapes) == []
    assert wide.evaluate(f"new Set({_POINTS}.map(i => C.target[i])).size") == 1
    wide.select_option("#target", "edge")


def test_a_table_is_sorted_by_its_heads_and_the_table_of_all_cells_obeys_the_filters(
    wide: Page,
) -> None:
    head = wide.locator("#table table.sortable th button", has_text="p50 ms")
    head.press("Enter")
    assert wide.get_attribute("#table th[aria-sort]", "aria-sort") == "ascending"
    column = wide.evaluate(
        "[...document.querySelector('#table th[aria-sort]').parentNode.cells]"
        ".findIndex(c => c.ariaSort)"
    )
    times = wide.evaluate(
        f"[...document.querySelector('#table tbody').rows].map(r => +r.cells[{column}].textContent)"
    )
    assert times == sorted(times)
    wide.locator("#all summary").press("Enter")
    wide.wait_for_selector("#all-table tbody tr")
    rows = "document.querySelectorAll('#all-table tbody tr').length"
    assert wide.evaluate(rows) == wide.evaluate(f"{_POINTS}.length")


def test_on_a_dark_phone_nothing_runs_off_the_screen_and_text_is_bright(
    browser: Browser, file: Path, said: list[str]
) -> None:
    page = opened(browser, file, said, viewport={"width": 360, "height": 740}, color_scheme="dark")
    assert width(page) == 360
    ends = "[...document.querySelectorAll('.chart svg')].map(e => e.getBoundingClientRect().right)"
    assert max(page.evaluate(ends)) <= 360
    for text in ("body", _TICK, "#choice .command"):
        assert contrast(page, text) > 4.5, text
    assert "reference" in page.locator("#scatter .annotation-text").all_text_contents()
    assert min(contrasts_of_marks(page)) > 3
    page.emulate_media(color_scheme="light")
    expect(page.locator(_TICK).first).to_have_css("fill", "rgb(26, 26, 26)")  # the charts follow
    assert contrast(page, _TICK) > 4.5
    assert min(contrasts_of_marks(page)) > 3
    page.context.close()


def test_on_paper_the_page_is_bright_within_its_margins_and_without_controls(
    browser: Browser, file: Path, said: list[str]
) -> None:
    page = opened(browser, file, said, viewport={"width": 703, "height": 900}, color_scheme="dark")
    page.emulate_media(media="print")
    expect(page.locator(_TICK).first).to_have_css("fill", "rgb(0, 0, 0)")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert contrast(page, _TICK) > 4.5
    assert min(contrasts_of_marks(page)) > 3
    assert width(page) == 703  # an A4 sheet but for its margins
    assert not page.is_visible("#plane .filters")
    assert page.is_visible("#table tbody tr:last-child")
    assert page.pdf().startswith(b"%PDF")
    page.context.close()


def test_without_javascript_the_choice_and_the_frontier_are_there(
    browser: Browser, file: Path
) -> None:
    page = browser.new_context(java_script_enabled=False).new_page()
    page.goto(file.as_uri())
    assert "need JavaScript" in page.inner_text("noscript")
    assert page.is_visible("#choice .command") and page.is_visible("#table tbody tr:last-child")
    assert not page.is_visible("#trouble")
    page.context.close()
