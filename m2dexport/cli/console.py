"""What commands print: JSON for scripts, progress for terminals."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from m2dexport.progress import OnProgress


def print_json(value: Any) -> None:
    """Print a value as JSON; paths and the like as text."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False, default=str))


@contextmanager
def progress() -> Iterator[OnProgress]:
    """Show one bar per step on a terminal, and nothing elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    console = Console(stderr=True)
    with Progress(
        *columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal
    ) as bars:
        tasks: dict[str, Any] = {}

        def update(step: str, done: int, total: int) -> None:
            if step not in tasks:
                tasks[step] = bars.add_task(step, total=total)
            bars.update(tasks[step], completed=done, total=total)

        yield update


@contextmanager
def busy(what: str) -> Iterator[OnProgress]:
    """Show on a terminal that work of an unknown length goes on, and the steps it tells about."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda *_: None
        return
    with console.status(f"{what} ...") as status:
        yield lambda step, done, total: status.update(f"{what}: {step}, {done} of {total} ...")


def count_texts(done: int) -> None:
    """Show on a terminal how far encode is; plain, since a device need not have rich."""
    if sys.stderr.isatty():
        click.echo(f"\r{done:,} texts", nl=False, err=True)
