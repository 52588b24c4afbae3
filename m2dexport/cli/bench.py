"""The command on a device: bench."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from m2dexport.cli.console import print_json
from m2dexport.cli.group import cli
from m2dexport.cli.options import PATH, SHAPES, cell_option, device_options, json_option

if TYPE_CHECKING:
    from m2dexport.measure.bench import Bench


@cli.command()
@click.argument("bundle_path", type=PATH, metavar="BUNDLE|ARTIFACT")
@click.option(
    "--shapes",
    type=SHAPES,
    default="1x16,1x64,16x32",
    show_default=True,
    help="What to time; the first is what limits on latency mean.",
)
@click.option("--name", help="What this machine is called.  [default: its host name]")
@cell_option
@device_options
@json_option
def bench(
    bundle_path: Path,
    shapes: tuple[tuple[int, int], ...],
    name: str | None,
    cell: str | None,
    as_json: bool,
    **device: Any,
) -> None:
    """Measure what a BUNDLE costs on this machine.

    That is latency with and without tokenization, loading, memory, and how quiet the machine was.
    profile merge reads the JSON.

    \b
    Examples:
      m2dexport bench edge.m2d
      m2dexport bench edge.m2d --shapes 1x16,8x128 --json > edge.json
      m2dexport bench nested.m2d --cell 2x128-int8-int8
    """
    from m2dexport.engines import Device
    from m2dexport.measure.bench import bench as measure

    found = measure(bundle_path, Device(**device), shapes, name=name, cell=cell)
    if as_json:
        print_json(found.as_json())
    else:
        for line in _lines(found):
            click.echo(line)


def _lines(found: Bench) -> Iterator[str]:
    """Yield what is printed, within 80 columns where names allow."""
    from m2dexport.measure.quantiles import tail_comment

    spec, machine = found.spec, found.machine
    yield (
        f"{found.path}: {spec.layers} layers, {spec.dim} dims, weights={spec.weights}, "
        f"vectors={spec.vectors}, {spec.engine}"
    )
    threads = found.device["threads"]
    where = f", {machine.virtualisation}" if machine.virtualisation else ""
    yield f"{found.name}: {machine.cpu}, {threads} thread{'s' * (threads > 1)}{where}"
    yield "texts x tokens  p50 ms  p95 ms  p99 ms  tokenization ms  runs"
    for point, tokens in zip(found.latency, found.tokenization, strict=True):
        p99 = "" if point.p99_ms is None else f"{point.p99_ms:.2f}"
        yield (
            f"{f'{point.batch}x{point.sequence}':<14}  {point.p50_ms:6.2f}  {point.p95_ms:6.2f}  "
            f"{p99:>6}  {tokens.p50_ms:15.2f}  {point.runs:4}"
        )
    if found.asked != found.shapes:
        yield "Longer shapes were cut to the maximum length."
    first = found.latency[0]
    yield (
        f"text to vector {first.text_p50_ms:.2f} ms, load {found.load_ms:.0f} ms, first vector "
        f"{found.first_ms:.2f} ms"
    )
    yield (
        f"memory {found.peak_memory_bytes / 1e6:.0f} MB, after 1,000 requests "
        f"{found.used_memory_bytes / 1e6:.0f} MB; file {found.size_bytes / 1e6:.2f} MB"
    )
    comment = tail_comment(first.p50_ms, first.p95_ms)
    if comment:
        yield f"Note: {comment}"
    yield f"The machine was {found.noise.verdict}: {' '.join(found.noise.reasons)}"
