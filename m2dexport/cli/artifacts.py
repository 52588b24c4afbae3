"""Commands that make artifacts: build, quantize."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from m2dexport.cli.console import busy, print_json
from m2dexport.cli.group import cli
from m2dexport.cli.options import (
    PATH,
    device_options,
    force_option,
    json_option,
    model_options,
    open_model,
    recipe_of,
    recipe_options,
)
from m2dexport.engines import DEFAULT_ENGINE, ENGINES

if TYPE_CHECKING:
    from m2dexport.build.build import Artifact


@cli.command()
@model_options
@click.option("--layers", type=int, help="Depth to keep.  [default: all]")
@click.option("--dim", type=int, help="Leading width to keep.  [default: all]")
@recipe_options()
@click.option(
    "--engine",
    type=click.Choice(list(ENGINES)),
    default=DEFAULT_ENGINE,
    show_default=True,
    help="What will run it: ONNX Runtime, or OpenVINO.",
)
@device_options
@click.option("--out", type=PATH, required=True, help="Artifact folder to write.")
@force_option
@json_option
def build(
    model: str | None,
    layers: int | None,
    dim: int | None,
    out: Path,
    force: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Build an artifact: one graph from token ids to the vector.

    Its vectors are checked against those of the torch original.

    \b
    Examples:
      m2dexport build --layers 4 --dim 128 --weights int8 --vectors int8 --out artifact
      m2dexport build --weights int4-weight-only --max-drop 0.5 --out artifact
    """
    from m2dexport.build.build import build_artifact

    recipe = recipe_of(options)
    checkpoint = open_model(model, options)
    with busy("Building") as on_progress:
        artifact = build_artifact(
            checkpoint,
            checkpoint.layers if layers is None else layers,
            checkpoint.dim if dim is None else dim,
            out,
            recipe,
            on_progress,
            force=force,
        )
    _print_artifact(artifact, "torch", as_json)


@cli.command()
@click.argument("artifact", type=PATH)
@recipe_options("int8", "int8")
@click.option("--out", type=PATH, required=True, help="Artifact folder to write.")
@force_option
@json_option
def quantize(
    artifact: Path,
    out: Path,
    force: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Quantize an ARTIFACT of fp32 weights and float32 vectors.

    \b
    Example:
      m2dexport quantize artifact --weights int8 --vectors ubinary --out artifact-int8
    """
    from m2dexport.build.build import quantize_artifact

    recipe = recipe_of(options)
    with busy("Quantizing") as on_progress:
        result = quantize_artifact(artifact, out, recipe, on_progress, force=force)
    _print_artifact(result, str(artifact), as_json)


def _print_artifact(artifact: Artifact, original: str, as_json: bool) -> None:
    from m2dexport.cli.tables import print_mixture

    if as_json:
        print_json(asdict(artifact))
        return
    spec, parity = artifact.spec, artifact.spec.parity
    clipped = ""
    if spec.clipping_rate is not None:
        clipped = f"\nvalues of held-out texts outside the ranges: {spec.clipping_rate:.2%}"
    click.echo(
        f"{artifact.path}: {spec.layers} layers, {spec.dim} dims, weights={spec.weights}, "
        f"vectors={spec.vectors}, isa={spec.isa}, {artifact.size_bytes / 1e6:.2f} MB\n"
        f"parity with {original} on {parity['texts']:.0f} ragged texts: mean cosine "
        f"{parity['mean_cosine']:.6f}, largest difference {parity['max_difference']:.1e}; "
        f"the same in a batch: {parity['batch_cosine']:.6f}{clipped}"
    )
    if artifact.mixture is not None:
        print_mixture(artifact.mixture, spec.weights)
