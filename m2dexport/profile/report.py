"""What a person sees of a checkpoint and a profile: tables and the picture of the frontier."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from m2dexport.files import atomic_file, require_file
from m2dexport.profile.manifest import Cell, Profile, write_profile

if TYPE_CHECKING:
    from m2dexport.build.mixed import Mixture
    from m2dexport.checkpoint.open import Checkpoint, DepthSize
    from m2dexport.profile.select import Selection

PROFILE = "profile.json"
PICTURES = ("frontier.png", "frontier.svg")

# Okabe and Ito's colours, told apart with every kind of colour vision; markers tell them apart in
# print.
_STYLE = {
    "fp32": ("#0072B2", "o"),
    "fp16": ("#E69F00", "s"),
    "bf16": ("#D55E00", "s"),
    "int8": ("#009E73", "^"),
    "int8-dynamic": ("#56B4E9", "v"),
    "int8-static": ("#CC79A7", "D"),
    "int8-weight-only": ("#000000", "P"),
    "int4-weight-only": ("#999999", "X"),
}


def print_checkpoint(checkpoint: Checkpoint, sizes: Sequence[DepthSize]) -> None:
    """Print what ``inspect`` knows of a checkpoint."""
    trained = "unknown"
    if checkpoint.trained is not None:
        trained = " ".join(f"{n}:{d}" for n, d in checkpoint.trained)
    facts = {
        "path": checkpoint.path,
        "model type": checkpoint.model_type,
        "layers": checkpoint.layers,
        "hidden size": checkpoint.hidden,
        **_widths(checkpoint),
        "vector width": checkpoint.dim,
        "vocabulary": checkpoint.vocab_size,
        "pooling": ("latent attention, " if checkpoint.latent else "")
        + " + ".join(checkpoint.pooling.modes),
        "final norm": checkpoint.final_norm,
        "normalised": "yes" if checkpoint.normalized else "no",
        "prompts": checkpoint.prompts or "none",
        "default prompt": checkpoint.default_prompt or "none",
        "maximum length": f"{checkpoint.max_length} tokens",
        "trained grid": trained,
    }
    table = _table("layers", "parameters", "of these embeddings", "MB as stored")
    for size in sizes:
        table.add_row(
            str(size.layers),
            f"{size.parameters:,}",
            f"{size.embedding_parameters / size.parameters:.0%}",
            f"{size.bytes / 1e6:.1f}",
        )
    console = _console()
    for name, value in facts.items():
        console.print(f"{name:<16}{value}", markup=False)
    console.print(table)


def _widths(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the widths inside the layers: one number where all layers share it."""
    widths = checkpoint.widths
    if widths is None:
        return {}
    heads, kv_heads, ffn = (
        str(counts[0]) if len(set(counts)) == 1 else ",".join(map(str, counts))
        for counts in (widths.heads, widths.kv_heads, widths.ffn)
    )
    shared = f", {kv_heads} for keys and values" if kv_heads != heads else ""
    return {"heads": f"{heads}{shared}, of {widths.head_dim} dims", "feed-forward": ffn}


def print_profile(profile: Profile) -> None:
    """Print the cells of the frontier, best quality first, and where the rest is."""
    machine = profile.machine
    frontier = sorted((c for c in profile.cells if c.on_frontier), key=lambda c: -c.mean_quality)
    shape = profile.latency_shape
    console = _console()
    console.print(
        f"{machine.cpu} ({' '.join(machine.flags)}), {machine.threads} threads; latency of "
        f"{shape.batch} text of {shape.sequence} tokens, without tokenization"
    )
    console.print(profile_table(profile, frontier))
    console.print(
        f"{len(frontier)} of {len(profile.cells)} cells are on the Pareto frontier (quality, p50, "
        "size, bytes per vector); profile.json has all."
    )


def profile_table(profile: Profile, cells: Sequence[Cell]) -> Table:
    """Return a table of cells, one a row."""
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


