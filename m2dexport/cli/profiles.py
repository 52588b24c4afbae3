"""Commands that measure and choose: profile, select."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from m2dexport.cli.console import print_json, progress
from m2dexport.cli.group import cli
from m2dexport.cli.options import (
    PATH,
    align_texts_option,
    calibration_option,
    evaluation_options,
    force_option,
    json_option,
    model_options,
    open_model,
    tasks_of,
    texts_of,
    texts_to_align,
)
from m2dexport.cli.sweeping import SWEEP, course_options, grid_options, plans_of, print_grid
from m2dexport.errors import M2DError, UsageError

_INTERRUPTED = 130  # as shells have it: 128 and the number of the signal

if TYPE_CHECKING:
    from m2dexport.profile.parts import Parts
    from m2dexport.profile.schema import Profile


@cli.group(invoke_without_command=True, subcommand_metavar="[COMMAND]")
@course_options
@grid_options
@align_texts_option
@calibration_option
@evaluation_options
@model_options
@click.option("--out", type=PATH, default=Path("profile"), show_default=True, help="Folder.")
@force_option
@json_option
@click.pass_context
def profile(
    ctx: click.Context, /, model: str | None, out: Path, force: bool, as_json: bool, **options: Any
) -> None:
    """Measure quality, latency, size and memory of every cell.

    A cell is one choice of layers, dim, weights and vectors, aligned or not; depth 0, a table of
    token vectors, is the floor. Writes profile.json, report.html and pictures. A sweep that was
    interrupted goes on when the same command is run again.

    \b
    Examples:
      m2dexport profile
      m2dexport profile --model my-checkpoint --eval sts.tsv --eval beir-folder --out profile
      m2dexport profile --layers 2,4,6 --dim 64,128 --weights int8 --engine onnx,openvino
      m2dexport profile --quick
    """
    if ctx.invoked_subcommand is not None:
        return
    from m2dexport.cli.cell_tables import print_profile
    from m2dexport.profile.manifest import profile_text
    from m2dexport.profile.parts import STORE, WRITING, open_parts
    from m2dexport.report.write import require_report_folder, write_report

    # A sweep that was interrupted while it wrote them left some of the files.
    force = force or os.path.lexists(out / STORE / WRITING)
    require_report_folder(out, force=force)
    with open_parts(out / STORE, fresh=options.pop("fresh")) as parts, _going_on(parts):
        result = _measured(model, parts, options, quiet=as_json)
        parts.begin_writing()
        written = write_report(result, out, force=force)
    if as_json:
        click.echo(profile_text(result), nl=False)
    else:
        print_profile(result, written[0])
        click.echo(f"Wrote {written[0]} and {written[1]}, and pictures beside them")


@contextmanager
def _going_on(parts: Parts) -> Iterator[None]:
    """Say after a signal, and where the profile cannot be written, that what is there is kept."""
    again = "what was measured is kept: run the same command again to go on"
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stop:  # Ctrl-C, and a termination signal
        said = again if parts.held() else "nothing was measured"
        click.echo(f"\nInterrupted; {said}.", err=True)
        raise SystemExit(getattr(stop, "code", _INTERRUPTED)) from None
    except M2DError as error:
        if not isinstance(error.__cause__, OSError) or not parts.held():
            raise
        raise M2DError(f"{str(error).removesuffix('.')}; {again}.") from error


def _measured(model: str | None, parts: Parts, options: dict[str, Any], *, quiet: bool) -> Profile:
    """Measure what the options of ``profile`` ask for."""
    from m2dexport.data import calibration_texts
    from m2dexport.profile.sweep import Course, profile_checkpoint

    tasks = tasks_of(options.pop("evaluation"), options.pop("mteb"))
    texts = texts_of(options.pop("calibration")) or calibration_texts()
    fitted = texts_to_align(True, options.pop("align_texts"))
    quick, shard, cluster = (options.pop(name) for name in ("quick", "shard", "cluster"))
    sweep = {"quick": quick, **{name: options.pop(name) for name in SWEEP}}
    checkpoint = open_model(model, options)
    plans, targets = plans_of(checkpoint, sweep)
    course = Course(
        model=model,
        pooling=options["pooling"],
        targets=targets,
        parts=parts,
        shard=shard,
        cluster=cluster,
        on_quality=print_grid(tasks) if quick and not quiet else lambda *_: None,
        say=partial(click.echo, err=True),
    )
    plans = tuple(replace(plan, align_texts=fitted) for plan in plans)
    with progress() as on_progress:
        return profile_checkpoint(checkpoint, tasks, texts, plans, course, on_progress)


@profile.command()
@click.argument("path", type=PATH, metavar="PROFILE.JSON")
@click.option("--target", metavar="NAME", help="Show one of its targets.  [default: all]")
@click.option("--all", "every", is_flag=True, help="Show all cells.")
@click.option("--sort", metavar="COLUMN", help="Order by a column, the best first.")
@click.option("--columns", metavar="A,B,...", help="Columns to show.  [default: those that fit]")
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV, with figures that are not rounded.")
@json_option
def show(
    path: Path,
    target: str | None,
    every: bool,
    sort: str | None,
    columns: str | None,
    as_csv: bool,
    as_json: bool,
) -> None:
    """Print the cells of a profile: those recommended, then the frontier.

    \b
    Examples:
      m2dexport profile show profile/profile.json
      m2dexport profile show profile/profile.json --columns cell,p95,mean
      m2dexport profile show profile/profile.json --all --csv > cells.csv
    """
    from m2dexport.cli.cell_tables import View, print_cells, print_cells_as_csv
    from m2dexport.profile.manifest import read_profile

    if as_csv and as_json:
        raise UsageError("--csv and --json are two forms of one output; leave one out.")
    measured = read_profile(path)
    if as_json:
        print_json(measured.model_dump(mode="json"))
        return
    names = () if columns is None else tuple(name.strip() for name in columns.split(","))
    view = View(target, every, sort, names)
    (print_cells_as_csv if as_csv else print_cells)(measured, view)


@cli.command()
@click.argument("profile", type=PATH, metavar="PROFILE.JSON")
@click.option(
    "--target",
    metavar="NAME|FILE",
    help="Choose for a target: its cells, where the profile has them, and its budget.",
)
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
@click.option(
    "--allow-batch-dependent",
    is_flag=True,
    help="Also choose cells with which a text's vector depends on its batch.",
)
@json_option
def select(
    profile: Path,
    target: str | None,
    index_cell: str | None,
    allow_batch_dependent: bool,
    as_json: bool,
    **limits: Any,
) -> None:
    """Name the best cell of a profile within a budget.

    It is on the frontier: within the noise of the best, the cheapest. Also says what else fits, how
    near the limits are, and which binds.

    \b
    Examples:
      m2dexport select profile/profile.json --p95-ms 5 --size-mb 20
      m2dexport select profile/profile.json --target edge-cpu
      m2dexport select profile/profile.json --index-cell 6x384-fp32-int8 --p95-ms 2
    """
    from m2dexport.cli.choices import print_selection, selection_facts
    from m2dexport.profile.manifest import read_profile
    from m2dexport.profile.select import budget_for, select_cell

    measured = read_profile(profile)
    name, budget = budget_for(measured, target, unlimited=index_cell is not None, **limits)
    selection = select_cell(
        measured, budget, index_cell, target=name, allow_batch_dependent=allow_batch_dependent
    )
    if as_json:
        print_json(selection_facts(selection))
    else:
        print_selection(selection, profile, name if len(measured.targets) > 1 else None)
