"""Columns of tables of cells: as many as a terminal has room for; an id is never cut."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from m2dexport.errors import UsageError

if TYPE_CHECKING:
    from m2dexport.profile.intervals import Interval
    from m2dexport.profile.schema import Cell, Profile

_GAP = 2  # characters between columns
_ENDLESS = 100_000
#: What CSV calls the columns that have a unit.
_CSV_NAMES = {
    **{name: f"{name}_ms" for name in ("p50", "p95", "p99", "load", "first")},
    **{name: f"{name}_mb" for name in ("size", "peak", "used")},
    "text": "text_p50_ms",
    "bytes": "vector_bytes",
}


@dataclass(frozen=True)
class Column:
    """One figure of every cell."""

    name: str  # as --columns, --sort and CSV call it
    title: str
    value: Callable[[Cell], float | str | None]
    text: Callable[[Cell], str]
    words: bool = False  # aligned to the left
    falling: bool = False  # the highest first when sorted by it


def columns_of(profile: Profile, notes: Mapping[str, str]) -> dict[str, Column]:
    """Return the columns of a profile's cells by name.

    Args:
        profile: the profile.
        notes: cell id -> what the column "for" says of it.
    """
    columns = [
        Column("cell", "cell", lambda c: c.id, lambda c: c.id, words=True),
        _words("target", lambda c: c.target),
        _words("for", lambda c: notes.get(c.id, "")),
        _points("mean", lambda c: c.mean_quality, lambda c: c.mean_interval),
        _points("loss", lambda c: c.loss, lambda c: c.loss_interval, falling=False),
        Column(
            "kept",
            "kept",
            lambda c: c.retention,
            lambda c: "-" if c.retention is None else f"{c.retention:.1%}",
            falling=True,
        ),
        *map(_metric, profile.mains),
        _number("p50", "p50 ms", lambda c: c.p50_ms),
        _number("p95", "p95 ms", lambda c: c.p95_ms),
        _number("p99", "p99 ms", lambda c: c.p99_ms),
        _number("text", "text ms", lambda c: c.text_p50_ms),
        _number("ratio", "ratio", lambda c: c.ratio),
        _number("load", "load ms", lambda c: c.load_ms, digits=0),
        _number("first", "first ms", lambda c: c.first_ms),
        _number("size", "MB", lambda c: c.size_bytes / 1e6, digits=1),
        _number("peak", "peak MB", lambda c: c.peak_memory_bytes / 1e6, digits=0),
        _number("used", "used MB", lambda c: c.used_memory_bytes / 1e6, digits=0),
        _number("bytes", "B/vec", lambda c: c.bytes_per_vector, digits=0),
        _words("flags", lambda c: " ".join(c.flags)),
    ]
    rest = {name for cell in islice(profile.cells, 1) for name in cell.quality}
    named = {column.name: column for column in columns}
    return named | {name: _metric(name) for name in sorted(rest) if name not in named}


def named_columns(columns: Mapping[str, Column], names: Sequence[str]) -> list[Column]:
    """Return columns by name or title.

    Raises:
        UsageError: when there is none of that name, with those that there are.
    """
    titles = {column.title: column for column in columns.values()}
    found = []
    for name in names:
        if name not in columns and name not in titles:
            raise UsageError(f"there is no column {name!r}; there are: {', '.join(columns)}.")
        found.append(columns.get(name) or titles[name])
    return found


def sorted_by(column: Column, cells: Sequence[Cell]) -> list[Cell]:
    """Return cells by a figure, the best first; those that lack it come last."""

    def key(cell: Cell) -> tuple[bool, float, str]:
        value = column.value(cell)
        if value is None or isinstance(value, str):
            return value is None, 0.0, value or ""
        return False, -value if column.falling else value, ""

    return sorted(cells, key=key)


def fitting(
    columns: Mapping[str, Column], names: Sequence[str], cells: Sequence[Cell], width: int | None
) -> list[Column]:
    """Return those of some columns that a line has room for, in their own order.

    Args:
        columns: all columns.
        names: of those to show, the most important first; the first is shown whatever its width.
        cells: the rows.
        width: characters of a line; None: there is no end to it.
    """
    chosen = {names[0]}
    used = _width(columns[names[0]], cells)
    for name in names[1:]:
        needed = _GAP + _width(columns[name], cells)
        if width is None or used + needed <= width:
            chosen.add(name)
            used += needed
    return [column for name, column in columns.items() if name in chosen]


def in_two_lines(column: Column) -> Column:
    """Return a column whose title, if it is a metric's, breaks after the task and is narrower."""
    is_metric = "/" in column.name
    return replace(column, title=column.title.replace("/", "/\n")) if is_metric else column


