"""Commands on checkpoints: inspect, slice."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from m2dexport.cli.console import busy, print_json
from m2dexport.cli.group import cli
from m2dexport.cli.options import (
    NUMBERS,
    PATH,
    PER_LAYER,
    align_options,
    force_option,
    json_option,
    model_options,
    open_model,
    texts_of,
    texts_to_align,
)
from m2dexport.errors import UsageError

if TYPE_CHECKING:
    from m2dexport.checkpoint.open import Checkpoint
    from m2dexport.slice.slicing import Cut

_CUTS = (
    *("heads", "ffn", "reorder", "dtype", "final_norm", "normalize", "prune_vocab"),
    *("align", "align_texts"),
)
_SHIPPED = Path()  # an option that takes a file of texts, given without one


def _count_or_file(value: str) -> int | Path:
    return int(value) if value.isdecimal() else Path(value)


def _refuse_hidden(_context: click.Context, _option: click.Parameter, value: str | None) -> None:
    if value is not None:
        raise UsageError(
            "--hidden cannot be cut: a LayerNorm takes its statistics over the whole hidden state, "
            "so a prefix of it is not what the model computes; cut --dim, --heads or --ffn."
        )


@cli.command()
@model_options
@click.option(
    "--look-at-depths/--no-look-at-depths",
    "look",
    default=None,
    help="Encode some texts to see whether the depths look trained.  [default: where the layers "
    "have less than 100 million parameters]",
)
@json_option
def inspect(model: str | None, look: bool | None, as_json: bool, **options: Any) -> None:
    """Describe a checkpoint, and say where each fact was read.

    The mean cosine is that of different texts at each depth. Trained depths keep it low. The
    neighbours are the full depth's 10 nearest of each text, and how many the depth shares.

    \b
    Example:
      m2dexport inspect --model sentence-transformers/all-MiniLM-L6-v2
    """
    from m2dexport.cli.inspection import facts_of, inspect_checkpoint, print_inspection

    with busy("Inspecting") as on_progress:
        inspection = inspect_checkpoint(open_model(model, options), look, on_progress)
    for sentence in inspection.warnings:
        click.echo(f"Warning: {sentence}", err=True)
    if as_json:
        print_json(facts_of(inspection))
    else:
        print_inspection(inspection)


@cli.command(name="slice")
@model_options
@click.option(
    "--layers",
    type=NUMBERS,
    help="Depth to keep; 0 is a static model, always aligned; several give a grid.  [default: all]",
)
@click.option("--dim", type=NUMBERS, help="Leading width to keep; likewise.  [default: all]")
@click.option(
    "--heads", type=PER_LAYER, help="Attention heads to keep; several are one number per layer."
)
@click.option("--ffn", type=PER_LAYER, help="Feed-forward channels to keep; likewise.")
@click.option(
    "--reorder-by-importance",
    "reorder",
    is_flag=False,
    flag_value=_SHIPPED,
    type=PATH,
    metavar="[FILE]",
    help="Put the heads and channels first that matter most on these texts, one per line; without "
    "FILE, the shipped ones.",
)
@click.option("--hidden", hidden=True, expose_value=False, callback=_refuse_hidden)
@click.option(
    "--out",
    type=PATH,
    help="Folder of the sub-model; of a grid, each is a folder in it, as in 6x128.  "
    "[default: sub-model-6x128; sub-models]",
)
@click.option("--dtype", type=click.Choice(["fp32", "fp16", "bf16"]), help="Type to store.")
@click.option(
    "--final-norm",
    type=click.Choice(["applied", "skipped"]),
    help="Whether pre-LN families apply their final norm to the last kept layer.",
)
@click.option(
    "--normalize",
    is_flag=True,
    help="Normalise the vectors of a model of another similarity than cosine, which keep their "
    "norms otherwise.",
)
@click.option(
    "--prune-vocab",
    type=_count_or_file,
    metavar="CORPUS|N",
    help="Keep the pieces that the texts of a file (one per line) use, or the N most useful "
    "pieces.",
)
@align_options
@force_option
@json_option
def slice_command(
    model: str | None,
    layers: tuple[int, ...] | None,
    dim: tuple[int, ...] | None,
    out: Path | None,
    force: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Cut sub-models that load in sentence-transformers.

    They are checkpoints of their own and load in transformers, too.

    \b
    Examples:
      m2dexport slice --layers 6 --dim 128
      m2dexport slice --layers 2,4,6 --dim 64,128 --out grid
      m2dexport slice --heads 8 --ffn 1024 --reorder-by-importance --out narrow
      m2dexport slice --layers 2 --dim 64 --prune-vocab 4000
      m2dexport slice --layers 1 --dim 128 --align
      m2dexport slice --layers 0 --dim 128 --out static
    """
    from m2dexport.slice.slicing import slice_grid

    cuts = {name: options.pop(name) for name in _CUTS}
    if layers and 0 in layers and len(layers) > 1 and not cuts["align"]:
        raise UsageError(
            "--layers 0 is always aligned, and the other depths only with --align; pass it, or "
            "slice depth 0 by itself."
        )
    checkpoint = open_model(model, options)
    layers, dim = layers or (checkpoint.layers,), dim or (checkpoint.dim,)
    one = f"sub-model-{layers[0]}x{dim[0]}"
    with busy("Slicing") as on_progress:
        sub_models = slice_grid(
            checkpoint,
            layers,
            dim,
            out or Path("sub-models" if len(layers) * len(dim) > 1 else one),
            _cut(checkpoint, 0 in layers, **cuts),
            on_progress,
            force=force,
        )
    _print_slices(sub_models, as_json)


