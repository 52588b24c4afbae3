"""What the gate says, as text, JSON, JUnit XML, Markdown and GitHub's annotations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

if TYPE_CHECKING:
    from m2dexport.profile.compare import CellChange, Comparison, Figure
    from m2dexport.profile.gate import Check, Verdict

_NAME = 24  # characters of a figure's name before its values move to the next line
_HEAD = f"  {'':{_NAME}} {'before':>8} {'now':>8} {'change':>7}  95% interval"


def verdict_lines(verdict: Verdict) -> Iterator[str]:
    """Yield the lines of a table that fits 80 columns, by target and cell."""
    yield _HEAD
    for (target, cell), checks in groupby(verdict.checks, lambda c: (c.target, c.cell)):
        yield f"{cell} ({target})"
        for check in checks:
            if check.figure is None:
                yield f"  FAILED: {check.failure}"
            else:
                yield from _figure_lines(check.figure, status_of(check))
    yield from verdict.remarks


def comparison_lines(comparison: Comparison, *, all_figures: bool = False) -> Iterator[str]:
    """Yield the lines of a table that fits 80 columns: what moved beyond noise, or all figures."""
    shown = [(each, _shown(each, all_figures)) for each in comparison.changes]
    if any(figures for _, figures in shown):
        yield _HEAD
    for each, figures in shown:
        if figures:
            yield f"{each.cell} ({each.target})"
        for figure in figures:
            yield from _figure_lines(figure, "moved" if all_figures and figure.moved else "")
    for word, cells in (("came", comparison.came), ("went", comparison.went)):
        for one in cells:
            yield f"{one.cell} ({one.target}) {word}" + (f": {one.reason}" if one.reason else ".")
    yield from comparison.remarks
    moved = sum(any(figure.moved for figure in each.figures) for each in comparison.changes)
    yield f"{moved} of {len(comparison.changes)} cells that both have moved beyond noise."


def _shown(change: CellChange, all_figures: bool) -> list[Figure]:
    return [figure for figure in change.figures if all_figures or figure.moved]


def _figure_lines(figure: Figure, status: str) -> Iterator[str]:
    name = figure.name
    if len(name) > _NAME:
        yield f"  {name}"
        name = ""
    before, after = (value_of(figure, value) for value in (figure.before, figure.after))
    interval = interval_of(figure)
    line = (
        f"  {name:{_NAME}} {before:>8} {after:>8} {change_of(figure):>7}  {interval:<16} {status}"
    )
    yield line.rstrip()


def value_of(figure: Figure, value: float) -> str:
    """Return a figure before or after in its unit: points, times the reference, MB."""
    if figure.kind in ("size", "memory"):
        return f"{value / 1e6:.1f} MB"
    return f"{value:.2f}" if figure.kind == "quality" else f"{value:.3f}x"


def change_of(figure: Figure) -> str:
    """Return by how many points, or how many times, a figure changed."""
    return f"{figure.change:+.2f}" if figure.kind == "quality" else f"x{figure.change:.2f}"


def interval_of(figure: Figure) -> str:
    """Return the interval of a change; nothing where there is none."""
    if figure.interval is None:
        return ""
    sign = "+" if figure.kind == "quality" else ""
    return f"{figure.interval.low:{sign}.2f} to {figure.interval.high:{sign}.2f}"


def status_of(check: Check) -> str:
    """Return what became of a check in a word or two."""
    if check.failure is not None:
        return "FAILED"
    return "too noisy" if check.within_noise else "ok"


def verdict_facts(verdict: Verdict) -> dict[str, Any]:
    """Return a verdict as JSON has it."""
    checks = [
        {
            "target": check.target,
            "cell": check.cell,
            "figure": check.figure and figure_facts(check.figure),
            "within_noise": check.within_noise,
            "failure": check.failure,
        }
        for check in verdict.checks
    ]
    return {"passed": not verdict.failures, "checks": checks, "remarks": list(verdict.remarks)}


def comparison_facts(comparison: Comparison, *, all_figures: bool = False) -> dict[str, Any]:
    """Return a comparison as JSON has it: the cells that moved, or all."""
    changes = [
        {"target": each.target, "cell": each.cell, "figures": [figure_facts(f) for f in figures]}
        for each in comparison.changes
        if (figures := _shown(each, all_figures))
    ]
    return {
        "changes": changes,
        "came": [asdict(each) for each in comparison.came],
        "went": [asdict(each) for each in comparison.went],
        "remarks": list(comparison.remarks),
    }


def figure_facts(figure: Figure) -> dict[str, Any]:
    """Return a figure as JSON has it."""
    interval = figure.interval and figure.interval.model_dump()
    return {**asdict(figure), "interval": interval}


def junit_xml(verdict: Verdict) -> str:
    """Return JUnit XML: a suite per target, a case per figure of a cell."""
    root = ElementTree.Element("testsuites", name="m2dexport check")
    for target, checks in _by_target(verdict.checks):
        counts = Counter(status_of(check) for check in checks)
        said = {"tests": len(checks), "failures": counts["FAILED"], "skipped": counts["too noisy"]}
        suite = ElementTree.SubElement(
            root,
            "testsuite",
            {"name": target, "errors": "0"} | {key: str(count) for key, count in said.items()},
        )
        for check in checks:
            name = check.figure.name if check.figure else "is there"
            case = ElementTree.SubElement(
                suite, "testcase", classname=f"{target}.{check.cell}", name=name
            )
            if check.failure is not None:
                ElementTree.SubElement(case, "failure", message=_sentence(check))
            elif check.figure is not None:
                if check.within_noise:
                    ElementTree.SubElement(case, "skipped", message="too noisy to tell")
                ElementTree.SubElement(case, "system-out").text = _in_words(check.figure)
    ElementTree.indent(root)
    text: str = ElementTree.tostring(root, encoding="unicode", xml_declaration=False)
    return f'<?xml version="1.0" encoding="utf-8"?>\n{text}\n'


def markdown(verdict: Verdict) -> str:
    """Return a summary in Markdown: what failed first, then every figure."""
    counts = Counter(status_of(check) for check in verdict.checks)
    said = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
    head = "failed" if verdict.failures else "passed"
    if counts["too noisy"]:
        head += f", {counts['too noisy']} too noisy to tell"
    lines = [f"## m2dexport check: {head}", "", said, ""]
    lines += ["| cell | target | figure | before | now | change | 95% interval | |"]
    lines += ["| --- | --- | --- | ---: | ---: | ---: | --- | --- |"]
    for check in sorted(verdict.checks, key=lambda check: check.failure is None):
        figure, status = check.figure, status_of(check)
        if figure is None:
            cells = ["", "", "", "", "", f"{status}: {check.failure}"]
        else:
            values = [value_of(figure, value) for value in (figure.before, figure.after)]
            cells = [figure.name, *values, change_of(figure), interval_of(figure), status]
        row = [check.cell, check.target, *cells]
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |")
    lines += ["", *(f"- {remark}" for remark in verdict.remarks)]
    return "\n".join(lines).rstrip() + "\n"


def workflow_commands(verdict: Verdict) -> Iterator[str]:
    """Yield GitHub's workflow commands: an error per failure, a warning per figure in noise.

    Their form: docs.github.com, "Workflow commands for GitHub Actions".
    """
    for check in verdict.checks:
        if check.failure is not None:
            yield f"::error title=m2dexport check::{_escaped(_sentence(check))}"
        elif check.within_noise and check.figure is not None:
            said = f"{check.cell} ({check.target}): {_in_words(check.figure)}, too noisy to tell."
            yield f"::warning title=m2dexport check::{_escaped(said)}"


def _by_target(checks: Sequence[Check]) -> list[tuple[str, list[Check]]]:
    names = dict.fromkeys(check.target for check in checks)
    return [(name, [check for check in checks if check.target == name]) for name in names]


def _sentence(check: Check) -> str:
    return f"{check.cell} ({check.target}): {check.failure}"


def _in_words(figure: Figure) -> str:
    before, after = (value_of(figure, value) for value in (figure.before, figure.after))
    interval = f" ({interval_of(figure)})" if figure.interval else ""
    return f"{figure.name} {before} before, {after} now, {change_of(figure)}{interval}"


def _escaped(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
