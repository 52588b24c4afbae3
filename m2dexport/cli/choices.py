"""What ``select`` prints: the choice, what else fits, what binds, and the command to type next."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m2dexport.cli.columns import give, print_table, say, terminal_width, with_spread

if TYPE_CHECKING:
    from m2dexport.profile.select import Choice, Selection

_OF_ANY_METRIC = (
    "untrained",
    "collapsed",
    "slower_than_fp32",
    "batch_dependent",
    "mixed_precision",
)
_LEFT = ("fits best", "query encoder")


def print_selection(selection: Selection, profile_path: Path, target: str | None = None) -> None:
    """Print the chosen cell, the best others, the limit that binds, and the command to type next.

    Args:
        selection: what was chosen.
        profile_path: from which profile.json.
        target: the name of the target, where the profile has several.
    """
    cell, index = selection.cell, selection.index
    # The others compare means, which is not what is chosen by here.
    flags = [each for each in cell.flags if not selection.by_one_metric or each in _OF_ANY_METRIC]
    if index is not None:
        _print_encoders(selection)
    say(
        f"{cell.id}: {selection.metric} {_points(selection.best[0], selection)}"
        + (
            f" as a query encoder of {index.id}, whose own queries have {selection.native:.2f}"
            if index
            else ""
        )
        + f", p50 {cell.p50_ms:.2f} ms, p95 {cell.p95_ms:.2f} ms, {cell.size_bytes / 1e6:.1f} MB, "
        f"peak memory {cell.peak_memory_bytes / 1e6:.0f} MB, {cell.bytes_per_vector} bytes per "
        "vector" + (f" [{' '.join(flags)}]" if flags else "")
    )
    _print_best(selection)
    limits = [each.sentence(selection.metric) for each in selection.best[0].standings]
    if limits:
        say(f"Limits: {'; '.join(limits)}.")
    for sentence in _remarks(selection):
        say(sentence)
    named = f" --target {shlex.quote(target)}" if target else ""
    consent = " --allow-batch-dependent" if "batch_dependent" in cell.flags else ""
    wrote = " --index INDEX.m2d" if index else ""
    give(
        f"Next: m2dexport bundle {shlex.quote(str(profile_path))} --cell {cell.id}{named}{consent}"
        f"{wrote} --out {cell.id}.m2d"
        + (" (INDEX.m2d is the bundle that wrote the index)" if index else "")
    )


def selection_facts(selection: Selection) -> dict[str, Any]:
    """Return a selection as JSON has it; what there is not is null."""
    index = selection.index
    return {
        "cell": selection.cell.model_dump(mode="json"),
        "metric": selection.metric,
        "points": selection.points,
        "binding": selection.binding,
        "next_better": selection.next_better and selection.next_better.id,
        "best": [_facts(choice) for choice in selection.best],
        "beaten_by": selection.beaten_by and selection.beaten_by.id,
        "passed_over": selection.passed_over and _facts(selection.passed_over),
        "without_consent": selection.without_consent and selection.without_consent.id,
        "index_cell": index and index.id,
        "native": selection.native if index else None,
        "encoders": [{"cell": cell.id, "points": points} for cell, points in selection.encoders],
    }


def _facts(choice: Choice) -> dict[str, Any]:
    return {
        "cell": choice.cell.id,
        "points": choice.points,
        "interval": choice.interval,
        "loss": choice.loss,
        "loss_interval": choice.loss_interval,
        "limits": [
            {"key": each.key, "value": each.value, "limit": each.bound, "near": each.near}
            for each in choice.standings
        ],
    }


def _remarks(selection: Selection) -> list[str]:
    """Return what binds, and what was not chosen though it is better in something."""
    found = []
    if selection.next_better is None:
        found.append("No limit binds: no cell of the frontier is better beyond noise.")
    else:
        several = " and " in (selection.binding or "")
        verb, it = ("bind", "them") if several else ("binds", "it")
        found.append(
            f"{selection.binding} {verb}: without {it}, {selection.next_better.id} is better."
        )
    if selection.beaten_by is not None:
        found.append(
            f"No cell of the frontier fits: {selection.beaten_by.id} beats this one, and misses a "
            "limit."
        )
    if selection.index is None and selection.best[0].loss_interval is None:
        found.append(
            f"{selection.metric} has no replicates, which main metrics have alone: the noise of "
            "a difference is not known, and any above 0.1 points counts."
        )
    elif selection.by_one_metric and selection.best[0].interval is not None:
        found.append(
            f"Noise is that of {selection.metric} (± is half of its 95% interval): one cell is "
            "better than another if their paired difference is over 0.1 points, and its interval "
            "above zero."
        )
    passed = selection.passed_over
    if passed is not None:
        found.append(
            f"Off the frontier, {passed.cell.id} fits and has {passed.points:.2f}: what beats it "
            "misses a limit."
        )
    if selection.without_consent is not None:
        found.append(
            f"{selection.without_consent.id} would be chosen, but a text's vector depends on the "
            "texts beside it; --allow-batch-dependent accepts that."
        )
    return found


def _print_best(selection: Selection) -> None:
    """Print the choice and the best others that fit, with what each loses."""
    titles = ["fits best", selection.metric, "loss, 95%", "p50 ms", "p95 ms", "MB", "B/vec"]
    rows = [
        [
            choice.cell.id,
            _points(choice, selection),
            _loss(choice),
            f"{choice.cell.p50_ms:.2f}",
            f"{choice.cell.p95_ms:.2f}",
            f"{choice.cell.size_bytes / 1e6:.1f}",
            str(choice.cell.bytes_per_vector),
        ]
        for choice in selection.best
    ]
    _print_narrow(titles, rows)


def _points(choice: Choice, selection: Selection) -> str:
    """Return the points, with their spread where one metric decides."""
    if not selection.by_one_metric or choice.interval is None:
        return f"{choice.points:.2f}"
    return with_spread(choice.points, *choice.interval)


def _loss(choice: Choice) -> str:
    if choice.loss_interval is None:
        return f"{choice.loss:.2f}"
    low, high = choice.loss_interval
    return f"{choice.loss:.2f} [{low:.2f}, {high:.2f}]"


def _print_encoders(selection: Selection) -> None:
    """Print the cells of the frontier that can query an index."""
    titles = ["query encoder", f"its {selection.metric}", "loss", "p50 ms", "p95 ms", "MB"]
    rows = [
        [
            cell.id,
            f"{points:.2f}",
            f"{selection.native - points:.2f}",
            f"{cell.p50_ms:.2f}",
            f"{cell.p95_ms:.2f}",
            f"{cell.size_bytes / 1e6:.1f}",
        ]
        for cell, points in selection.encoders
    ]
    _print_narrow(titles, rows)


def _print_narrow(titles: list[str], rows: list[list[str]]) -> None:
    """Print as many columns as the terminal has room for, from the left."""
    width = terminal_width()
    shown = len(titles)
    widths = [max(map(len, texts)) for texts in zip(titles, *rows, strict=True)]
    while width is not None and shown > 1 and sum(widths[:shown]) + 2 * (shown - 1) > width:
        shown -= 1
    left = [title in _LEFT for title in titles]
    print_table(titles[:shown], [row[:shown] for row in rows], left[:shown])
