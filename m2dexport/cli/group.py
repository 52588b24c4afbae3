"""The group of all commands; the library's errors and warnings become one sentence each."""

from __future__ import annotations

import warnings
from typing import Any, TextIO

import click

from m2dexport import __version__
from m2dexport.errors import M2DError, missing_toolchain


class _Group(click.Group):
    """Turns the library's errors into one sentence and an exit code, in one place."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _show_warning
                return super().invoke(ctx)
        except M2DError as error:
            _fail(ctx, error)
        except ModuleNotFoundError as error:
            missing = missing_toolchain(f"The command {ctx.invoked_subcommand}", error)
            if missing is None:
                raise
            _fail(ctx, missing)
        except OSError as error:
            if isinstance(error, BrokenPipeError):
                raise
            click.echo(f"Error: {_sentence(error)}", err=True)
            ctx.exit(1)


def _fail(ctx: click.Context, error: M2DError) -> None:
    click.echo(f"Error: {error}", err=True)
    ctx.exit(error.exit_code)


def _sentence(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}."


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    click.echo(f"Warning: {message}", err=True)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="m2dexport")
def cli() -> None:
    """Slice, quantize, profile and bundle 2D Matryoshka sentence-embedding models.

    \b
    A first session, on the checkpoint that ships:
      m2dexport profile
      m2dexport select profile/profile.json --target edge-cpu
      m2dexport bundle profile/profile.json --cell 4x128-int8-int8 --out edge.m2d
      m2dexport verify edge.m2d
      echo "A man is playing a guitar." | m2dexport encode edge.m2d
    """
