"""The group of all commands; the library's errors and warnings become one sentence each."""

from __future__ import annotations

import warnings
from typing import Any, TextIO

import click

from m2dexport import __version__
from m2dexport.cli.console import flush, give_up_stdout, print_error
from m2dexport.errors import M2DError, missing_toolchain, one_line

#: The commands, in the order of work.
_ORDER = (
    *("inspect", "slice", "build", "quantize", "profile", "select", "check"),
    *("bundle", "verify", "encode", "serve", "export", "bench", "doctor"),
)
#: What is typed out of habit -> the command that does it.
_HABITS = {
    "convert": "build",
    "optimize": "quantize",
    "prune": "slice",
    "truncate": "slice",
    "benchmark": "bench",
    "package": "bundle",
    "compare": "check",
    "gate": "check",
    "embed": "encode",
    "run": "encode",
    "release": "build",
    "diagnose": "doctor",
    "env": "doctor",
}
_LONGEST_MESSAGE = 2000  # characters


class _Group(click.Group):
    """Turns the library's errors into one sentence and an exit code, in one place."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(self.commands, key=lambda name: (*_ORDER, name).index(name))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        meant = _HABITS.get(args[0])
        if meant and args[0] not in self.commands:
            ctx.fail(f"No such command {args[0]!r}. Did you mean {meant!r}?")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _show_warning
                return super().invoke(ctx)
        except click.UsageError as error:
            if not _may_name_a_checkpoint(error):
                raise
            message = f"{error.message}; name a checkpoint with --model."
            raise click.UsageError(message, error.ctx) from error
        except ModuleNotFoundError as error:
            missing = missing_toolchain(f"The command {ctx.invoked_subcommand}", error)
            if missing is None:
                raise
            raise missing from error

    def main(self, *args: Any, **options: Any) -> Any:
        try:
            try:
                return super().main(*args, **options)
            finally:
                flush()  # what --help prints to a full disk fails here at the latest
        except M2DError as error:
            print_error(one_line(error, _LONGEST_MESSAGE))
            raise SystemExit(error.exit_code) from error
        except OSError as error:
            give_up_stdout()
            if not isinstance(error, BrokenPipeError):
                print_error(_sentence(error))
            raise SystemExit(1) from error


class GroupWithArguments(click.Group):
    """A command with arguments of its own beside its subcommands: the first word decides."""

    allow_interspersed_args = True

    def make_context(
        self,
        info_name: str | None,
        args: list[str],
        parent: click.Context | None = None,
        **extra: Any,
    ) -> click.Context:
        """Return the context of the subcommand that the first word names, else of the command."""
        command = self.commands.get(args[0]) if args else None
        if command is None:
            return super().make_context(info_name, args, parent, **extra)
        return command.make_context(f"{info_name} {args[0]}", args[1:], parent, **extra)


def _may_name_a_checkpoint(error: click.UsageError) -> bool:
    """Say whether a word that a command does not take is one that its --model may take."""
    options = error.ctx.command.params if error.ctx else []
    extra = error.message.startswith("Got unexpected extra argument")
    return extra and any(option.name == "model" for option in options)


def _sentence(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    return one_line(f"{where}{error.strerror or error}.", _LONGEST_MESSAGE)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    click.echo(f"Warning: {one_line(message, _LONGEST_MESSAGE)}", err=True)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="m2dexport")
def cli() -> None:
    """Slice, quantize, profile and bundle 2D Matryoshka sentence-embedding models.

    \b
    A first session, on the checkpoint that ships:
      m2dexport profile
      m2dexport select profile/profile.json --target edge-cpu
      m2dexport bundle profile/profile.json --cell 6x128-int8-int8 --out edge.m2d
      m2dexport verify edge.m2d
      echo "A man is playing a guitar." | m2dexport encode edge.m2d
    """
