"""What page, pictures and model card say of a profile: the choice, the limits, the machine."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from m2dexport.engines import DEFAULT_ENGINE
from m2dexport.profile.frontier import LATENCY_GRAIN_MS, LATENCY_NOISE
from m2dexport.profile.recommend import reasons
from m2dexport.profile.schema import Cell, Profile, Shape, SharedLatency, TargetInfo, Tokenization

#: A limit of a budget -> how it reads.
LIMITS = {
    "p50_ms": "p50 at most {:g} ms",
    "p95_ms": "p95 at most {:g} ms",
    "size_mb": "{:g} MB at most",
    "memory_mb": "peak memory of {:g} MB at most",
    "vector_bytes": "{:g} bytes per vector at most",
    "min_quality": "quality of {:g} points at least",
}


@dataclass(frozen=True)
class Pick:
    """A cell that is worth shipping."""

    roles: tuple[str, ...]  # of ROLES
    cell: Cell
    why: str  # a sentence


def title(profile: Profile) -> str:
    """Return the name of the checkpoint that was profiled."""
    return profile.checkpoint.model or "the checkpoint that ships with m2dexport"


def picks(profile: Profile, target: TargetInfo) -> tuple[Pick, ...]:
    """Return the recommended cells of a target, each once, what fits the budget first."""
    reference = profile.reference_cell(target.name)
    return tuple(
        Pick(
            each.roles,
            each.cell,
            f"{_capital(each.lead)}, since {each.why}. {_costs(each.cell, reference)}",
        )
        for each in reasons(target.recommended, profile.of_target(target.name))
    )


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _costs(cell: Cell, reference: Cell) -> str:
    """Return a sentence on what a cell keeps and what it costs, against the reference."""
    if cell.id == reference.id:
        return "It is the reference."
    kept, whose = "takes", "the reference's"
    if cell.retention is not None:
        kept, whose = f"keeps {cell.retention:.1%} of the reference's quality, at", "its"
    size = times(cell.size_bytes / reference.size_bytes)
    return f"It {kept} {times(cell.ratio)} of {whose} latency and {size} of its size."


def times(share: float) -> str:
    """Return a share in words that stay short, whether it is .004, 1.2 or 30."""
    if share >= 2:
        return f"{share:.2g} times"
    return f"{share:.0%}" if share >= 0.995 else f"{share * 100:.2g}%"


def limits(target: TargetInfo) -> tuple[str, ...]:
    """Return the limits of a target's budget, a phrase each."""
    return tuple(
        words.format(target.budget[key]) for key, words in LIMITS.items() if key in target.budget
    )


def budget_sentence(target: TargetInfo) -> str:
    """Return a target's budget, and whether any cell fits it."""
    found = limits(target)
    if not found:
        return "No budget was set."
    fits = target.recommended.within_budget is not None
    metric = target.budget.get("metric", "mean")
    counted = "" if metric == "mean" else f", where quality is {metric}"
    return f"Budget: {', '.join(found)}{counted}. " + ("" if fits else "No cell fits it.")


def noise_sentence(target: TargetInfo) -> str:
    """Return how quiet the machine was, and how that is known."""
    if target.noise is None:
        return "How quiet the machine was is not recorded."
    return f"The machine was {target.noise.verdict}. {' '.join(target.noise.reasons)}".strip()


def agrees(sample: SharedLatency) -> bool:
    """Return whether a cell that was timed by itself takes what it shares its latency with.

    It does not where the interval of their ratio says so, and they are as far apart as cells of
    different latency are.
    """
    fast, slow = sorted((sample.p50_ms, sample.shared_p50_ms))
    same = sample.ratio_interval.low <= 1 <= sample.ratio_interval.high
    return same or slow <= fast * LATENCY_NOISE + LATENCY_GRAIN_MS


