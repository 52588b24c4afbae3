"""What commands print: JSON for scripts, progress for terminals."""

from __future__ import annotations

import contextlib
import io
import json
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from m2dexport.progress import OnProgress


#: Seconds after which a step is worth a line of a log.
_A_WHILE = 2


def escape_unprintable() -> None:
    """Print as escapes what the encoding of stdout or stderr lacks, rather than fail half-way."""
    for stream in (sys.stdout, sys.stderr):
        # Whoever names another way, as in PYTHONIOENCODING=ascii:replace, keeps it.
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")


def flush() -> None:
    """Write what stdout still holds back, while a failure can be said.

    Raises:
        OSError: when stdout cannot be written.
    """
    if sys.stdout is not None:
        sys.stdout.flush()


def give_up_stdout() -> None:
    """Drop what stdout could not write, which Python would otherwise try again at its end."""
    with contextlib.suppress(OSError):
        flush()
        return
    sys.stdout = None


def print_error(sentence: str) -> None:
    """Print an error to stderr, if that can be written."""
    with contextlib.suppress(OSError):
        click.echo(f"Error: {sentence}", err=True)


def print_json(value: Any) -> None:
    """Print a value as JSON; paths and the like as text."""
    text = json.dumps(value, indent=2, ensure_ascii=False, default=str)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value, indent=2, default=str)  # JSON has escapes of its own
    click.echo(text)


@contextlib.contextmanager
def progress() -> Iterator[OnProgress]:
    """Show one bar per step on a terminal; elsewhere, a line per step of over 2 s."""
    if not _is_terminal():
        yield _logged()
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    times = (TimeElapsedColumn(), TimeRemainingColumn(compact=True))
    with Progress(*columns, *times, console=Console(stderr=True)) as bars:
        tasks: dict[str, Any] = {}

        def update(step: str, done: int, total: int) -> None:
            if step not in tasks:
                tasks[step] = bars.add_task(step, total=total)
            bars.update(tasks[step], completed=done, total=total)

        yield update


def _logged() -> OnProgress:
    """Return what prints a line to stderr once a step that took a while is done."""
    begun: dict[str, float] = {}
    said: set[str] = set()

    def update(step: str, done: int, total: int) -> None:
        now = time.monotonic()
        taken = now - begun.setdefault(step, now)
        if done >= total and taken > _A_WHILE and step not in said:
            said.add(step)
            click.echo(f"{step}: {total:,} in {taken:.0f} s", err=True)

    return update


@contextlib.contextmanager
def busy(what: str) -> Iterator[OnProgress]:
    """Show on a terminal that work of an unknown length goes on, and the steps that it names."""
    if not _is_terminal():
        yield lambda *_: None
        return
    from rich.console import Console

    with Console(stderr=True).status(f"{what} ...") as status:
        yield lambda step, done, total: status.update(f"{what}: {step}, {done} of {total} ...")


def count_texts(done: int) -> None:
    """Show on a terminal how far encode is; plain, since a device need not have rich."""
    if _is_terminal():
        click.echo(f"\r{done:,} texts", nl=False, err=True)


def _is_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()