def print_selection(selection: Selection, profile_path: Path) -> None:
    """Print the chosen cell, the limit that binds, and the command that comes next."""
    cell = selection.cell
    console = _console()
    console.print(
        f"{cell.id}: {selection.metric} {selection.points:.2f}, p50 {cell.p50_ms:.2f} ms, "
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
    console.print(
        f"Next: m2dexport bundle {path} --cell {cell.id} --out {cell.id}.m2d", markup=False
    )


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


def require_report_folder(folder: Path) -> None:
    """Refuse a folder that ``write_report`` could not write to, before anything is measured.

    Raises:
        UsageError: when it is a file, cannot be written to, or holds a folder of one of the names.
    """
    for name in (PROFILE, *PICTURES):
        require_file(folder / name)


def write_report(profile: Profile, folder: Path) -> tuple[Path, ...]:
    """Write profile.json and the pictures of its frontier; return their paths."""
    write_profile(profile, folder / PROFILE)
    figure = plot_frontier(profile)
    for name in PICTURES:
        with atomic_file(folder / name) as temporary:
            figure.savefig(temporary, dpi=150)
    return tuple(folder / name for name in (PROFILE, *PICTURES))


def plot_frontier(profile: Profile) -> Any:
    """Return a matplotlib figure of quality against p50 latency.

    Each (layers, weights) is drawn at its best dim and vector precision, and below it, faintly, the
    others. The line joins the cells that no cell beats in both quality and latency.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.add_subplot()
    for weights in dict.fromkeys(cell.weights for cell in profile.cells):
        colour, marker = _STYLE[weights]
        cells = [cell for cell in profile.cells if cell.weights == weights]
        best = _best_per_latency(cells)
        rest = [cell for cell in cells if cell not in best]
        axes.scatter(*_points(rest), s=14, c=colour, marker=marker, alpha=0.25, linewidths=0)
        axes.scatter(*_points(best), s=60, c=colour, marker=marker, label=weights, zorder=3)
    line = _upper_left(profile.cells)
    axes.plot(*_points(line), color="#444444", linewidth=1, zorder=2, label="frontier")
    # The line is sorted by latency: of cells that share a label, the fastest carries it.
    labelled = {(cell.layers, cell.dim): cell for cell in reversed(line)}
    for index, cell in enumerate(reversed(labelled.values())):
        above = index % 2 == 0
        axes.annotate(
            f"{cell.layers}x{cell.dim}",
            (cell.p50_ms, cell.mean_quality),
            xytext=(0, 9 if above else -9),
            textcoords="offset points",
            ha="center",
            va="bottom" if above else "top",
            fontsize=9,
        )
    shape = profile.latency_shape
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(
        lambda value, _: f"{value:g}" if _leads_with(value, "25") else ""
    )
    axes.set_xlabel(
        f"p50 latency, ms ({shape.batch} text of {shape.sequence} tokens, "
        f"{profile.machine.threads} threads, {profile.machine.cpu})"
    )
    axes.set_ylabel("quality, points (mean of " + ", ".join(t.name for t in profile.tasks) + ")")
    axes.set_title("Latency and quality of every cell; labels: layers x dim")
    axes.grid(alpha=0.25)
    axes.margins(y=0.12)
    axes.legend(title="weights", loc="lower right")
    return figure


def _leads_with(value: float, digits: str) -> bool:
    return f"{value:e}"[0] in digits


def _points(cells: Sequence[Cell]) -> tuple[list[float], list[float]]:
    return [cell.p50_ms for cell in cells], [cell.mean_quality for cell in cells]


def _best_per_latency(cells: Sequence[Cell]) -> list[Cell]:
    """Return the best cell of each depth: cells of one depth and precision share their latency."""
    best: dict[int, Cell] = {}
    for cell in cells:
        if cell.layers not in best or cell.mean_quality > best[cell.layers].mean_quality:
            best[cell.layers] = cell
    return list(best.values())


def _upper_left(cells: Sequence[Cell]) -> list[Cell]:
    """Return the cells that no other beats in both p50 latency and quality, fastest first."""
    line: list[Cell] = []
    for cell in sorted(cells, key=lambda cell: (cell.p50_ms, -cell.mean_quality)):
        if not line or cell.mean_quality > line[-1].mean_quality:
            line.append(cell)
    return line


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 or column == "flags" else "right")
    return table


def _console() -> Console:
    # Piped output is not wrapped to 80 columns: scripts and logs read whole rows.
    console = Console(highlight=False, soft_wrap=True)
    return console if console.is_terminal else Console(highlight=False, width=200)