def print_rows(columns: Sequence[Column], cells: Sequence[Cell]) -> None:
    """Print a row per cell."""
    rows = [[column.text(cell) for column in columns] for cell in cells]
    print_table([column.title for column in columns], rows, [column.words for column in columns])


def print_table(titles: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[bool]) -> None:
    """Print rows below titles, which are bold on a terminal; no text is cut.

    Args:
        titles: of the columns.
        rows: a text per column.
        left: whether a column is aligned to the left.
    """
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title, is_left in zip(titles, left, strict=True):
        table.add_column(
            title, justify="left" if is_left else "right", vertical="bottom", no_wrap=True
        )
    for row in rows:
        table.add_row(*map(Text, row))
    needed = Console(width=_ENDLESS).measure(table).maximum
    Console(highlight=False, width=needed).print(table)


def print_csv(columns: Sequence[Column], cells: Sequence[Cell]) -> None:
    """Print cells as CSV, their figures unrounded."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([_CSV_NAMES.get(column.name, column.name) for column in columns])
    writer.writerows([column.value(cell) for column in columns] for cell in cells)
    click.echo(out.getvalue(), nl=False)


def terminal_width() -> int | None:
    """Return the width of the terminal; None: the output is no terminal, and nothing is cut."""
    console = Console()
    return console.width if console.is_terminal else None


def say(text: str) -> None:
    """Print a paragraph, wrapped on terminals only."""
    Console(highlight=False, markup=False).print(text, soft_wrap=terminal_width() is None)


def give(command: str) -> None:
    """Print a line that is to be copied, which no terminal's width breaks."""
    Console(highlight=False, markup=False).print(command, soft_wrap=True)


def with_spread(points: float, low: float, high: float) -> str:
    """Return a figure with half of the width of its interval: "60.75 ±1.2"."""
    return f"{points:.2f} ±{(high - low) / 2:.1f}" if high > low else f"{points:.2f}"


def _width(column: Column, cells: Sequence[Cell]) -> int:
    texts = (*column.title.splitlines(), *(column.text(cell) for cell in cells))
    return max(map(len, texts))


def _words(name: str, value: Callable[[Cell], str]) -> Column:
    return Column(name, name, value, value, words=True)


def _number(
    name: str, title: str, value: Callable[[Cell], float | None], digits: int = 2
) -> Column:
    def text(cell: Cell) -> str:
        found = value(cell)
        return "-" if found is None else f"{found:.{digits}f}"

    return Column(name, title, value, text)


def _points(
    name: str,
    value: Callable[[Cell], float],
    interval: Callable[[Cell], Interval],
    *,
    falling: bool = True,
) -> Column:
    def text(cell: Cell) -> str:
        return with_spread(value(cell), interval(cell).low, interval(cell).high)

    return Column(name, name, value, text, falling=falling)


def _metric(name: str) -> Column:
    def text(cell: Cell) -> str:
        if name not in cell.quality:
            return "-"
        points, found = cell.quality[name], cell.intervals.get(name)
        return f"{points:.2f}" if found is None else with_spread(points, found.low, found.high)

    return Column(name, name, lambda cell: cell.quality.get(name), text, falling=True)
