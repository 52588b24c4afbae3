"""Commands about several profiles: check, profile diff, profile merge."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from m2dexport.cli.console import print_json
from m2dexport.cli.group import cli
from m2dexport.cli.options import PATH, Finite, force_option, json_option
from m2dexport.cli.profiles import profile
from m2dexport.errors import M2DError

if TYPE_CHECKING:
    from m2dexport.profile.gate import Verdict


@cli.command()
@click.argument("path", type=PATH, metavar="PROFILE.JSON")
@click.option(
    "--baseline",
    type=PATH,
    required=True,
    metavar="PROFILE.JSON",
    help="The profile that it is held against.",
)
@click.option(
    "--max-quality-drop",
    type=Finite(min=0),
    default=0.5,
    show_default=True,
    metavar="POINTS",
    help="Of the mean and of every task's main metric.",
)
@click.option(
    "--max-slowdown",
    type=Finite(min=1),
    default=1.1,
    show_default=True,
    metavar="FACTOR",
    help="Of p50 over that of the reference cell.",
)
@click.option(
    "--max-growth",
    type=Finite(min=1),
    default=1.02,
    show_default=True,
    metavar="FACTOR",
    help="Of the files' size.",
)
@click.option(
    "--cell",
    "cells",
    multiple=True,
    metavar="ID",
    help="Check this cell; may be repeated.  [default: the baseline's reference and recommended "
    "cells, and all layers and dims in every weight precision]",
)
@click.option("--all", "all_cells", is_flag=True, help="Check every cell of the baseline.")
@click.option("--target", metavar="NAME", help="Check this target only.")
@click.option(
    "--other-checkpoint",
    is_flag=True,
    help="The baseline may be of another checkpoint of the same shape: the one before retraining.",
)
@click.option("--strict", is_flag=True, help="Fail beyond a limit also where that may be noise.")
@click.option("--junit", type=PATH, metavar="FILE", help="Write JUnit XML.")
@click.option("--markdown", type=PATH, metavar="FILE", help="Write a summary in Markdown.")
@click.option(
    "--github",
    is_flag=True,
    help="Annotate the run on GitHub, and add to its summary.  [default: where GITHUB_ACTIONS is "
    "true]",
)
@json_option
def check(path: Path, baseline: Path, as_json: bool, **options: Any) -> None:
    """Hold a profile against a baseline; fail where it fell behind.

    A figure fails when it is worse by more than the limit and by more than noise: quality by
    paired resamples, latency as the ratio to each profile's own reference cell, so that two
    machines compare. With few data that is never sure: --strict fails what may be noise, too. So
    does a cell that is missing now. The exit code is then 1. (verify checks a bundle.)

    \b
    Examples:
      m2dexport check profile/profile.json --baseline profiles/baseline.json
      m2dexport check profile/profile.json --baseline old.json --other-checkpoint --junit check.xml
    """
    from m2dexport.cli.verdicts import verdict_facts, verdict_lines
    from m2dexport.profile.gate import Limits, Scope, check_profile
    from m2dexport.profile.manifest import read_profile

    named = ("max_quality_drop", "max_slowdown", "max_growth", "strict")
    limits = Limits(*(options[name] for name in named))
    scope = Scope(*(options[name] for name in ("cells", "all_cells", "target", "other_checkpoint")))
    verdict = check_profile(read_profile(path), read_profile(baseline), limits, scope)
    if as_json:
        print_json(verdict_facts(verdict))
    else:
        click.echo("\n".join(verdict_lines(verdict)))
    _report(verdict, options["junit"], options["markdown"], github=options["github"])
    _require_passed(verdict, path)


def _report(verdict: Verdict, junit: Path | None, summary: Path | None, *, github: bool) -> None:
    """Write the reports that are asked for, or that GitHub reads where it runs this."""
    from m2dexport.cli.verdicts import junit_xml, markdown, workflow_commands
    from m2dexport.files import atomic_file

    for path, rendered in ((junit, junit_xml), (summary, markdown)):
        if path is not None:
            with atomic_file(path, force=True) as temporary:
                temporary.write_text(rendered(verdict), encoding="utf-8")
    if not github and os.environ.get("GITHUB_ACTIONS") != "true":
        return
    for line in workflow_commands(verdict):
        click.echo(line, err=True)  # the runner reads both streams; stdout may be JSON
    page = os.environ.get("GITHUB_STEP_SUMMARY")
    if page:
        with Path(page).open("a", encoding="utf-8") as stream:
            stream.write(markdown(verdict))


def _require_passed(verdict: Verdict, path: Path) -> None:
    """End the command with an error where something failed.

    Raises:
        M2DError: naming the first failure.
    """
    failures = verdict.failures
    if failures:
        first = failures[0]
        raise M2DError(
            f"{path} fell behind its baseline in {len(failures)} of {len(verdict.checks)} figures, "
            f"the first of {first.cell} ({first.target}): {(first.failure or '').rstrip('.')}."
        )


@profile.command()
@click.argument("before", type=PATH, metavar="BEFORE.JSON")
@click.argument("after", type=PATH, metavar="AFTER.JSON")
@click.option("--all", "all_figures", is_flag=True, help="Print what did not move, too.")
@click.option("--target", metavar="NAME", help="Compare this target only.")
@json_option
def diff(before: Path, after: Path, all_figures: bool, target: str | None, as_json: bool) -> None:
    """Print what moved between two profiles by more than noise.

    Quality is compared by paired resamples, latency as the ratio to each profile's own reference
    cell. Cells that came or went, and other tasks, tools and machines, are named below.

    \b
    Example:
      m2dexport profile diff profiles/baseline.json profile/profile.json
    """
    from m2dexport.cli.verdicts import comparison_facts, comparison_lines
    from m2dexport.profile.compare import compare_profiles
    from m2dexport.profile.manifest import read_profile

    comparison = compare_profiles(read_profile(before), read_profile(after), target)
    if as_json:
        print_json(comparison_facts(comparison, all_figures=all_figures))
    else:
        click.echo("\n".join(comparison_lines(comparison, all_figures=all_figures)))


@profile.command()
@click.argument("paths", type=PATH, nargs=-1, required=True, metavar="FILE...")
@click.option("--out", type=PATH, required=True, metavar="FILE", help="The profile to write.")
@click.option("--name", metavar="NAME", help="Of the target that results from a device become.")
@force_option
def merge(paths: tuple[Path, ...], out: Path, name: str | None, force: bool) -> None:
    """Join shards of a sweep, profiles of other targets, and results from devices.

    Results are what bench --json wrote on a device: they become a target, with the quality that
    the profile has of the same cells.

    \b
    Examples:
      m2dexport profile merge shard-1.json shard-2.json --out profile.json
      m2dexport profile merge profile/profile.json pi5.json --name pi5 --out with-pi5.json
    """
    from m2dexport.files import require_file
    from m2dexport.profile.manifest import write_profile
    from m2dexport.profile.merge import merge_files

    require_file(out, force=force)
    merged = merge_files(paths, name)
    write_profile(merged, out, force=force)
    counts = [f"{len(merged.of_target(each.name))} of {each.name}" for each in merged.targets]
    click.echo(f"{out}: {len(merged.cells)} cells, {', '.join(counts)}")