def samples_comment(samples: Sequence[SharedLatency]) -> str | None:
    """Return a sentence on the samples that do not agree; None where all do."""
    off = [
        f"{each.cell} has a p50 of {each.p50_ms:.2f} ms by itself, {ratio_words(each)} that of "
        f"what it shares its latency with, {each.shared_p50_ms:.2f} ms"
        for each in samples
        if not agrees(each)
    ]
    whose = "its depth" if len(off) == 1 else "their depths"
    return f"{'; '.join(off)}: read the latencies of {whose} with care." if off else None


def ratio_words(sample: SharedLatency) -> str:
    """Return such as "0.98 times (0.96 to 1.01)": a sample's p50 over what it shares it with."""
    ratio, between = sample.p50_ms / sample.shared_p50_ms, sample.ratio_interval
    return f"{ratio:.2f} times ({between.low:.2f} to {between.high:.2f})"


def shape_words(shape: Shape | Tokenization, asked: Shape | None = None) -> str:
    """Return such as "1 text of 256 tokens (cut from 1024)".

    Args:
        shape: the shape that was timed.
        asked: the same before the maximum length cut it.
    """
    texts = f"{shape.batch} {'text' if shape.batch == 1 else 'texts'}"
    tokens = f"{shape.sequence} {'token' if shape.sequence == 1 else 'tokens'}"
    cut = asked is not None and asked.sequence > shape.sequence
    return f"{texts} of {tokens}" + (f" (cut from {asked.sequence})" if asked and cut else "")


def latency_words(profile: Profile, target: TargetInfo) -> str:
    """Return what latency means: shape, threads and processor."""
    asked = target.asked[0] if target.asked else None
    threads = profile.threads(target.name)
    return (
        f"{shape_words(target.shapes[0], asked)}, up to {threads} thread{'s' * (threads > 1)}, "
        f"{target.machine.cpu}"
    )


def bundle_command(profile: Profile, cell: Cell) -> str:
    """Return the command that builds a cell of a profile, in its folder, and packs it."""
    words = ["m2dexport", "bundle", "profile.json", "--cell", cell.id]
    words += ["--target", cell.target] if len(profile.targets) > 1 else []
    words += ["--allow-batch-dependent"] if "batch_dependent" in cell.flags else []
    return shlex.join([*words, "--out", f"{cell.id}.m2d"])


def build_command(profile: Profile, cell: Cell) -> str:
    """Return the command that builds a cell's artifact from the checkpoint, without a profile."""
    words = ["m2dexport", "build"]
    if profile.checkpoint.model is not None:
        words += ["--model", profile.checkpoint.model]
    if profile.checkpoint.pooling is not None:
        words += ["--pooling", profile.checkpoint.pooling]
    words += ["--layers", str(cell.layers), "--dim", str(cell.dim)]
    words += ["--align"] if cell.align == "full" and cell.layers > 0 else []
    words += ["--weights", cell.weights, "--vectors", cell.vectors]
    if cell.layers > 0 and cell.engine != DEFAULT_ENGINE:
        words += ["--engine", cell.engine]
    words += ["--isa", cell.isa] if cell.isa != "portable" and cell.weights == "int8" else []
    words += ["--allow-batch-dependent"] if "batch_dependent" in cell.flags else []
    return shlex.join([*words, "--out", cell.id])


def frontier_cells(cells: Sequence[Cell]) -> list[Cell]:
    """Return the cells of the frontier, best quality first."""
    return sorted((c for c in cells if c.on_frontier), key=lambda c: (-c.mean_quality, c.p50_ms))


def index_of(profile: Profile, cell: Cell, cells: dict[str, Cell]) -> Cell | None:
    """Return the cell whose index a cell's queries were put to: full depth, unquantized.

    Args:
        profile: the profile.
        cell: the cell that encodes queries.
        cells: id -> cell, of its target.

    Returns:
        None where no such index was queried.
    """
    weights = profile.reference_cell(cell.target).weights
    if cell.layers == profile.checkpoint.layers and cell.weights == weights:
        return cell
    found = [cells[name] for name in cell.as_query if name in cells]
    alike = [each for each in found if each.weights == weights]
    return min(alike, key=lambda each: each.engine != cell.engine, default=None)
