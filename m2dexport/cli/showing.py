"""Commands that look into bundles: bundle show, bundle diff."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from m2dexport.cli.bundles import bundle
from m2dexport.cli.console import print_json
from m2dexport.cli.options import PATH, json_option

if TYPE_CHECKING:
    from m2dexport.runtime.showing import Differences, Shown, ShownCell


@bundle.command()
@click.argument("path", type=PATH, metavar="FILE.m2d")
@json_option
def show(path: Path, as_json: bool) -> None:
    """Print what a bundle is: cells, spaces, sizes, licences, where it comes from.

    Every byte is checked, and nothing is run; verify does that.

    \b
    Example:
      m2dexport bundle show edge.m2d
    """
    from m2dexport.runtime.showing import show_bundle

    shown = show_bundle(path)
    if as_json:
        print_json(asdict(shown))
        return
    for line in _lines(shown):
        click.echo(line)


@bundle.command()
@click.argument("first", type=PATH, metavar="A.m2d")
@click.argument("second", type=PATH, metavar="B.m2d")
@json_option
@click.pass_context
def diff(ctx: click.Context, first: Path, second: Path, as_json: bool) -> None:
    """Print what two bundles differ in.

    Exits with 0 when they are the same bytes, and with 1 when they differ.

    \b
    Examples:
      m2dexport bundle diff old.m2d new.m2d
      m2dexport bundle diff old.m2d new.m2d --json
    """
    from m2dexport.runtime.showing import differences

    found = differences(first, second)
    if as_json:
        facts = asdict(found)
        print_json({"same": found.same, "differences": facts.pop("facts"), **facts})
    else:
        for line in _lines_of(found, first, second):
            click.echo(line)
    ctx.exit(0 if found.same else 1)


def _lines_of(found: Differences, first: Path, second: Path) -> Iterator[str]:
    if found.same:
        yield f"{first} and {second} are the same bytes."
    for path, cells in ((first, found.only_in_first), (second, found.only_in_second)):
        for cell in cells:
            yield f"only in {path}: cell {cell}"
    for each in found.facts:
        yield f"{each.what}: {each.first} | {each.second}"


def _lines(shown: Shown) -> Iterator[str]:
    cells = len(shown.cells)
    kind = "one cell" if cells == 1 else f"{cells} cells, {shown.default_cell} by default"
    yield f"{shown.path}: format {shown.format}, {shown.size_bytes / 1e6:.2f} MB, {kind}"
    for cell in shown.cells:
        yield from _cell_lines(cell, nested=cells > 1)
    yield "files: " + ", ".join(f"{name} {size:,}" for name, size in shown.files.items())
    yield f"licences: {', '.join(shown.licenses) or 'none'}"
    if shown.signed_by:
        yield f"signed by the key {shown.signed_by}, which verify --key checks"
    yield "created by: " + ", ".join(f"{k} {v[:16]}" for k, v in sorted(shown.created_by.items()))


def _cell_lines(cell: ShownCell, *, nested: bool) -> Iterator[str]:
    own = f", {cell.own_bytes / 1e6:.2f} MB of it in no other cell" if nested else ""
    yield cell.id
    yield (
        f"  {cell.layers} layers, {cell.dim} dims, weights={cell.weights}, vectors={cell.vectors}, "
        f"{cell.engine} {cell.min_engine} or newer"
    )
    yield f"  {cell.size_bytes / 1e6:.2f} MB{own}"
    yield f"  space {cell.space_id}" + (f"; {cell.speaks.name()}" if cell.speaks else "")
    yield (
        f"  at most {cell.max_length} tokens; prompts: {', '.join(cell.prompts) or 'none'}; golden "
        f"vectors within {cell.metric} {cell.limit:g}"
    )
    if cell.figures:
        known = cell.figures
        yield (
            f"  {known.p50_ms:.2f} ms (median) for {known.batch}x{known.sequence} tokens on "
            f"{known.machine}, {known.threads} thread{'s' * (known.threads != 1)}; quality "
            f"{known.quality:.2f}"
        )
