"""A bundle with cells: one or several of a checkpoint in one file, what they share stored once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from m2dexport.errors import UsageError
from m2dexport.files import require_file
from m2dexport.runtime.archive import POOL
from m2dexport.runtime.bundle import BundleInfo, Packed, pack, write_verified
from m2dexport.runtime.cells import depth_order, whole_files
from m2dexport.runtime.manifest import (
    MANIFEST,
    CellEntry,
    CellFile,
    Figures,
    Manifest,
    Span,
    file_entry,
    manifest_of,
    vectors_entry,
)
from m2dexport.runtime.sharing import share


def write_nested(
    folders: Sequence[str | Path],
    out: str | Path,
    figures: Mapping[str, Figures] | None = None,
    *,
    force: bool = False,
) -> BundleInfo:
    """Pack artifact folders of one checkpoint into one file, and verify each of them.

    The deepest is the default cell; of several as deep, the first. Beyond that, the same artifacts
    in any order give the same bytes.

    Args:
        folders: artifact folders, as ``build`` makes them; one or several.
        out: the file to write, usually named ``*.m2d``.
        figures: id of a cell -> what a profile measured of it; a device may choose by that.
        force: whether a file that is there is replaced.

    Raises:
        UsageError: when a folder is not an artifact, two are one cell, or ``out`` exists and is
            not to be replaced.
        BundleError: when an artifact's files do not belong together.

    Example:
        >>> write_nested(["deep", "shallow"], "nested.m2d").cells
        ('6x128-int8-int8', '2x128-int8-int8')
    """
    out = Path(out)
    require_file(out, force=force)
    packed = [pack(Path(folder)) for folder in folders]
    _require_distinct(packed)
    default = max(packed, key=lambda each: each.spec.layers).cell
    packed.sort(key=lambda each: depth_order(each.cell, default), reverse=True)
    entries, manifest = _nested(packed, figures or {})
    return write_verified({**entries, MANIFEST: manifest.to_json()}, packed, out, force=force)


def _nested(
    packed: Sequence[Packed], figures: Mapping[str, Figures]
) -> tuple[dict[str, bytes], Manifest]:
    """Return the entries of a bundle with cells, and its manifest; the first is the default."""
    default, *others = packed
    pool, spans = share(default.files, [each.files for each in others], POOL)
    entries = {**default.files, **({POOL: pool} if pool else {})}
    licenses = {name: text for each in reversed(packed) for name, text in each.licenses.items()}
    manifest = manifest_of(entries, default.spec, licenses)
    files = [
        whole_files(manifest),
        *(_cell_files(each, found) for each, found in zip(others, spans, strict=True)),
    ]
    cells = {
        each.cell: CellEntry(
            each.spec.space_id, vectors_entry(each.spec), found, figures.get(each.cell)
        )
        for each, found in zip(packed, files, strict=True)
    }
    return entries, replace(manifest, cells=cells, default_cell=default.cell)


def _cell_files(packed: Packed, spans: Mapping[str, list[Span]]) -> dict[str, CellFile]:
    found = {}
    for name, parts in spans.items():
        entry = file_entry(packed.files[name])
        found[name] = CellFile(entry.sha256, entry.size, parts)
    return found


def _require_distinct(packed: Sequence[Packed]) -> None:
    ids = [each.cell for each in packed]
    for cell in ids:
        if ids.count(cell) > 1:
            raise UsageError(
                f"two of the artifacts are the cell {cell}; a bundle holds a cell once, so leave "
                "one out."
            )
