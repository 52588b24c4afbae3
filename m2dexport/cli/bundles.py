"""Commands that make and use bundles: bundle, verify, encode."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from m2dexport.cli.console import count_texts, print_json, progress
from m2dexport.cli.group import GroupWithArguments, cli
from m2dexport.cli.options import (
    PATH,
    Finite,
    align_texts_option,
    bit_order_option,
    calibration_option,
    cell_option,
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
    from m2dexport.runtime.bundle import ArtifactReport, BundleInfo, VerifyReport
    from m2dexport.runtime.encoder import Encoder


@cli.group(cls=GroupWithArguments, invoke_without_command=True, subcommand_metavar="")
@click.argument("sources", type=PATH, nargs=-1, required=True, metavar="ARTIFACT...|PROFILE.JSON")
@click.option(
    "--cell",
    "cells",
    multiple=True,
    metavar="ID",
    help="With a profile: a cell to build, as select names it; may be repeated.",
)
@click.option("--target", metavar="NAME", help="With a profile of several targets: the cells'.")
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
    sources: tuple[Path, ...],
    cells: tuple[str, ...],
    out: Path,
    force: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Pack artifacts or a profile's cells into one file for a device.

    Cells are built first. Several make a nested bundle, which holds what they share once; the
    deepest is the default, of several as deep the first that is named.

    \b
    Examples:
      m2dexport bundle artifact --out edge.m2d
      m2dexport bundle profile/profile.json --cell 4x128-int8-int8 --out edge.m2d
      m2dexport bundle profile/profile.json --cell 1x384-aligned-int8-int8 --index index.m2d \\
        --out query.m2d
      m2dexport bundle profile/profile.json --cell 6x128-int8-int8 \\
        --cell 2x128-aligned-int8-int8 --out nested.m2d
      m2dexport bundle show nested.m2d
    """
    from m2dexport.runtime.bundle import write_bundle
    from m2dexport.runtime.packing import write_nested

    _require_sources(sources, cells, options)
    if cells:
        info = _bundle_cells(sources[0], cells, out, force=force, **options)
    elif len(sources) == 1:
        info = write_bundle(sources[0], out, force=force)
    else:
        info = write_nested(sources, out, force=force)
    if as_json:
        print_json(asdict(info))
        return
    spoken = f"; {info.speaks.name()}" if info.speaks else ""
    click.echo(f"{info.path}: {info.size_bytes / 1e6:.2f} MB, space {info.space_id}{spoken}")
    if len(info.cells) > 1:
        click.echo(f"cells: {', '.join(info.cells)}; {info.cells[0]} is the default")
        click.echo(info.sentence())


def _require_sources(
    sources: tuple[Path, ...], cells: tuple[str, ...], options: dict[str, Any]
) -> None:
    """Refuse what is not there, and options that do not go together."""
    for source in sources:
        if not source.exists():
            raise UsageError(f"{source} does not exist; name an artifact folder or a profile.json.")
    files = [source for source in sources if not source.is_dir()]
    if len(sources) > 1 and files:
        raise UsageError(
            f"{files[0]} is not an artifact folder; name several of those, or one profile.json."
        )
    if bool(files) != bool(cells):
        if cells:
            raise UsageError("--cell goes with a profile.json, and only with that; leave it out.")
        raise UsageError(f"{files[0]} has many cells; name one with --cell, as select does.")
    if not cells and (options["target"] or options["allow_batch_dependent"]):
        raise UsageError(
            "--target and --allow-batch-dependent go with a profile's cell; leave them out."
        )
    if not cells and options["index"]:
        raise UsageError(
            "--index goes with a profile's cell; build or quantize the artifact with --index."
        )


