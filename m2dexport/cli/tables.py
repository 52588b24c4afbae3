"""What commands print: tables and sentences on a profile, a selection, a mixture."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from m2dexport.build.mixed import Mixture
    from m2dexport.profile.release import Outcome
    from m2dexport.profile.schema import Cell, Profile
    from m2dexport.profile.select import Selection


def print_profile(profile: Profile) -> None:
    """Print the cells of the frontier, best quality first, and where the rest is."""
    machine = profile.machine
    frontier = sorted((c for c in profile.cells if c.on_frontier), key=lambda c: -c.mean_quality)
    shape = profile.latency_shape
    console = _console()
    console.print(
        f"{machine.cpu} ({' '.join(machine.flags)}), up to {profile.threads} threads; latency "
        f"of {shape.batch} text of {shape.sequence} tokens, without tokenization"
    )
    console.print(profile_table(profile, frontier))
    console.print(
        f"{len(frontier)} of {len(profile.cells)} cells are on the Pareto frontier (quality, p50, "
        "size, bytes per vector); profile.json has all."
    )
    print_cross_depth(profile)
    for failure in profile.failures:
        console.print(f"Failed, {len(failure.cells)} cells: {failure.reason}", markup=False)


def profile_table(profile: Profile, cells: Sequence[Cell]) -> Table:
    """Return a table of cells, one per row."""
    mains = [f"{task.name}/{task.main_metric}" for task in profile.tasks]
    table = _table("cell", *mains, "mean", "p50 ms", "p95 ms", "MB", "peak MB", "B/vector", "flags")
    for cell in cells:
        table.add_row(
            cell.id,
            *(f"{cell.quality[name]:.2f}" for name in mains),
            f"{cell.mean_quality:.2f}",
            f"{cell.p50_ms:.2f}",
            f"{cell.p95_ms:.2f}",
            f"{cell.size_bytes / 1e6:.1f}",
            f"{cell.peak_memory_bytes / 1e6:.0f}",
            str(cell.bytes_per_vector),
            " ".join(cell.flags),
        )
    return table


def print_cross_depth(profile: Profile) -> None:
    """Print what queries of each depth find in documents of the full one, unquantized."""
    full = str(profile.checkpoint.layers)
    mains = [f"{t.name}/{t.main_metric}" for t in profile.tasks if t.kind == "retrieval"]
    dims = dict.fromkeys(each.dim for each in profile.cross_depth)
    found = {(each.dim, each.queries, each.documents): each for each in profile.cross_depth}
    names = dict.fromkeys(each.queries for each in profile.cross_depth)
    if not found or not all((dim, full, full) in found for dim in dims):
        return
    table = _table("queries of depth", *(f"d={dim}" for dim in dims))
    for name in names:
        points = [found.get((dim, name, full)) for dim in dims]
        table.add_row(
            name,
            *(
                f"{sum(each.quality[m] for m in mains) / len(mains):.2f}" if each else "-"
                for each in points
            ),
        )
    console = _console()
    console.print(
        f"Queries of each depth on an index of depth {full}, {' and '.join(mains)}, "
        f"{profile.cell(profile.reference).weights} weights, float32 vectors:"
    )
    console.print(table)


def print_selection(selection: Selection, profile_path: Path) -> None:
    """Print the chosen cell, the limit that binds, and the command that comes next."""
    cell, index = selection.cell, selection.index
    console = _console()
    if index is not None:
        console.print(_encoder_table(selection))
    console.print(
        f"{cell.id}: {selection.metric} {selection.points:.2f}"
        + (
            f" as a query encoder of {index.id}, whose own queries have {selection.native:.2f}"
            if index
            else ""
        )
        + f", p50 {cell.p50_ms:.2f} ms, "
        f"p95 {cell.p95_ms:.2f} ms, {cell.size_bytes / 1e6:.1f} MB, peak memory "
        f"{cell.peak_memory_bytes / 1e6:.0f} MB, {cell.bytes_per_vector} bytes per vector"
        + (f" [{' '.join(cell.flags)}]" if cell.flags else ""),
        markup=False,
    )
    if selection.next_better is None:
        console.print("No limit binds: this is the best cell of the profile.")
    else:
        console.print(
            f"{selection.binding} binds: without it, {selection.next_better.id} is better."
        )
    path = shlex.quote(str(profile_path))
    wrote = " --index INDEX.m2d" if index else ""
    console.print(
        f"Next: m2dexport bundle {path} --cell {cell.id}{wrote} --out {cell.id}.m2d"
        + (" (INDEX.m2d is the bundle that wrote the index)" if index else ""),
        markup=False,
    )


def print_outcomes(outcomes: Sequence[Outcome]) -> None:
    """Print a row per target, and what its bundle was found to be; failures are errors."""
    metrics = {each.selection.metric for each in outcomes if each.selection}
    quality = metrics.pop() if len(metrics) == 1 else "quality"
    table = _table("target", "cell", quality, "p50 ms", "p95 ms", "MB", "B/vector", "binds")
    for each in outcomes:
        if each.report is None or each.selection is None:
            table.add_row(each.target, "failed", *("-" for _ in table.columns[2:]))
            continue
        cell = each.selection.cell
        timed = each.lacks is None or not each.measured  # on the target's device
        table.add_row(
            each.target,
            cell.id,
            f"{each.selection.points:.2f}",
            *(f"{ms:.2f}" if timed else "-" for ms in (cell.p50_ms, cell.p95_ms)),
            f"{cell.size_bytes / 1e6:.1f}",
            str(cell.bytes_per_vector),
            each.selection.binding or "-",
        )
    console = _console()
    console.print(table)
    for each in outcomes:
        if each.report is not None:
            console.print(each.report.sentence(), markup=False, soft_wrap=True)
        if each.lacks is not None and each.report is not None:
            what = ", ".join(each.unchecked) or "its device"
            said = f"{each.target}: not checked here: {what}, since {each.lacks}"
            console.print(said, markup=False, soft_wrap=True)


def _encoder_table(selection: Selection) -> Table:
    """Return the query encoders of an index of which none is both slower and worse."""
    table = _table("query encoder", f"its {selection.metric}", "loss", "p50 ms", "p95 ms", "MB")
    for cell, points in selection.encoders:
        table.add_row(
            cell.id,
            f"{points:.2f}",
            f"{selection.native - points:.2f}",
            f"{cell.p50_ms:.2f}",
            f"{cell.p95_ms:.2f}",
            f"{cell.size_bytes / 1e6:.1f}",
        )
    return table


def print_mixture(mixture: Mixture, weights: str) -> None:
    """Print how sensitive each unit is, which of them stay in float32, and what that gives."""
    table = _table("weights", "of all bytes", "1 - cosine", "stored in")
    for unit in mixture.units:
        more = f" and {len(unit.weights) - 1} more" if len(unit.weights) > 1 else ""
        table.add_row(
            unit.name + more,
            f"{unit.share:.1%}",
            f"{unit.sensitivity:.1e}",
            "float32" if unit.kept else weights,
        )
    table.add_row(
        "embedding tables",
        f"{mixture.tables_share:.1%}",
        f"{mixture.tables_sensitivity:.1e}",
        weights,
    )
    console = _console()
    console.print(table)
    console.print(mixture.result.sentence(weights))


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        words = index == 0 or column in ("cell", "binds", "flags")
        table.add_column(column, justify="left" if words else "right")
    return table


def _console() -> Console:
    # Piped output is not wrapped to 80 columns: scripts and logs read whole rows.
    console = Console(highlight=False, soft_wrap=True)
    return console if console.is_terminal else Console(highlight=False, width=200)
