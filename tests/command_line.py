"""The command line, run in this process."""

from __future__ import annotations

from click.testing import CliRunner, Result

from m2dexport.cli import cli


def m2d(*arguments: object, stdin: str | None = None) -> Result:
    """Return what ``m2dexport`` printed, and its exit code."""
    return CliRunner().invoke(cli, [str(argument) for argument in arguments], input=stdin)
