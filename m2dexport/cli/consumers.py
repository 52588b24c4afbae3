"""The command for other programs: export."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from m2dexport.cli.console import print_json
from m2dexport.cli.group import cli
from m2dexport.cli.options import PATH, SHAPES, cell_option, force_option, json_option
from m2dexport.errors import UsageError


@cli.command()
@click.argument("source", type=PATH, metavar="BUNDLE|ARTIFACT")
@click.option(
    "--for",
    "consumer",
    metavar="CONSUMER",
    required=True,
    help="sentence-transformers, optimum, fastembed, transformers.js, text-embeddings-inference, "
    "triton, onnx (the graph alone, for onnxruntime in any language), or, of depth 0, model2vec.",
)
@cell_option
@click.option(
    "--plain",
    is_flag=True,
    help="Standard ONNX operators alone, for converters that know no others.",
)
@click.option(
    "--shapes",
    type=SHAPES,
    help="Of triton: what to warm up with, and the most texts of a batch.  "
    "[default: 1x16,1x64,16x32 and what a profile timed, each cut to the maximum length]",
)
@click.option("--out", type=PATH, required=True, metavar="FOLDER", help="Folder to write.")
@force_option
@json_option
def export(
    source: Path, consumer: str, out: Path, force: bool, as_json: bool, **options: Any
) -> None:
    """Write a folder that another program opens as it is.

    Its graph is run on golden texts first, which must give the vectors of the BUNDLE or ARTIFACT;
    golden.json in the folder has them. What the program cannot take is refused, with the reason.

    \b
    Examples:
      m2dexport export edge.m2d --for sentence-transformers --out edge-st
      m2dexport export artifact --for onnx --plain --out edge-onnx
      m2dexport export edge.m2d --for triton --shapes 1x16,32x64 --out repository
    """
    from m2dexport.consumers.export import export_for
    from m2dexport.consumers.source import Options

    given = {name: value for name, value in options.items() if value is not None}
    if "shapes" in given and consumer != "triton":
        raise UsageError("--shapes goes with --for triton; leave it out.")
    found = export_for(consumer, source, out, Options(**given), force=force)
    if as_json:
        print_json(asdict(found))
        return
    agreed = found.agreement
    codes = "" if agreed.equal_codes is None else f", {agreed.equal_codes:.2%} of codes equal"
    space = "\n" if "\n" in found.opened else " "
    click.echo(
        f"{found.path}: for {consumer}, {found.size_bytes / 1e6:.2f} MB, space {found.space_id}\n"
        f"{agreed.texts} golden texts agree (smallest cosine {agreed.min_cosine:.6f}{codes})\n"
        f"Open it with:{space}{found.opened}"
    )
    for note in found.notes:
        click.echo(f"Note: {note}")
