"""What a bundle is, and what two bundles differ in, without running them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m2dexport.files import SPEC
from m2dexport.runtime import golden
from m2dexport.runtime.archive import GOLDEN, SIGNATURE, UNLISTED
from m2dexport.runtime.artifact import Spoken
from m2dexport.runtime.cells import Opened, agreed_spec, open_cells
from m2dexport.runtime.manifest import MANIFEST, CellEntry, Figures
from m2dexport.runtime.signing import read_signature
from m2dexport.runtime.tolerance import Metric

_NONE = "none"


@dataclass(frozen=True)
class ShownCell:
    """One cell of a bundle."""

    id: str
    space_id: str
    speaks: Spoken | None  # the space of another encoder that its vectors are in, too
    engine: str
    min_engine: str  # the oldest version of it that runs the graph
    layers: int
    dim: int
    weights: str
    vectors: str
    max_length: int  # tokens
    prompts: tuple[str, ...]  # names
    size_bytes: int  # of its files
    own_bytes: int  # of those, what no other cell has: without it, the bundle would lack them
    metric: Metric  # that its golden vectors are compared by
    limit: float  # of that
    figures: Figures | None  # that a profile measured; None: it was not built from one


@dataclass(frozen=True)
class Shown:
    """What a bundle says it is; its bytes are those that it lists, and nothing was run."""

    path: Path
    format: int
    size_bytes: int
    default_cell: str
    cells: tuple[ShownCell, ...]  # the deepest first
    files: Mapping[str, int]  # entries, name to bytes
    licenses: tuple[str, ...]  # names of files
    signed_by: str | None  # the key, which is not checked here; None: it has no signature
    created_by: Mapping[str, str]  # hashes and versions of tools, of the default cell


@dataclass(frozen=True)
class Difference:
    """One thing that two bundles differ in, as text; "none" where one of them lacks it."""

    what: str
    first: str
    second: str


@dataclass(frozen=True)
class Differences:
    """What two bundles differ in."""

    only_in_first: tuple[str, ...]  # ids of cells, of which nothing else is said
    only_in_second: tuple[str, ...]
    facts: tuple[Difference, ...]  # of the bundles, and of the cells that both have

    @property
    def same(self) -> bool:
        """Whether there are none: the bundles are the same bytes."""
        return not (self.only_in_first or self.only_in_second or self.facts)


def show_bundle(path: str | Path) -> Shown:
    """Return what a bundle is, after checking each byte.

    Raises:
        UsageError: when there is no such file.
        BundleError: when it is damaged, or says what cannot be.
    """
    opened = open_cells(Path(path))
    manifest = opened.manifest
    files = {name: len(content) for name, content in opened.entries.items()}
    own = _own_bytes(opened)
    return Shown(
        path=opened.path,
        format=manifest.format,
        size_bytes=opened.path.stat().st_size,
        default_cell=opened.default,
        cells=tuple(_shown_cell(opened, cell, own[cell]) for cell in opened.cells),
        files=dict(sorted(files.items())),
        licenses=tuple(sorted(manifest.licenses)),
        signed_by=_signed_by(opened),
        created_by=manifest.created_by,
    )


def _signed_by(opened: Opened) -> str | None:
    content = opened.entries.get(SIGNATURE)
    if content is None:
        return None
    return read_signature(content, f"{opened.path}: {SIGNATURE}").fingerprint


def _shown_cell(opened: Opened, cell: str, own_bytes: int) -> ShownCell:
    files = opened.files(cell)
    spec = agreed_spec(files, opened.name_of(cell))
    tolerance = golden.golden_from_json(
        files[GOLDEN], spec, f"{opened.name_of(cell)}: {GOLDEN}"
    ).tolerance
    entry = opened.manifest.cells.get(cell)
    return ShownCell(
        id=cell,
        space_id=spec.space_id,
        speaks=spec.speaks,
        engine=spec.engine,
        min_engine=spec.min_engine,
        layers=spec.layers,
        dim=spec.dim,
        weights=spec.weights,
        vectors=spec.vectors,
        max_length=spec.max_length,
        prompts=tuple(sorted(spec.prompts)),
        size_bytes=opened.size_of(cell),
        own_bytes=own_bytes,
        metric=tolerance.metric,
        limit=tolerance.limit,
        figures=entry.figures if entry else None,
    )


def _own_bytes(opened: Opened) -> dict[str, int]:
    """Return how many bytes of the entries belong to each cell alone."""
    if not opened.manifest.cells:
        return {opened.default: opened.size_of(opened.default)}
    own = dict.fromkeys(opened.manifest.cells, 0)
    for name in opened.entries:
        spans = [_spans_in(name, each) for each in opened.manifest.cells.values()]
        cuts = np.unique(np.concatenate(spans))
        held = np.zeros((len(spans), max(0, len(cuts) - 1)), bool)  # (cells, parts between cuts)
        for row, each in zip(held, spans, strict=True):
            for first, last in np.searchsorted(cuts, each):
                row[first:last] = True
        alone = held & (held.sum(axis=0) == 1)
        for cell, row in zip(own, alone, strict=True):
            own[cell] += int(np.diff(cuts)[row].sum())
    return own


def _spans_in(name: str, cell: CellEntry) -> NDArray[np.int64]:
    """Return where the spans of a cell in one entry begin and end, (spans, 2)."""
    found = [
        (span.offset, span.offset + span.size)
        for file in cell.files.values()
        for span in file.spans
        if span.entry == name
    ]
    return np.array(found, dtype=np.int64).reshape(-1, 2)


def differences(first: str | Path, second: str | Path) -> Differences:
    """Return what two bundles differ in.

    Of two bundles of one cell, that of each is compared, whatever its id; of nested ones, cells
    of one id.

    Raises:
        UsageError: when there is no such file.
        BundleError: when one is damaged.
    """
    pair = open_cells(Path(first)), open_cells(Path(second))
    if pair[0].entries == pair[1].entries:
        return Differences((), (), ())
    plain = not any(each.nested for each in pair)
    common = {cell for cell in pair[0].cells if cell in pair[1].cells}
    only = [() if plain else tuple(c for c in each.cells if c not in common) for each in pair]
    facts = [dict(_facts(each, None if plain else common)) for each in pair]
    names = dict.fromkeys([*facts[0], *facts[1]])
    both = [Difference(name, *(fact.get(name, _NONE) for fact in facts)) for name in names]
    found = tuple(each for each in both if each.first != each.second)
    if not found:
        found = (Difference(MANIFEST, *(_digest(each.entries[MANIFEST]) for each in pair)),)
    return Differences(only[0], only[1], found)


def _facts(opened: Opened, cells: Collection[str] | None) -> Iterator[tuple[str, str]]:
    """Yield what a bundle can differ from another in, by name.

    Args:
        opened: the bundle.
        cells: the ids of the cells to tell of; None: of a bundle of one cell, that one.
    """
    manifest = opened.manifest
    yield "bytes", f"{opened.path.stat().st_size:,}"
    yield "default cell", opened.default
    for cell in opened.cells if cells is None else [c for c in opened.cells if c in cells]:
        before = "" if cells is None else f"{cell}: "
        files, entry = opened.files(cell), manifest.cells.get(cell)
        for field, value in _flat(asdict(agreed_spec(files, opened.name_of(cell)))):
            yield f"{before}{field}", value
        for name in sorted(files):
            if name != SPEC:
                yield f"{before}{name}", _digest(files[name])
        for field, value in _flat(asdict(entry.figures) if entry and entry.figures else {}):
            yield f"{before}figures.{field}", value
    for name in sorted(manifest.licenses):
        yield f"licence {name}", _digest(manifest.licenses[name].encode())
    for name in sorted(UNLISTED.intersection(opened.entries) - {MANIFEST}):
        yield name, _digest(opened.entries[name])


def _digest(content: bytes) -> str:
    return f"{len(content):,} bytes, sha256 {hashlib.sha256(content).hexdigest()[:12]}"


def _flat(value: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    """Yield the values of nested objects by dotted names; lists as JSON."""
    for key, each in value.items():
        if isinstance(each, dict) and each:
            yield from _flat(each, f"{before}{key}.")
        else:
            yield f"{before}{key}", each if isinstance(each, str) else json.dumps(each, default=str)