def _bundle_cells(
    source: Path,
    cells: tuple[str, ...],
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
    from m2dexport.profile.deploy import Deployment, bundle_cells, open_profiled
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
    with progress() as on_progress:
        checkpoint = open_profiled(profile, model, **trust)
        return bundle_cells(profile, cells, checkpoint, out, deployment, on_progress, force=force)


@cli.command()
@click.argument("bundle_path", type=PATH, metavar="BUNDLE|ARTIFACT")
@click.option(
    "--vectors",
    type=PATH,
    metavar="FILE",
    help="Vectors of an index (.npy, .safetensors, .jsonl) that must be of this bundle's space.",
)
@click.option("--cell", metavar="ID", help="Of a nested bundle: the cell.  [default: all]")
@click.option(
    "--key", type=PATH, metavar="FILE", help="The ed25519 public key that must have signed it."
)
@device_options
@json_option
def verify(
    bundle_path: Path,
    vectors: Path | None,
    cell: str | None,
    key: Path | None,
    as_json: bool,
    **device: Any,
) -> None:
    """Check every byte of a BUNDLE, then run its golden texts here.

    Of a nested bundle, those of every cell, or of the one that --cell names. Of an artifact folder,
    which has no golden texts, it checks that its files are as built, belong together and run.

    Exit codes: 3 where the bundle is whole and gives other vectors here, 4 where it is damaged or
    altered, 1 and 2 for other errors.

    \b
    Examples:
      m2dexport verify edge.m2d
      m2dexport verify edge.m2d --vectors vectors.npy
      m2dexport verify edge.m2d --key maker.pub
    """
    from m2dexport.engines import Device
    from m2dexport.runtime.bundle import verify_artifact, verify_bundle

    report: VerifyReport | ArtifactReport
    _require_bundle(bundle_path, {"--cell": cell, "--key": key})
    if bundle_path.is_dir():
        report = verify_artifact(bundle_path, Device(**device), vectors)
    else:
        report = verify_bundle(bundle_path, Device(**device), vectors, cell, key)
    if as_json:
        print_json(asdict(report))
        return
    for line in report.lines():
        click.echo(line)


@cli.command()
@click.argument("bundle_path", type=PATH, metavar="BUNDLE|ARTIFACT")
@click.option("--in", "source", type=PATH, metavar="FILE", help="Texts.  [default: stdin]")
@click.option(
    "--out",
    type=PATH,
    metavar="FILE",
    help=".npy, .safetensors or .jsonl.  [default: JSONL to stdout]",
)
@force_option
@cell_option
@click.option(
    "--within-ms",
    type=Finite(0, min_open=True),
    metavar="MS",
    help="Of a nested bundle: the deepest cell that takes at most so long here for one text of 16 "
    "tokens, which is measured first; of one depth, the default before the others.",
)
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
    **which: Any,
) -> None:
    """Encode texts with a BUNDLE: one per line, or JSONL with "text".

    Files named .jsonl or .ndjson are JSONL, and so is stdin when its first line begins with {".

    \b
    Examples:
      m2dexport encode edge.m2d --in texts.txt --out vectors.npy
      echo "A man is playing a guitar." | m2dexport encode edge.m2d
      m2dexport encode nested.m2d --cell 2x128-int8-int8 --in texts.txt --out vectors.npy
    """
    from m2dexport.runtime.streams import encode_stream

    summary = encode_stream(
        _encoder(bundle_path, kept=out is not None, **which),
        source,
        out,
        prompt=prompt,
        batch_size=batch_size,
        force=force,
        on_progress=count_texts if out else lambda _: None,  # not among the rows of stdout
    )
    click.echo(("\r" if out and sys.stderr.isatty() else "") + summary.sentence(), err=True)


def _encoder(
    path: Path, *, kept: bool, cell: str | None, within_ms: float | None, **device: Any
) -> Encoder:
    """Return the cell that is named, or that is chosen by its time here.

    Args:
        path: the bundle, or the artifact folder.
        kept: whether its vectors go to a file, to be compared with others later.
        cell: the id that is named.
        within_ms: the time to choose by.
        device: what to run it on.
    """
    from m2dexport.engines import Device
    from m2dexport.runtime.cells import cell_of
    from m2dexport.runtime.loading import load
    from m2dexport.runtime.nested import Nested

    if within_ms is None:
        return load(path, Device(**device), cell)
    if cell is not None:
        raise UsageError("--cell names a cell and --within-ms chooses one; leave one of them out.")
    _require_bundle(path, {"--within-ms": within_ms})
    nested = Nested(path, Device(**device))
    encoder = nested.within(within_ms)
    cell = cell_of(encoder.spec)
    said = f"{path}: {cell} is within {within_ms:g} ms, and no deeper cell is"
    if kept and len(nested.cells) > 1:
        said += f"; another day may choose another cell, {_kept_by(cell, len(nested.spaces))}"
    click.echo(said, err=True)
    return encoder


def _kept_by(cell: str, spaces: int) -> str:
    """Return what naming a cell keeps, of a bundle whose cells speak so many spaces."""
    if spaces == 1:
        return f"which speaks the same space: --cell {cell} keeps this one"
    return f"and space: --cell {cell} keeps both"


def _require_bundle(path: Path, options: dict[str, Any]) -> None:
    """Refuse options that need a bundle where there is a folder."""
    for option, value in options.items():
        if value is not None and path.is_dir():
            raise UsageError(f"{option} needs a bundle, and {path} is a folder; leave it out.")
