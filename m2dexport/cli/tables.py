"""What commands print: tables and sentences on bundles for targets, a mixture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from m2dexport.build.mixed import Mixture
    from m2dexport.profile.release import Outcome


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
