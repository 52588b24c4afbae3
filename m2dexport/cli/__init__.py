"""The command line: parse, call the library, print."""

from __future__ import annotations

import signal
import sys

# Each of these adds its commands to the group.
from m2dexport.cli import (  # noqa: F401
    artifacts,
    bench,
    bundles,
    checkpoints,
    consumers,
    doctor,
    gate,
    profiles,
    reports,
    serving,
    showing,
    trust,
)
from m2dexport.cli.console import escape_unprintable
from m2dexport.cli.group import cli

__all__ = ["cli", "main"]


def main() -> None:
    """Run the command line; a termination signal cleans up as an error does."""
    for name in ("SIGTERM", "SIGHUP"):  # Windows has no second one
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, _frame: sys.exit(128 + number))
    escape_unprintable()
    cli()