def _cut(
    checkpoint: Checkpoint,
    static: bool,
    reorder: Path | None,
    prune_vocab: Path | int | None,
    align: bool,
    align_texts: Path | None,
    **kept: Any,
) -> Cut:
    """Return what the options of ``slice`` say besides layers and dims."""
    from m2dexport.data import calibration_texts
    from m2dexport.slice.pruning import plan_pruning
    from m2dexport.slice.slicing import Cut

    pruning = None
    if isinstance(prune_vocab, int):
        pruning = plan_pruning(checkpoint, size=prune_vocab)
    elif prune_vocab:
        pruning = plan_pruning(checkpoint, texts_of(prune_vocab))
    texts = calibration_texts() if reorder == _SHIPPED else texts_of(reorder)
    align = align or (static and checkpoint.layers > 0)
    return Cut(**kept, reorder=texts, pruning=pruning, align=texts_to_align(align, align_texts))


def _print_slices(sub_models: Sequence[Checkpoint], as_json: bool) -> None:
    from m2dexport.checkpoint.jsonfile import read_object
    from m2dexport.files import PROVENANCE

    said = [read_object(n.path / PROVENANCE) for n in sub_models]
    if as_json:
        facts = [{"layers": n.layers, "dim": n.dim, "path": n.path} for n in sub_models]
        for fact, provenance in zip(facts, said, strict=True):
            named = ("vocabulary", "alignment")
            fact |= {key: provenance[key] for key in named if provenance.get(key)}
        print_json(facts)
        return
    for sub_model, provenance in zip(sub_models, said, strict=True):
        fit = provenance.get("alignment")
        aligned = ""
        if fit:
            aligned = (
                f"; aligned on {fit['texts']:,} texts: held-out cosine to depth "
                f"{fit['full_model']['layers']} {fit['cosine_before']:.3f} before, "
                f"{fit['cosine_after']:.3f} after"
            )
        click.echo(
            f"{sub_model.path}: {sub_model.layers} layers, {sub_model.dim} dims, "
            f"{_folder_megabytes(sub_model.path):.1f} MB{aligned}"
        )
    if said[0].get("vocabulary"):
        click.echo(_vocabulary_sentence(said[0]["vocabulary"]))


def _vocabulary_sentence(vocabulary: dict[str, Any]) -> str:
    before, after = vocabulary["pieces"]
    tokens = [
        f"{old:.2f} before and {new:.2f} after on the {name} texts"
        for name, (old, new) in vocabulary["tokens_per_text"].items()
    ]
    return (
        f"vocabulary: {after:,} of {before:,} pieces, {vocabulary['bytes_saved'] / 1e6:.1f} MB "
        f"saved; tokens per text: {', '.join(tokens)}"
    )


def _folder_megabytes(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
