"""What ``profile`` and ``profile show`` print: cells in tables that fit the terminal."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from m2dexport.cli.columns import (
    columns_of,
    fitting,
    give,
    in_two_lines,
    named_columns,
    print_csv,
    print_rows,
    print_table,
    say,
    sorted_by,
    terminal_width,
)
from m2dexport.measure.quantiles import LONG_TAIL

if TYPE_CHECKING:
    from m2dexport.profile.schema import Cell, Profile, TargetInfo

#: The columns that a table has room for next after the mean, p50 and the first tasks' metrics.
_NEXT = ("bytes", "p95", "for", "loss")
_ENOUGH_RUNS = 100  # for a p95: five of them are slower
_NAMED = 3


@dataclass(frozen=True)
class View:
    """Which cells of a profile are shown, and what of them."""

    target: str | None = None  # None: every target, one after the other
    every: bool = False  # all cells; else the recommended ones and the frontier
    sort: str | None = None  # a column
    columns: tuple[str, ...] = ()  # none: as many as there is room for


def print_profile(profile: Profile, path: Path) -> None:
    """Print the cells worth shipping, why, and the command that comes next, for every target.

    Args:
        profile: what was measured.
        path: of its profile.json.
    """
    from m2dexport.profile.recommend import reasons

    for target in profile.targets:
        cells = profile.of_target(target.name)
        _print_heading(profile, target)
        _print_cells(profile, _recommended(profile, target), View(target.name))
        for each in reasons(target.recommended, cells):
            say(f"{each.lead.capitalize()}: {each.cell.id}, since {each.why}.")
        on = sum(cell.on_frontier for cell in cells)
        costs = "quality, p50, size, bytes per vector"
        say(f"{on} of {len(cells)} cells are on the frontier ({costs}).")
        _print_tails(cells)
        _print_samples(target)
    _print_failures(profile)
    quoted = shlex.quote(str(path))
    give(f"All of them: m2dexport profile show {quoted} --all")
    for target in profile.targets:
        named = f" --target {shlex.quote(target.name)}" if len(profile.targets) > 1 else ""
        cell = target.recommended.within_budget or target.recommended.best
        give(f"Next: m2dexport bundle {quoted} --cell {cell}{named} --out {cell}.m2d")


def print_cells(profile: Profile, view: View) -> None:
    """Print what is seen of a profile: the recommended cells first, then the frontier.

    Raises:
        UsageError: when the profile lacks the target or a column.
    """
    named_columns(columns_of(profile, {}), [*view.columns, *([view.sort] if view.sort else [])])
    for target in profile.targets if view.target is None else (profile.target(view.target),):
        cells = _shown(profile, target, view)
        _print_heading(profile, target)
        if not _print_cells(profile, cells, view):
            notes = _notes(profile, target)
            say("; ".join(f"{why}: {cell}" for cell, why in notes.items()) + ".")
        every = profile.of_target(target.name)
        if not view.every:
            what = "those recommended, then the frontier; --all shows the rest"
            say(f"{len(cells)} of {len(every)} cells: {what}.")
        _print_tails(every)
        _print_samples(target)
    print_cross_depth(profile)
    _print_failures(profile)


def print_cells_as_csv(profile: Profile, view: View) -> None:
    """Print the same cells as CSV, those of all targets in one table.

    Raises:
        UsageError: as ``print_cells``.
    """
    columns = columns_of(profile, {})
    targets = profile.targets if view.target is None else (profile.target(view.target),)
    names = view.columns or tuple(name for name in columns if name != "for")
    cells = [cell for target in targets for cell in _shown(profile, target, view)]
    print_csv(named_columns(columns, names), cells)


def print_cross_depth(profile: Profile) -> None:
    """Print what queries of each depth find in documents of the full one, unquantized."""
    full = str(profile.checkpoint.layers)
    mains = profile.query_mains
    dims = list(dict.fromkeys(each.dim for each in profile.cross_depth))
    found = {(each.dim, each.queries, each.documents): each for each in profile.cross_depth}
    if not found or not all((dim, full, full) in found for dim in dims):
        return

    def text(dim: int, name: str) -> str:
        each = found.get((dim, name, full))
        return f"{sum(each.quality[m] for m in mains) / len(mains):.2f}" if each else "-"

    say(
        f"Queries of each depth on an index of depth {full}, {' and '.join(mains)}, "
        f"{profile.reference_cell().weights} weights, float32 vectors:"
    )
    names = dict.fromkeys(each.queries for each in profile.cross_depth)
    print_table(
        ["queries of depth", *(f"d={dim}" for dim in dims)],
        [[name, *(text(dim, name) for dim in dims)] for name in names],
        [True, *(False for _ in dims)],
    )


def _print_heading(profile: Profile, target: TargetInfo) -> None:
    from m2dexport.report.facts import shape_words

    machine, threads = target.machine, profile.threads(target.name)
    named = f"{target.name}: " if len(profile.targets) > 1 else ""
    asked = target.asked[0] if target.asked else None
    say(
        f"{named}{machine.cpu} ({' '.join(machine.flags)}), up to {threads} "
        f"thread{'s' * (threads > 1)}; latency of {shape_words(target.shapes[0], asked)}, without "
        "tokenization"
    )
    if target.noise is not None and target.noise.verdict != "quiet":
        say(f"The machine was {target.noise.verdict}: {' '.join(target.noise.reasons)}")


def _print_cells(profile: Profile, cells: Sequence[Cell], view: View) -> bool:
    """Print a table; say whether what cells are recommended for is in it, or was not asked for."""
    columns = columns_of(profile, _notes(profile, profile.target(cells[0].target)))
    if view.columns:
        print_rows(named_columns(columns, view.columns), cells)
        return True
    tasks = profile.mains
    sort = [column.name for column in named_columns(columns, [view.sort] if view.sort else [])]
    # Of more than two tasks, the mean says enough.
    first = ["cell", *sort, "mean", "p50", *tasks[:1], "size", *tasks[1:2]]
    names = list(dict.fromkeys([*first, *_NEXT, *tasks, "flags", "kept", "peak"]))
    width = terminal_width()
    if width is not None:
        columns = {name: in_two_lines(column) for name, column in columns.items()}
    chosen = fitting(columns, names, cells, width)
    print_rows(chosen, cells)
    return columns["for"] in chosen


def _notes(profile: Profile, target: TargetInfo) -> dict[str, str]:
    """Return cell id -> what it is recommended for; a device may lack the whole reference."""
    reference, whole = profile.cell(target.reference, target.name), profile.checkpoint
    is_whole = (reference.layers, reference.dim) == (whole.layers, whole.dim)
    found: dict[str, list[str]] = {}
    for name, cell in target.recommended:
        if cell is not None:
            found.setdefault(cell, []).append(name.replace("within_budget", "budget"))
    if is_whole:
        found.setdefault(target.reference, []).append("reference")
    return {cell: ", ".join(names) for cell, names in found.items()}


def _recommended(profile: Profile, target: TargetInfo) -> list[Cell]:
    """Return the recommended cells and the reference."""
    return [profile.cell(name, target.name) for name in _notes(profile, target)]


def _shown(profile: Profile, target: TargetInfo, view: View) -> list[Cell]:
    first = _recommended(profile, target)
    rest = [
        cell
        for cell in profile.of_target(target.name)
        if (cell.on_frontier or view.every) and cell not in first
    ]
    if view.sort is None:
        return [*first, *sorted(rest, key=lambda cell: -cell.mean_quality)]
    (column,) = named_columns(columns_of(profile, _notes(profile, target)), [view.sort])
    return sorted_by(column, [*first, *rest])


def _print_failures(profile: Profile) -> None:
    counts: Counter[tuple[str | None, str]] = Counter()  # plain and aligned cells fail alike
    for failure in profile.failures:
        counts[failure.target, failure.reason] += len(failure.cells)
    for (target, reason), count in counts.items():
        where = f" of {target}" if target and len(profile.targets) > 1 else ""
        say(f"Failed, {count} cell{'s' * (count > 1)}{where}: {reason}")


def _print_tails(cells: Sequence[Cell]) -> None:
    """Comment on p95 of few runs, and on those that are ten times their p50.

    Cells of one graph share both.
    """
    runs = min(cell.latency[0].runs for cell in cells)
    if runs < _ENOUGH_RUNS:
        say(f"p95 is of {runs} runs, too few to mean much; profile again.")
    graphs = {(cell.p50_ms, cell.p95_ms): cell for cell in reversed(cells)}
    long = [cell for cell in graphs.values() if cell.p95_ms >= LONG_TAIL * cell.p50_ms]
    if long:
        named = ", ".join(
            f"{cell.id} ({cell.p50_ms:.2f} and {cell.p95_ms:.2f} ms)" for cell in long[:_NAMED]
        )
        more = f" and {len(long) - _NAMED} more" if len(long) > _NAMED else ""
        say(
            f"p95 is ten times p50 or more: {named}{more}. Something else ran now and then; "
            "measure again on a quiet machine before you rely on it."
        )


def _print_samples(target: TargetInfo) -> None:
    """Comment on cells that do not take what they share their latency with."""
    from m2dexport.report.facts import samples_comment

    comment = samples_comment(target.samples)
    if comment is not None:
        say(comment)
