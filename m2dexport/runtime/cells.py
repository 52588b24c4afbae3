"""The cells of a bundle: one encoder each, of several depths in a nested bundle.

A nested bundle is the bundle of its default cell with one entry more, which holds what the other
cells have and the default one lacks. Every file of a cell is spans of entries, one after the other.
A bundle of one cell lists it if a profile measured it, and else lists none.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

from m2dexport.engines import DEFAULT_ENGINE
from m2dexport.errors import BundleError, FormatError, UsageError, usable
from m2dexport.files import SPEC
from m2dexport.precisions import VECTOR_PRECISIONS, WEIGHT_PRECISIONS
from m2dexport.runtime import artifact
from m2dexport.runtime.archive import (
    OF_A_CELL,
    POOL,
    UNLISTED,
    read_bundle,
    require_files_of_cell,
    require_size,
)
from m2dexport.runtime.artifact import RANGES, TOKENIZER, ArtifactSpec
from m2dexport.runtime.manifest import (
    MANIFEST,
    CellEntry,
    CellFile,
    Manifest,
    Span,
    manifest_of,
    vectors_entry,
)
from m2dexport.runtime.one_space import require_one_space
from m2dexport.strict import parse_json, sha256_of_json, shown
from m2dexport.vectors.codecs import ranges_from_json

_FEW = 6  # ids that a message can list
_NEAR = 0.7  # of difflib's ratio: an id with one part wrong, or missing, is nearer than that
_WEIGHTS, _VECTORS = "|".join(WEIGHT_PRECISIONS), "|".join(VECTOR_PRECISIONS)
_ID = re.compile(
    rf"(?P<layers>\d+)x(?P<dims>\d+)-(?:aligned-)?(?P<weights>{_WEIGHTS})-(?P<vectors>{_VECTORS})"
    "(?:@.+)?"
)


def cell_id(
    layers: int,
    dim: int,
    weights: str,
    vectors: str,
    align: str = "none",
    engine: str = DEFAULT_ENGINE,
) -> str:
    """Return the id of a cell: "6x128-int8-ubinary" is 6 layers, 128 dims, weights, vectors.

    An aligned one is "2x128-aligned-int8-ubinary"; one of another engine than onnxruntime (and
    depth 0, whose engine is always the same) says so: "6x128-int8-ubinary@openvino".
    """
    aligned = "aligned-" if align == "full" else ""
    named = f"@{engine}" if layers > 0 and engine != DEFAULT_ENGINE else ""
    return f"{layers}x{dim}-{aligned}{weights}-{vectors}{named}"


def cell_of(spec: ArtifactSpec) -> str:
    """Return the id of the cell that an artifact is."""
    align = "none" if artifact.full_layers(spec) is None else "full"
    return cell_id(spec.layers, spec.dim, spec.weights, spec.vectors, align, spec.engine)


def unknown_cell(where: object, cell: str, cells: Iterable[str]) -> UsageError:
    """Return the error that there is no cell of an id, which says what there is.

    That is the ids where they are few, else those that are spelt almost alike, or else the layers,
    dims, weights and vectors that occur in them.

    Args:
        where: the bundle or profile, at the start of a sentence.
        cell: the id.
        cells: the ids that there are.
    """
    known = list(dict.fromkeys(cells))
    said = f"{where} has no cell {shown(cell)};"
    if len(known) <= _FEW:
        return UsageError(f"{said} it has {', '.join(known)}.")
    if near := difflib.get_close_matches(cell, known, cutoff=_NEAR):
        return UsageError(f"{said} name one that it has, such as {', '.join(near)}.")
    parts = [match.groupdict() for each in known if (match := _ID.fullmatch(each))]
    axes = {axis: {each[axis]: None for each in parts} for axis in _ID.groupindex}
    there = "; ".join(f"{axis} {', '.join(_ordered(values))}" for axis, values in axes.items())
    return UsageError(f"{said} ids look like {known[0]}, and it has {there}.")


def _ordered(values: Iterable[str]) -> list[str]:
    """Return numbers by size, and names as they come."""
    return sorted(values, key=lambda value: int(value) if value.isdecimal() else 0)


def depth_order(cell: str, default: str) -> tuple[int, bool, int, str]:
    """Return what sorts the ids of cells by layers; of one depth, the default last, then by dims.

    Args:
        cell: the id.
        default: that of the bundle's default cell.
    """
    layers, _, rest = cell.partition("x")
    return int(layers), cell == default, int(rest.partition("-")[0]), cell


def spaces_of_cells(specs: Mapping[str, ArtifactSpec]) -> tuple[tuple[str, ...], ...]:
    """Return the ids of cells that may query one index, together, in the order of ``specs``."""
    found: dict[str, tuple[str, ...]] = {}
    for cell, spec in specs.items():
        space = artifact.spaces_of(spec)[-1]  # what it speaks is what it is there for
        found[space] = (*found.get(space, ()), cell)
    return tuple(found.values())


@dataclass(frozen=True)
class Opened:
    """A bundle that was read, with every byte of its entries checked."""

    path: Path
    entries: Mapping[str, bytes]  # name to content
    manifest: Manifest

    @property
    def cells(self) -> tuple[str, ...]:
        """The ids of its cells, the deepest first; of one depth, the default first."""
        found = self.manifest.cells or [self.default]
        order = functools.partial(depth_order, default=self.default)
        return tuple(sorted(found, key=order, reverse=True))

    @property
    def nested(self) -> bool:
        """Whether it has several cells."""
        return len(self.manifest.cells) > 1

    @functools.cached_property
    def default(self) -> str:
        """The id of the cell that is meant where none is named."""
        return self.manifest.default_cell or _identity(_spec_of(self.entries, self.path), self.path)

    def require_cell(self, cell: str | None) -> str:
        """Return the id of a cell; None is the default.

        Raises:
            UsageError: when there is no such cell, naming those there are.
        """
        if cell is not None and cell not in self.cells:
            raise unknown_cell(self.path, cell, self.cells)
        return self.default if cell is None else cell

    def size_of(self, cell: str) -> int:
        """Return the bytes of the files of a cell, shared or not."""
        if self.manifest.cells:
            return self.manifest.cells[cell].size
        return sum(map(len, self.files().values()))

    def files(self, cell: str | None = None) -> dict[str, bytes]:
        """Return the files of a cell, name to content, which the manifest describes.

        Args:
            cell: its id; None: the default.

        Raises:
            UsageError: when there is no such cell.
            BundleError: when a file, or the specification, is not what the manifest says.
        """
        cell = self.require_cell(cell)
        where, entry = self.name_of(cell), self.manifest.cells.get(cell)
        if cell == self.default:
            files = {n: self.entries[n] for n in self.entries if n not in (*UNLISTED, POOL)}
        else:
            assert entry is not None
            files = {n: self._joined(file, f"{cell}: {n}") for n, file in entry.files.items()}
            require_files_of_cell(files, where)
        spec = _spec_of(files, where)
        if cell == self.default:
            _require_manifest(spec, self.manifest, where)
        if entry is not None:
            _require_cell(spec, cell, entry, where)
        return files

    def spec(self, cell: str | None = None) -> ArtifactSpec:
        """Return the specification of a cell, which its other files agree with.

        Args:
            cell: its id; None: the default.

        Raises:
            UsageError: when there is no such cell.
            BundleError: when it cannot be read, or is not that of its files.
        """
        cell = self.require_cell(cell)
        return agreed_spec(self.files(cell), self.name_of(cell))

    def name_of(self, cell: str) -> str:
        """Return what messages call a cell: the bundle and, of a nested one, the id."""
        return f"{self.path}: {cell}" if self.nested else f"{self.path}"

    def _joined(self, file: CellFile, name: str) -> bytes:
        first = file.spans[0] if len(file.spans) == 1 else None
        whole = self.manifest.files.get(first.entry) if first else None
        if first and whole and (whole.size, whole.sha256) == (file.size, file.sha256):
            return self.entries[first.entry]  # which was compared when it was read
        views = {entry: memoryview(content) for entry, content in self.entries.items()}
        parts = [views[s.entry][s.offset : s.offset + s.size] for s in file.spans]
        content = b"".join(parts)
        if hashlib.sha256(content).hexdigest() != file.sha256:
            raise BundleError(
                f"{self.path}: {name} does not match its sha256; build the bundle again."
            )
        return content


def open_cells(path: Path) -> Opened:
    """Return a bundle with its cells, after checking each byte and where each file comes from.

    Raises:
        UsageError: when there is no such file.
        BundleError: when it is not a bundle, is damaged, was made by another format, or a cell's
            files are not parts of its entries.
    """
    opened = Opened(path, *read_bundle(path))
    _require_cells(opened)
    return opened


def agreed_spec(files: Mapping[str, bytes], where: object) -> ArtifactSpec:
    """Return the specification of an encoder's files, none of which is loaded.

    Args:
        files: name to content.
        where: the bundle or a cell of it, for messages.

    Raises:
        BundleError: when one of them cannot be read, or they do not belong together.
    """
    spec = _spec_of(files, where)
    with usable(where):
        ranges = ranges_from_json(files[RANGES]) if RANGES in files else None
    tokenizer = parse_json(files[TOKENIZER], f"{where}: {TOKENIZER}", BundleError)
    require_one_space(spec, ranges, sha256_of_json(tokenizer), where)
    return spec


def _spec_of(files: Mapping[str, bytes], where: object) -> ArtifactSpec:
    try:
        return artifact.spec_from_json(files[SPEC], f"{where}: {SPEC}")
    except FormatError:
        raise
    except UsageError as error:
        raise BundleError(str(error)) from error


def _require_manifest(spec: ArtifactSpec, found: Manifest, where: object) -> None:
    """Refuse a manifest that describes another artifact than the one beside it."""
    expected = replace(
        manifest_of({}, spec, found.licenses),
        files=found.files,  # each of which was compared when it was read
        cells=found.cells,
        default_cell=found.default_cell,
    )
    for field in fields(found):
        values = [getattr(manifest, field.name) for manifest in (found, expected)]
        if values[0] != values[1]:
            raise BundleError(
                f"{where}: {MANIFEST} and {SPEC} disagree about {field.name}; build the bundle "
                "again."
            )


def _require_cell(spec: ArtifactSpec, cell: str, entry: CellEntry, where: object) -> None:
    """Refuse a manifest that describes another cell than the one it names."""
    found = {"id": cell, "space_id": entry.space_id, "vectors": entry.vectors}
    expected = {
        "id": _identity(spec, where),
        "space_id": spec.space_id,
        "vectors": vectors_entry(spec),
    }
    for name, value in found.items():
        if value != expected[name]:
            raise BundleError(
                f"{where}: {MANIFEST} and {SPEC} disagree about its {name}; build the bundle again."
            )


def _identity(spec: ArtifactSpec, where: object) -> str:
    """Return the id of the cell that a specification is of."""
    with usable(where):
        return cell_of(spec)


def _require_cells(opened: Opened) -> None:
    """Refuse cells that cannot be put together from the entries, before any of them is."""
    path, manifest = opened.path, opened.manifest
    if (manifest.default_cell is None) != (not manifest.cells):
        raise BundleError(f"{path} names cells and a default cell only together; build it again.")
    if manifest.default_cell is None:
        return
    sizes = {name: entry.size for name, entry in manifest.files.items()}
    for cell, entry in manifest.cells.items():
        for name, file in entry.files.items():
            if name not in OF_A_CELL:
                raise BundleError(
                    f"{path}: {cell} holds {shown(name)}, which does not belong there."
                )
            require_size(name, file.size, f"{path}: {cell}")
            _require_spans(file, sizes, f"{path}: {cell}: {shown(name)}")
    default = manifest.cells.get(manifest.default_cell)
    if default is None:
        raise BundleError(f"{path} lacks its default cell; build it again.")
    if default.files != whole_files(manifest):
        raise BundleError(
            f"{path}: the files of its default cell are not its entries; build it again."
        )


def _require_spans(file: CellFile, sizes: Mapping[str, int], where: str) -> None:
    for span in file.spans:
        if span.size < 1 or span.offset + span.size > sizes.get(span.entry, 0):
            raise BundleError(
                f"{where} takes {span.size:,} bytes at {span.offset:,} of {shown(span.entry)}, "
                "which are not there; build the bundle again."
            )
    if sum(span.size for span in file.spans) != file.size:
        raise BundleError(f"{where} is not as long as its parts; build the bundle again.")
    if file.size > sum(sizes.values()):  # parts repeated without end
        raise BundleError(f"{where} is larger than the bundle; build it again.")


def whole_files(manifest: Manifest) -> dict[str, CellFile]:
    """Return the files of the default cell as the manifest must have them: each a whole entry."""
    return {
        name: CellFile(entry.sha256, entry.size, [Span(name, 0, entry.size)])
        for name, entry in manifest.files.items()
        if name != POOL
    }
