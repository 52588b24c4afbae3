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
from m2dexport.cli.release import build_bundles, report_outcomes, require_options_of_budget
from m2dexport.engines import DEFAULT_ENGINE, ENGINES, STATIC_ENGINE
from m2dexport.errors import UsageError

if TYPE_CHECKING:
    from m2dexport.build.build import Artifact


@cli.command()
@click.option(
    "--profile",
    type=PATH,
    metavar="PROFILE.JSON",
    help="With --budget: choose from it where it was measured for the target.  [default: measure]",
)
@click.option(
    "--budget",
    metavar="NAME|FILE",
    multiple=True,
    help="A target: choose the best cell within its budget, build it, and bundle it as NAME.m2d; "
    "may be repeated.",
)
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
@click.option(
    "--out",
    type=PATH,
    help="Artifact folder to write; with --budget, folder of bundles.  [default of that: dist]",
)
@force_option
@json_option
@click.pass_context
def build(
    context: click.Context,
    /,
    budget: tuple[str, ...],
    out: Path | None,
    force: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Build an artifact: one graph from token ids to the vector.

    Its vectors are checked against those of the torch original. With --budget, build and verify
    the best bundle for each target, in one call.

    \b
    Examples:
      m2dexport build --layers 4 --dim 128 --weights int8 --vectors int8 --out artifact
      m2dexport build --weights int4-weight-only --max-drop 0.5 --out artifact
      m2dexport build --engine tensorrt-rtx --gpu 8.9,12.0 --out artifact
      m2dexport build --layers 1 --align --vectors int8 --index index.m2d --out query
      m2dexport build --budget edge-cpu --budget browser --profile profile/profile.json
    """
    if budget:
        require_options_of_budget(context)
        outcomes = build_bundles(budget, out or Path("dist"), options, force=force)
        report_outcomes(outcomes, as_json=as_json)
        return
    if options.pop("profile") is not None:
        raise UsageError("--profile goes with --budget, which names the target to choose for.")
    if out is None:
        raise UsageError("no output is named; name the artifact folder with --out.")
    artifact = _build(out, options, force=force)
    _print_artifact(artifact, "torch", as_json)


def _build(out: Path, options: dict[str, Any], *, force: bool) -> Artifact:
    """Build the artifact that the options of ``build`` describe."""
    from m2dexport.build.aligned import build_aligned
    from m2dexport.build.build import build_artifact

    model, layers, dim = (options.pop(name) for name in ("model", "layers", "dim"))
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
        make = build_artifact if texts is None else build_aligned
        return make(checkpoint, layers, dim, out, recipe, on_progress, force=force)


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
