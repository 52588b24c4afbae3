"""What ``inspect`` finds out about a checkpoint, and how it is printed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from m2dexport.checkpoint.trained import grid_text
from m2dexport.errors import CheckpointError
from m2dexport.progress import OnProgress

if TYPE_CHECKING:
    from m2dexport.checkpoint.open import Checkpoint
    from m2dexport.checkpoint.sizes import DepthSize
    from m2dexport.reference.depths import DepthLook

_EVERY = 16  # of the sentences that ship, the depths are looked at with every so-manieth
_WIDE = 24  # characters of a value, beyond which it does not push the sources to the right
_LARGE = 100_000_000  # parameters of the layers, beyond which that takes more than some seconds


@dataclass(frozen=True)
class Inspection:
    """A checkpoint, what its depths weigh and look like, and what is to be warned of."""

    checkpoint: Checkpoint
    stored: str  # the precision of most of its values
    sizes: tuple[DepthSize, ...]
    looks: Mapping[int, DepthLook]  # by depth; empty where the depths were not looked at
    note: str | None  # why there is no verdict on the depths
    warnings: tuple[str, ...]


def inspect_checkpoint(
    checkpoint: Checkpoint, look: bool | None, on_progress: OnProgress
) -> Inspection:
    """Return what there is to say about a checkpoint.

    Args:
        checkpoint: what to describe.
        look: whether some texts are encoded to see if its depths look trained; None: where the
            layers have less than 100 million parameters.
        on_progress: called as texts are encoded.
    """
    from m2dexport.checkpoint.claims import precision_claims, stored_precision
    from m2dexport.checkpoint.sizes import depth_sizes

    sizes = depth_sizes(checkpoint)
    warnings = precision_claims(checkpoint)
    looks: Sequence[DepthLook] = ()
    inside = sizes[-1].parameters - sizes[-1].embedding_parameters
    one_depth = checkpoint.layers < 2 or checkpoint.alignment is not None
    note = None
    if look is None and not one_depth and inside >= _LARGE:
        note = (
            f"Whether depths look trained was not checked: the layers have {inside / 1e6:.0f} "
            "million parameters; pass --look-at-depths to encode some texts."
        )
    elif look is not False and not one_depth:
        looks, note, doubts = _look(checkpoint, on_progress)
        warnings += doubts
    return Inspection(
        checkpoint,
        stored_precision(checkpoint),
        tuple(sizes),
        {each.layers: each for each in looks},
        note,
        tuple(warnings),
    )


def _look(
    checkpoint: Checkpoint, on_progress: OnProgress
) -> tuple[Sequence[DepthLook], str | None, list[str]]:
    """Return what the depths look like, why there is no verdict, and what is to be warned of."""
    from m2dexport.data import align_texts_path, read_texts
    from m2dexport.reference.depths import doubt, look_at_depths, no_verdict

    try:
        looks = look_at_depths(checkpoint, read_texts(align_texts_path())[::_EVERY], on_progress)
    except CheckpointError as error:
        return (), None, [f"the depths cannot be looked at: {error}"]
    doubts = doubt(looks)
    return looks, no_verdict(looks), [doubts] if doubts else []


def facts_of(inspection: Inspection) -> dict[str, Any]:
    """Return an inspection as JSON has it."""
    facts = asdict(inspection.checkpoint)
    del facts["layout"]  # where each tensor lies: for programs that read the files
    depths = []
    for size in inspection.sizes:
        look = inspection.looks.get(size.layers)
        seen = asdict(look) if look else {"mean_cosine": None, "neighbours": None}
        depths.append({**asdict(size), **seen})
    return {
        **facts,
        "stored": inspection.stored,
        "warnings": inspection.warnings,
        "note": inspection.note,
        "depths": depths,
    }


def print_inspection(inspection: Inspection) -> None:
    """Print an inspection: each fact with its source, then a table of the depths."""
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"{'path':<16}{inspection.checkpoint.path}", markup=False)
    facts = list(_facts(inspection))
    width = max(len(value) for _, value, _ in facts if len(value) <= _WIDE)
    for name, value, source in facts:
        known = f"  ({source})" if source != value else ""
        console.print(f"{name:<16}{value:<{width}}{known}".rstrip(), markup=False)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("layers")
    seen = ("mean cosine", "neighbours") if inspection.looks else ()
    for column in ("parameters", "embeddings", "MB as stored", *seen):
        table.add_column(column, justify="right")
    for size in inspection.sizes:
        look = inspection.looks.get(size.layers)
        seen = (f"{look.mean_cosine:.2f}", f"{look.neighbours:.0%}") if look else ()
        table.add_row(
            str(size.layers),
            f"{size.parameters:,}",
            f"{size.embedding_parameters / size.parameters:.0%}",
            f"{size.bytes / 1e6:.1f}",
            *seen,
        )
    console.print(table)
    if inspection.note:
        console.print(inspection.note, markup=False)


def _facts(inspection: Inspection) -> Iterator[tuple[str, str, str]]:
    """Yield name, value and source of each fact."""
    checkpoint, sources = inspection.checkpoint, inspection.checkpoint.sources
    grid = checkpoint.trained
    trained = "unknown" if grid is None else grid_text(grid).replace(";", "; ")
    latent = "latent attention, " if checkpoint.latent else ""
    yield "model type", checkpoint.model_type, sources["model_type"]
    yield "layers", str(checkpoint.layers), sources["layers"]
    yield "hidden size", str(checkpoint.hidden), sources["hidden"]
    for name, value in _widths(checkpoint).items():
        yield name, value, sources["widths"]
    yield "vector width", str(checkpoint.dim), sources["dim"]
    yield "vocabulary", str(checkpoint.vocab_size), sources["vocab_size"]
    yield "stored in", inspection.stored, "types of the weights"
    yield "pooling", latent + " + ".join(checkpoint.pooling.modes), sources["pooling"]
    yield "final norm", checkpoint.final_norm, sources["final_norm"]
    yield "normalised", "yes" if checkpoint.normalized else "no", sources["normalized"]
    if checkpoint.speaks:
        yield "aligned", f"with depth {checkpoint.speaks.layers}", "m2dexport.json"
    yield "similarity", checkpoint.similarity, sources["similarity"]
    yield "prompts", str(checkpoint.prompts or "none"), sources["prompts"]
    yield "default prompt", checkpoint.default_prompt or "none", sources["default_prompt"]
    yield "maximum length", f"{checkpoint.max_length} tokens", sources["max_length"]
    yield "trained grid", trained, sources["trained"]


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
