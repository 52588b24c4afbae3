"""manifest.json: what a bundle says of itself, also for readers of that file alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

from m2dexport.errors import BundleError
from m2dexport.precisions import BitOrder, VectorPrecision
from m2dexport.runtime.artifact import ArtifactSpec, SpaceId
from m2dexport.strict import (
    Matching,
    Name,
    Sha256,
    Share,
    Within,
    parse_json,
    read_value,
    require_format,
)
from m2dexport.vectors.codecs import PER_BYTE

FORMAT = 2
MANIFEST = "manifest.json"

#: Bytes of an archive at most: of a ZIP archive without the 64-bit extension.
MOST_BYTES = (1 << 32) - 1

#: As ``cells.cell_id`` makes it.
CellId = Annotated[
    str, Matching(r"[0-9]{1,7}x[0-9]{1,7}(-[a-z0-9]{1,20}){2,8}(@[a-z0-9-]{1,40})?", "a cell's id")
]
#: A file that ``files.license_files`` finds: its text is written to a file of that name.
LicenseName = Annotated[
    str,
    Matching(
        r"(LICENSE|LICENCE|COPYING|NOTICE)([._-]?[A-Za-z0-9]){0,40}",
        "the name of a licence file, such as LICENSE,",
    ),
]
#: Bytes of manifest.json at most. A cell takes some 2,000 and 130 for each part that it shares, so
#: this is 1,000 parts for each of 64 cells.
_MOST_MANIFEST = 1 << 23
_Bytes = Annotated[int, Within(0, MOST_BYTES)]
_Time = Annotated[float, Within(0, 1e9)]
_Count = Annotated[int, Within(0, 1 << 40)]


@dataclass(frozen=True)
class FileEntry:
    """What the manifest says of a file."""

    sha256: Sha256
    size: _Bytes


@dataclass(frozen=True)
class VectorsEntry:
    """What the manifest says of the vectors, for readers that have only those."""

    precision: VectorPrecision
    dim: int
    codec: int
    bit_order: BitOrder | None  # of packed vectors; None for the others


@dataclass(frozen=True)
class CoverageEntry:
    """What the manifest says of the weights' quantization."""

    share: Share
    left_in_float32: list[Name]


@dataclass(frozen=True)
class Span:
    """A part of an entry."""

    entry: Name
    offset: _Bytes
    size: _Bytes


@dataclass(frozen=True)
class CellFile:
    """A file of a cell, which is its spans one after the other."""

    sha256: Sha256
    size: _Bytes
    spans: list[Span]


@dataclass(frozen=True)
class Figures:
    """What a profile measured of a cell, on the machine of the profile."""

    target: Name  # of the profile
    machine: Name  # its processor
    threads: _Count
    batch: _Count  # texts of what was timed
    sequence: _Count  # tokens of each
    p50_ms: _Time  # median, tokenization not included
    p95_ms: _Time
    peak_memory_bytes: _Count  # of a process that runs the cell alone
    quality: Annotated[float, Within(-100, 100)]  # mean of the tasks' main metrics, points


@dataclass(frozen=True)
class CellEntry:
    """What the manifest says of a cell of a nested bundle."""

    space_id: SpaceId
    vectors: VectorsEntry
    files: dict[Name, CellFile]
    figures: Figures | None  # None: it was not built from a profile

    @property
    def size(self) -> int:
        """Bytes of its files together."""
        return sum(file.size for file in self.files.values())


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json; outside of ``cells``, that of the default cell."""

    format: int
    space_id: SpaceId
    vectors: VectorsEntry
    files: dict[Name, FileEntry]
    coverage: CoverageEntry
    created_by: dict[Name, Name]
    licenses: dict[LicenseName, str]  # file name to text
    #: Id to cell, the default one included; empty: a plain bundle, of one cell.
    cells: Annotated[dict[CellId, CellEntry], Within(0, 64)] = field(default_factory=dict)
    #: The cell whose files are the entries of the same names; None: a plain bundle.
    default_cell: CellId | None = None

    def to_json(self) -> bytes:
        """Return the content of manifest.json: the same manifest is the same bytes."""
        text = json.dumps(asdict(self), indent=2, sort_keys=True, ensure_ascii=False)
        return f"{text}\n".encode()


def file_entry(content: bytes) -> FileEntry:
    """Return what the manifest says of a file of this content."""
    return FileEntry(hashlib.sha256(content).hexdigest(), len(content))


def vectors_entry(spec: ArtifactSpec) -> VectorsEntry:
    """Return what the manifest says of an artifact's vectors."""
    return VectorsEntry(
        precision=spec.vectors,
        dim=spec.dim,
        codec=spec.codec,
        bit_order=spec.bit_order if spec.vectors in PER_BYTE else None,
    )


def manifest_of(
    files: Mapping[str, bytes], spec: ArtifactSpec, licenses: Mapping[str, str]
) -> Manifest:
    """Return the manifest that a bundle must have; of a nested one, without its cells.

    Args:
        files: every file of the bundle; a manifest among them is left out.
        spec: the artifact's specification, for the space_id, the codec and the tool versions.
        licenses: file name (LICENSE, NOTICE) to text.
    """
    return Manifest(
        format=FORMAT,
        space_id=spec.space_id,
        vectors=vectors_entry(spec),
        files={name: file_entry(files[name]) for name in files if name != MANIFEST},
        coverage=CoverageEntry(spec.coverage, spec.left_in_float32),
        created_by=spec.provenance,
        licenses=dict(licenses),
    )


def read_manifest(files: Mapping[str, bytes], path: Path) -> Manifest:
    """Return the content of manifest.json.

    Raises:
        BundleError: when it is missing, is not a manifest, or is of another format.
    """
    if MANIFEST not in files:
        raise BundleError(f"{path} is not a bundle: it has no {MANIFEST}; bundle makes one.")
    where = f"{path}: {MANIFEST}"
    if len(files[MANIFEST]) > _MOST_MANIFEST:  # which would take long to parse
        raise BundleError(f"{where} is larger than {_MOST_MANIFEST:,} bytes; build it again.")
    stored = parse_json(files[MANIFEST], where, BundleError)
    require_format(stored, FORMAT, path, BundleError)
    return read_value(Manifest, stored, where, BundleError)
