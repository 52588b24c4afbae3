"""What the Markdown pages of the tools have in common: the command, the machine, tables."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

from m2dexport.files import atomic_file
from m2dexport.measure.machine import read_machine


def heading(threads: str, packages: Sequence[str]) -> Iterator[str]:
    """Yield the command that is running, then what it runs on: processor, flags, versions."""
    machine = read_machine()
    yield "<!-- not run: takes minutes -->"
    yield from ("```sh", f"python {shlex.join(sys.argv)}", "```", "")
    yield f"{machine.cpu}, {machine.cores} cores, {threads} ({' '.join(machine.flags)});"
    yield f"Python {machine.python}, {', '.join(f'{name} {version(name)}' for name in packages)}."


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Yield the lines of a table; a row may be shorter than its head."""
    yield f"| {' | '.join(head)} |"
    yield "|" + " --- |" * len(head)
    for row in rows:
        yield f"| {' | '.join((*row, *[''] * (len(head) - len(row))))} |"


def say(step: str) -> None:
    """Tell on stderr, with the time, what is being done."""
    print(f"{time.strftime('%H:%M:%S')} {step}", file=sys.stderr, flush=True)


def write(lines: Iterable[str], out: Path | None) -> None:
    """Write a page to a file, or to standard output."""
    text = "\n".join(lines) + "\n"
    if out is None:
        print(text, end="")
        return
    with atomic_file(out, force=True) as path:
        path.write_text(text, encoding="utf-8")


def numbers(text: str) -> tuple[int, ...]:
    """Return what an option such as "2,6" says.

    Raises:
        argparse.ArgumentTypeError: when it is not whole numbers from 0 on.
    """
    parts = text.split(",")
    if not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not whole numbers such as 2,6")
    return tuple(int(part) for part in parts)
