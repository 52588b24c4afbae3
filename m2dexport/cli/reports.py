"""Commands that show a profile: profile report, profile card."""

from __future__ import annotations

from pathlib import Path

import click

from m2dexport.cli.options import PATH, force_option
from m2dexport.cli.profiles import profile


@profile.command()
@click.argument("path", type=PATH, metavar="PROFILE.JSON")
@click.option("--out", type=PATH, help="Folder.  [default: that of PROFILE.JSON]")
@force_option
def report(path: Path, out: Path | None, force: bool) -> None:
    """Write report.html and the pictures of a profile.

    \b
    Example:
      m2dexport profile report profile/profile.json --out report
    """
    from m2dexport.profile.manifest import read_profile
    from m2dexport.report.write import write_views

    written = write_views(read_profile(path), out or path.parent, force=force)
    click.echo(f"Wrote {written[0]}, and pictures beside it")


@profile.command()
@click.argument("path", type=PATH, metavar="PROFILE.JSON")
@click.option(
    "--out", type=PATH, help="Markdown file; its picture is beside it.  [default: card.md]"
)
@click.option("--target", metavar="NAME", help="Of the profile's targets.  [default: the first]")
@force_option
def card(path: Path, out: Path | None, target: str | None, force: bool) -> None:
    """Write the section of a model card: what to ship, a table and a picture.

    \b
    Example:
      m2dexport profile card profile/profile.json --out card.md
    """
    from m2dexport.profile.manifest import read_profile
    from m2dexport.report.write import write_card

    written = write_card(read_profile(path), out or Path("card.md"), target, force=force)
    click.echo("Wrote " + ", ".join(str(each) for each in written))
