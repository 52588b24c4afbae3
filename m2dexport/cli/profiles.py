"""Commands that measure and choose: profile, select."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from m2dexport.cli.console import print_json, progress
from m2dexport.cli.group import cli
from m2dexport.cli.options import (
    PATH,
    align_texts_option,
    calibration_option,
    evaluation_option,
    force_option,
    json_option,
    model_options,
    open_model,
    tasks_of,
    texts_of,
    texts_to_align,
)


@cli.group(invoke_without_command=True, subcommand_metavar="[COMMAND]")
@model_options
@evaluation_option
@click.option("--target", metavar="NAME|FILE", help="Take grid, threads and shapes from a target.")
@calibration_option
@align_texts_option
@click.option("--out", type=PATH, default=Path("profile"), show_default=True, help="Folder.")
@force_option
@json_option
@click.pass_context
def profile(
    ctx: click.Context,
    /,
    model: str | None,
    evaluation: tuple[Path, ...],
    target: str | None,
    calibration: Path | None,
    out: Path,
    force: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure quality, latency, size and memory of every cell.

    A cell is one choice of layers, dim, weights and vectors, aligned or not; depth 0, a table of
    token vectors, is the floor. Writes profile.json, report.html and pictures.

    \b
    Examples:
      m2dexport profile
      m2dexport profile --model my-checkpoint --eval sts.tsv --eval beir-folder --out profile
    """
    if ctx.invoked_subcommand is not None:
        return
    from m2dexport.cli.tables import print_profile
    from m2dexport.data import calibration_texts
    from m2dexport.profile.plan import default_plan, plan_for
    from m2dexport.profile.sweep import profile_checkpoint
    from m2dexport.profile.target import load_target
    from m2dexport.report.write import require_report_folder, write_report

    require_report_folder(out, force=force)
    tasks = tasks_of(evaluation)
    texts = texts_of(calibration) or calibration_texts()
    fitted = texts_to_align(True, options.pop("align_texts"))
    checkpoint = open_model(model, options)
    plan = plan_for(checkpoint, load_target(target)) if target else default_plan(checkpoint)
    plan = replace(plan, align_texts=fitted)
    with progress() as on_progress:
        result = profile_checkpoint(
            checkpoint,
            tasks,
            texts,
            plan,
            model=model,
            pooling=options["pooling"],
            on_progress=on_progress,
        )
    written = write_report(result, out, force=force)
    if as_json:
        print_json(result.model_dump(mode="json"))
    else:
        print_profile(result)
        click.echo(f"Wrote {written[0]} and {written[1]}, and pictures beside them")


@profile.command()
@click.argument("path", type=PATH, metavar="PROFILE.JSON")
@json_option
def show(path: Path, as_json: bool) -> None:
    """Print the cells of a profile.

    \b
    Example:
      m2dexport profile show profile/profile.json
    """
    from m2dexport.cli.tables import print_profile
    from m2dexport.profile.manifest import read_profile

    measured = read_profile(path)
    if as_json:
        print_json(measured.model_dump(mode="json"))
    else:
        print_profile(measured)


@cli.command()
@click.argument("profile", type=PATH, metavar="PROFILE.JSON")
@click.option("--target", metavar="NAME|FILE", help="Take the budget from a target.")
@click.option(
    "--index-cell",
    metavar="ID",
    help="Choose what queries an index that this cell wrote; quality is that of its queries.",
)
@click.option("--p50-ms", type=float, help="Median latency at most.")
@click.option("--p95-ms", type=float, help="95th percentile of latency at most.")
@click.option("--size-mb", type=float, help="Size of the files at most, in 10^6 bytes.")
@click.option("--memory-mb", type=float, help="Peak memory at most, in 10^6 bytes.")
@click.option("--vector-bytes", type=int, help="Bytes per stored vector at most.")
@click.option("--min-quality", type=float, help="Quality at least, in points (0-100).")
@click.option("--metric", help='What quality means: "mean", or one such as "stsb-dev/spearman".')
@json_option
def select(
    profile: Path, target: str | None, index_cell: str | None, as_json: bool, **limits: Any
) -> None:
    """Name the best cell of a profile within a budget.

    Also says which limit of the budget binds.

    \b
    Examples:
      m2dexport select profile/profile.json --p95-ms 5 --size-mb 20
      m2dexport select profile/profile.json --target edge-cpu
      m2dexport select profile/profile.json --index-cell 6x384-fp32-int8 --p95-ms 2
    """
    from m2dexport.cli.tables import print_selection
    from m2dexport.profile.manifest import read_profile
    from m2dexport.profile.select import require_measured_for, select_cell
    from m2dexport.profile.target import budget_from, load_target

    measured = read_profile(profile)
    if target:
        require_measured_for(measured, load_target(target))
    budget = budget_from(target, unlimited=index_cell is not None, **limits)
    selection = select_cell(measured, budget, index_cell)
    if as_json:
        print_json(
            {
                "cell": selection.cell.model_dump(mode="json"),
                "points": selection.points,
                "binding": selection.binding,
                "index_cell": index_cell,
                "native": selection.native if selection.index else None,
                "encoders": [
                    {"cell": cell.id, "points": points} for cell, points in selection.encoders
                ],
            }
        )
    else:
        print_selection(selection, profile)
