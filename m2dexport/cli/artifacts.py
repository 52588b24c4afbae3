"""Commands that make artifacts: build, quantize."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from m2dexport.cli.console import busy, print_json
from m2dexport.cli.group import cli
from m2dexport.cli.options import (
    PATH,
    align_options,
    compilation_options,
    device_options,
    force_option,
    index_option,
    json_option,
    model_options,
    open_model,
    recipe_of,
    recipe_options,
    texts_to_align,
)
from m2dexport.engines import DEFAULT_ENGINE, ENGINES, STATIC_ENGINE

if TYPE_CHECKING:
    from m2dexport.build.build import Artifact


@cli.command()
@model_options
@click.option(
    "--layers", type=int, help="Depth to keep; 0 is a static model, always aligned.  [default: all]"
)
@click.option("--dim", type=int, help="Leading width to keep.  [default: all]")
@recipe_options(None)
@click.option(
    "--engine",
    type=click.Choice(list(ENGINES)),
    help="What will run it: ONNX Runtime, OpenVINO, TensorRT, or, of depth 0, numpy.  "
    "[default: onnx; of depth 0, static]",
)
@device_options
@compilation_options
@align_options
@index_option
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
      m2dexport build --engine tensorrt-rtx --gpu 8.9,12.0 --out artifact
      m2dexport build --layers 1 --align --vectors int8 --index index.m2d --out query
    """
    from m2dexport.build.aligned import build_aligned
    from m2dexport.build.build import build_artifact

    align, align_texts = options.pop("align"), options.pop("align_texts")
    engine, weights = options.pop("engine"), options["weights"]
    recipe = recipe_of(options)
    checkpoint = open_model(model, options)
    layers = checkpoint.layers if layers is None else layers
    dim = checkpoint.dim if dim is None else dim
    texts = texts_to_align(align or layers == 0 < checkpoint.layers, align_texts)
    engine = engine or (STATIC_ENGINE if layers == 0 else DEFAULT_ENGINE)
    weights = weights or ENGINES[engine].weights
    recipe = replace(recipe, engine=engine, weights=weights, align_texts=texts)
    with busy("Building") as on_progress:
        if texts is None:
            artifact = build_artifact(
                checkpoint, layers, dim, out, recipe, on_progress, force=force
            )
        else:
            artifact = build_aligned(checkpoint, layers, dim, out, recipe, on_progress, force=force)
    _print_artifact(artifact, "torch", as_json)


@cli.command()
@click.argument("artifact", type=PATH)
@recipe_options("int8", "int8")
@index_option
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
    clipped = checked_by = ""
    if ENGINES[spec.engine].on_gpu and not spec.checked_by.startswith(spec.engine):
        checked_by = f" (of the graph, run by {spec.checked_by}: no GPU is here)"
    if spec.clipping_rate is not None:
        clipped = f"\nvalues of held-out texts outside the ranges: {spec.clipping_rate:.2%}"
    click.echo(
        f"{artifact.path}: {spec.layers} layers, {spec.dim} dims, weights={spec.weights}, "
        f"vectors={spec.vectors}, isa={spec.isa}, {artifact.size_bytes / 1e6:.2f} MB\n"
        f"parity with {original}{checked_by} on {parity['texts']:.0f} ragged texts: mean cosine "
        f"{parity['mean_cosine']:.6f}, largest difference {parity['max_difference']:.1e}; "
        f"the same in a batch: {parity['batch_cosine']:.6f}{clipped}"
        + (f"\n{spec.speaks.name()}" if spec.speaks else "")
    )
    if artifact.mixture is not None:
        print_mixture(artifact.mixture, spec.weights)
