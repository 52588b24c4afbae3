"""Commands on bundles: bundle, verify, encode."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from m2dexport.cli.console import busy, count_texts, print_json
from m2dexport.cli.group import cli
from m2dexport.cli.options import (
    PATH,
    align_texts_option,
    bit_order_option,
    calibration_option,
    device_options,
    force_option,
    index_of,
    index_option,
    json_option,
    texts_of,
    texts_to_align,
    trust_options,
)
from m2dexport.errors import UsageError

if TYPE_CHECKING:
    from m2dexport.precisions import BitOrder
    from m2dexport.runtime.bundle import BundleInfo


@cli.command()
@click.argument("source", type=PATH, metavar="ARTIFACT|PROFILE.JSON")
@click.option("--cell", metavar="ID", help="With a profile: the cell to build, as select names it.")
@click.option("--target", metavar="NAME", help="With a profile of several targets: the cell's.")
@click.option(
    "--allow-batch-dependent",
    is_flag=True,
    help="With a profile: accept a cell with which a text's vector depends on its batch.",
)
@click.option(
    "--model",
    metavar="PATH|HUB-ID",
    help="With a profile: where its checkpoint is now.  [default: where it was]",
)
@trust_options
@calibration_option
@align_texts_option
@bit_order_option
@index_option
@click.option("--out", type=PATH, required=True, metavar="FILE.m2d", help="Bundle to write.")
@force_option
@json_option
def bundle(
    source: Path, cell: str | None, out: Path, force: bool, as_json: bool, **options: Any
) -> None:
    """Pack an artifact or a profile's cell into one file for a device.

    A cell is built first.

    \b
    Examples:
      m2dexport bundle artifact --out edge.m2d
      m2dexport bundle profile/profile.json --cell 4x128-int8-int8 --out edge.m2d
      m2dexport bundle profile/profile.json --cell 1x384-aligned-int8-int8 --index index.m2d \\
        --out query.m2d
    """
    from m2dexport.runtime.bundle import write_bundle

    if not source.exists():
        raise UsageError(f"{source} does not exist; name an artifact folder or a profile.json.")
    if source.is_dir() == (cell is not None):
        raise UsageError("--cell goes with a profile.json, and only with that; select names one.")
    if cell is None and (options["target"] or options["allow_batch_dependent"]):
        raise UsageError(
            "--target and --allow-batch-dependent go with a profile's cell; leave them out."
        )
    if cell is None and options["index"]:
        raise UsageError(
            "--index goes with a profile's cell; build or quantize the artifact with --index."
        )
    if cell is None:
        info = write_bundle(source, out, force=force)
    else:
        info = _bundle_cell(source, cell, out, force=force, **options)
    if as_json:
        print_json(asdict(info))
    else:
        spoken = f"; {info.speaks.name()}" if info.speaks else ""
        click.echo(f"{info.path}: {info.size_bytes / 1e6:.2f} MB, space {info.space_id}{spoken}")


def _bundle_cell(
    source: Path,
    cell: str,
    out: Path,
    *,
    target: str | None,
    allow_batch_dependent: bool,
    model: str | None,
    calibration: Path | None,
    align_texts: Path | None,
    bit_order: BitOrder,
    index: Path | None,
    force: bool,
    **trust: bool,
) -> BundleInfo:
    # These need torch; packing an artifact does not.
    from m2dexport.profile.deploy import Deployment, bundle_cell, open_profiled
    from m2dexport.profile.manifest import read_profile
    from m2dexport.profile.select import profile_target

    profile = read_profile(source)
    deployment = Deployment(
        texts_of(calibration),
        texts_to_align(True, align_texts),
        bit_order,
        index_of(index),
        target=profile_target(profile, target),
        allow_batch_dependent=allow_batch_dependent,
    )
    with busy("Building and packing"):
        checkpoint = open_profiled(profile, model, **trust)
        return bundle_cell(profile, cell, checkpoint, out, deployment, force=force)


@cli.command()
@click.argument("bundle_path", type=PATH, metavar="BUNDLE|ARTIFACT")
@click.option(
    "--vectors",
    type=PATH,
    metavar="FILE",
    help="Vectors of an index (.npy, .jsonl) that must be of this bundle's space.",
)
@device_options
@json_option
def verify(
    bundle_path: Path,
    vectors: Path | None,
    as_json: bool,
    **device: Any,
) -> None:
    """Check every byte of a BUNDLE, then run its golden texts here.

    Of an artifact folder, which has no golden texts, it checks that its files belong together and
    run.

    Exit codes: 3 where the bundle is whole and gives other vectors here, 4 where it is damaged or
    altered, 1 and 2 for other errors.

    \b
    Examples:
      m2dexport verify edge.m2d
      m2dexport verify edge.m2d --vectors vectors.npy
    """
    from m2dexport.engines import Device
    from m2dexport.runtime.bundle import verify_artifact, verify_bundle

    check = verify_artifact if bundle_path.is_dir() else verify_bundle
    report = check(bundle_path, Device(**device), vectors)
    if as_json:
        print_json(asdict(report))
    else:
        click.echo(report.sentence())
        if report.vectors:
            click.echo(report.vectors.sentence())


@cli.command()
@click.argument("bundle_path", type=PATH, metavar="BUNDLE|ARTIFACT")
@click.option("--in", "source", type=PATH, metavar="FILE", help="Texts.  [default: stdin]")
@click.option(
    "--out", type=PATH, metavar="FILE", help=".npy or .jsonl.  [default: JSONL to stdout]"
)
@force_option
@click.option("--prompt", metavar="NAME", help="A prompt of the model, such as query.")
@click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True)
@device_options
def encode(
    bundle_path: Path,
    source: Path | None,
    out: Path | None,
    force: bool,
    prompt: str | None,
    batch_size: int,
    **device: Any,
) -> None:
    """Encode texts with a BUNDLE: one per line, or JSONL with "text".

    Files named .jsonl or .ndjson are JSONL, and so is stdin when its first line begins with {".

    \b
    Examples:
      m2dexport encode edge.m2d --in texts.txt --out vectors.npy
      echo "A man is playing a guitar." | m2dexport encode edge.m2d
    """
    from m2dexport.engines import Device
    from m2dexport.runtime.loading import load
    from m2dexport.runtime.streams import encode_stream

    summary = encode_stream(
        load(bundle_path, Device(**device)),
        source,
        out,
        prompt=prompt,
        batch_size=batch_size,
        force=force,
        on_progress=count_texts if out else lambda _: None,  # not among the rows of stdout
    )
    click.echo(("\r" if out and sys.stderr.isatty() else "") + summary.sentence(), err=True)
