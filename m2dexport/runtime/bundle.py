"""Bundle: one file for the device, which proves there that it is whole and works."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from m2dexport.engines import ENGINES, Device, here
from m2dexport.errors import UsageError
from m2dexport.files import SPEC, atomic_file, license_texts, require_file
from m2dexport.runtime import artifact, golden, golden_texts, spread
from m2dexport.runtime.archive import GOLDEN, write_archive
from m2dexport.runtime.artifact import RANGES, TOKENIZER, ArtifactSpec, Spoken
from m2dexport.runtime.cells import Opened, cell_of, open_cells, spaces_of_cells
from m2dexport.runtime.encoder import Encoder, encoder_from_files
from m2dexport.runtime.manifest import MANIFEST, manifest_of
from m2dexport.runtime.signing import require_signed
from m2dexport.runtime.vector_files import require_vectors_of
from m2dexport.vectors.codecs import LEVELS


@dataclass(frozen=True)
class BundleInfo:
    """A finished bundle."""

    path: Path
    size_bytes: int
    space_id: str
    speaks: Spoken | None  # the space of another encoder that its vectors are in, too
    files: tuple[str, ...]  # names of the entries, manifest.json included
    cells: tuple[str, ...]  # ids, the default one first, which is the deepest; it is said above
    #: The ids of ``cells`` that speak one space, space by space.
    spaces: tuple[tuple[str, ...], ...]

    def sentence(self) -> str:
        """Return which cells may query one index, as one line; of several cells."""
        if len(self.spaces) == 1:
            return "all cells speak one space, so one index serves them all"
        groups = " | ".join(", ".join(group) for group in self.spaces)
        return (
            f"{len(self.spaces)} spaces: {groups}; an index of one space cannot be queried by the "
            "cells of another"
        )


@dataclass(frozen=True)
class IndexReport:
    """A file of vectors that was found to be of a bundle's or an artifact's space."""

    path: Path
    count: int  # vectors
    cell: str | None  # of a nested bundle, the one whose space it is of; None: it has one cell
    space_id: str  # that the encoder has in common with it
    spoken: Spoken | None  # where that is another encoder's, which the encoder speaks; else None

    def sentence(self) -> str:
        """Return the report as one line."""
        if self.spoken is None:
            space = f"the space of {self.cell}" if self.cell else "this space"
            return f"{self.path}: {self.count} vectors of {space}"
        return (
            f"{self.path}: {self.count} vectors of space {self.space_id}, which "
            f"{self.cell or 'this encoder'} speaks ({self.spoken.layers} layers in "
            f"{self.spoken.weights}); {self.spoken.sentence()}"
        )


@dataclass(frozen=True)
class VerifyReport:
    """What a bundle, or one cell of it, was found to be on this machine."""

    path: Path
    cell: str  # id
    space_id: str
    files: int  # checked by size and sha256
    texts: int  # golden texts tokenized and, up to 1,024 tokens, run
    metric: str  # min_cosine (decoded vectors) or min_equal_bits
    worst: float  # of all texts, each by itself and in a batch
    limit: float
    reason: str  # why the limit is what it is
    equal_codes: float | None  # share of equal codes, 0..1; None for float32
    vectors: IndexReport | None  # of an index; None: none was named
    oracle: str | None  # what ran them in the place of a GPU's engine; None: nothing did
    nested: bool  # whether the cell is one of several
    signed_by: str | None = None  # the key that was named and that signed it; None: not asked
    others: tuple[VerifyReport, ...] = ()  # of the other cells

    def sentence(self) -> str:
        """Return the report as one line."""
        oracle = f", by {self.oracle} and not on a GPU" if self.oracle else ""
        where = f"{self.path}: {self.cell}" if self.nested else f"{self.path}"
        codes = "" if self.equal_codes is None else f", {self.equal_codes:.2%} of codes equal"
        signed = f", signed by the key {self.signed_by}" if self.signed_by else ""
        return (
            f"{where}: {self.files} files whole{signed}, {self.texts} golden texts reproduced "
            f"({self.metric} {self.worst:.6g} >= {self.limit:.9g}{codes}){oracle}, space "
            f"{self.space_id}"
        )

    def lines(self) -> tuple[str, ...]:
        """Return what is printed: a line per cell, and one about the vectors of an index."""
        index = [self.vectors.sentence()] if self.vectors else []
        return (self.sentence(), *(other.sentence() for other in self.others), *index)


@dataclass(frozen=True)
class ArtifactReport:
    """What an artifact folder was found to be on this machine."""

    path: Path
    space_id: str
    files: int  # that belong together
    texts: int  # run; an artifact holds no vectors to compare theirs with
    vectors: IndexReport | None  # of an index; None: none was named

    def sentence(self) -> str:
        """Return the report as one line."""
        return (
            f"{self.path}: {self.files} files that belong together, {self.texts} texts run; an "
            f"artifact has no golden texts, bundle adds them; space {self.space_id}"
        )

    def lines(self) -> tuple[str, ...]:
        """Return what is printed: the report, and a line about the vectors of an index."""
        return (self.sentence(), *([self.vectors.sentence()] if self.vectors else []))


def write_bundle(folder: str | Path, out: str | Path, *, force: bool = False) -> BundleInfo:
    """Pack an artifact folder into one file and verify it; the same inputs give the same bytes.

    The golden vectors are what the artifact itself gives, with one thread, on this machine:
    ``build`` has already compared it with the torch original.

    Args:
        folder: an artifact folder, as ``build`` makes it.
        out: the file to write, usually named ``*.m2d``.
        force: whether a file that is there is replaced.

    Raises:
        UsageError: when ``folder`` is not an artifact, or ``out`` exists and is not to be replaced.
        BundleError: when the artifact's files do not belong together.

    Example:
        >>> write_bundle(Path("artifact"), Path("edge.m2d")).space_id
        'm2d1-5c0f6e1f0b3c9a7d2f4e8a6b1c3d5e7f'
    """
    out = Path(out)
    require_file(out, force=force)
    packed = pack(Path(folder))
    manifest = manifest_of(packed.files, packed.spec, packed.licenses)
    files = {**packed.files, MANIFEST: manifest.to_json()}
    return write_verified(files, [packed], out, force=force)


@dataclass(frozen=True)
class Packed:
    """What a bundle holds of an artifact."""

    spec: ArtifactSpec
    files: Mapping[str, bytes]  # name to content, golden.json included
    licenses: Mapping[str, str]  # file name to text
    device: Device  # that gave the golden vectors

    @property
    def cell(self) -> str:
        """The id of the cell that it is."""
        return cell_of(self.spec)


def pack(folder: Path) -> Packed:
    """Return what a bundle holds of an artifact folder, after running its golden texts.

    Raises:
        UsageError: when ``folder`` is not an artifact.
        BundleError: when the artifact's files do not belong together.
    """
    spec = artifact.read_spec(folder)
    files = artifact_files(folder, spec)
    device = here(spec.engine, replace(spec.device, threads=1), elsewhere=True).device
    encoder = encoder_from_files(files, folder, device)
    files[GOLDEN] = spread.golden_of(encoder, files, folder, device).to_json()
    return Packed(spec, files, license_texts(folder), device)


def write_verified(
    files: Mapping[str, bytes], cells: Sequence[Packed], out: Path, *, force: bool
) -> BundleInfo:
    """Write a bundle and verify every cell as it is read back; else leave nothing.

    Args:
        files: the entries, name to content.
        cells: what they hold, the default cell first.
        out: the file to write.
        force: whether a file that is there is replaced.
    """
    with atomic_file(out, force=force) as temporary:
        write_archive(temporary, files)
        opened = replace(open_cells(temporary), path=out)
        for packed in cells:
            # With all threads: what they change must not be in the bytes, and must be in the limit.
            _verify(opened, packed.cell, replace(packed.device, threads=None))
    spec = cells[0].spec
    entries, ids = tuple(sorted(files)), tuple(packed.cell for packed in cells)
    size, spaces = out.stat().st_size, spaces_of_cells({each.cell: each.spec for each in cells})
    return BundleInfo(out, size, spec.space_id, spec.speaks, entries, ids, spaces)


def verify_bundle(
    path: str | Path,
    device: Device = Device(),
    vectors: Path | None = None,
    cell: str | None = None,
    key: Path | None = None,
) -> VerifyReport:
    """Check every byte of a bundle, its space_id, and its golden texts by running them here.

    Args:
        path: the bundle.
        device: what to run it on; what it leaves open is as the artifact says.
        vectors: a file of vectors of an index, which must be of the space of a verified cell.
        cell: of a nested bundle, the one to verify; None: the default one, and then all others.
        key: a file with the ed25519 public key that must have signed it; None: whatever signed it.

    Raises:
        UsageError: when there is no such file or cell, or ``vectors`` are of another space.
        BundleError: when anything is damaged or altered, naming what.
        DriftError: when it is whole and gives other tokens, vectors or neighbours here, naming the
            first of them.
        MissingExtra: when a key is named and cryptography is not installed.
    """
    return verify_opened(open_cells(Path(path)), device, vectors, cell, key)


def verify_opened(
    opened: Opened,
    device: Device = Device(),
    vectors: Path | None = None,
    cell: str | None = None,
    key: Path | None = None,
) -> VerifyReport:
    """Check a bundle whose file was read already; arguments and errors as of ``verify_bundle``."""
    signed_by = require_signed(opened.entries, key, opened.path).fingerprint if key else None
    chosen = opened.require_cell(cell)
    others = [each for each in opened.cells if cell is None and each != chosen]
    index = _index_of(opened, [chosen, *others], vectors) if vectors else None
    report = _verify(opened, chosen, device)
    return replace(
        report,
        vectors=index,
        signed_by=signed_by,
        others=tuple(_verify(opened, each, device) for each in others),
    )


def verify_artifact(
    folder: Path, device: Device = Device(), vectors: Path | None = None
) -> ArtifactReport:
    """Check what can be checked of an artifact folder, which has no golden texts.

    That is its files, its graph, its tokenizer, its ranges and its space_id, and that texts run.

    Args:
        folder: the artifact.
        device: what to run it on; what it leaves open is as the artifact says.
        vectors: a file of vectors of an index, which must be of the artifact's space.

    Raises:
        UsageError: when ``folder`` is not an artifact, or ``vectors`` are of another space.
        BundleError: when its files do not belong together.
        M2DError: when it does not run.
    """
    files = artifact_files(folder, artifact.read_spec(folder))
    encoder = encoder_from_files(files, folder, device)
    texts = len(encoder.encode(golden_texts.TEXTS))
    index = _index_report(vectors, encoder.spec, folder) if vectors else None
    return ArtifactReport(folder, encoder.spec.space_id, len(files), texts, index)


def _oracle_of(encoder: Encoder) -> str | None:
    """Return what runs a graph that is for a GPU without one, None for all other graphs."""
    if encoder.on_gpu or not ENGINES[encoder.spec.engine].on_gpu:
        return None
    return encoder.describe()["engine"]


def _verify(opened: Opened, cell: str, device: Device) -> VerifyReport:
    files, path = opened.files(cell), opened.path
    where = opened.name_of(cell)
    encoder = encoder_from_files(files, path, device, where=where)
    stored, found = golden.require_golden(encoder, files[GOLDEN], where)
    return VerifyReport(
        path=path,
        cell=cell,
        space_id=encoder.spec.space_id,
        files=len(files) if opened.nested else len(opened.entries),
        texts=len(stored.texts),
        metric=stored.tolerance.metric,
        worst=found.worst,
        limit=stored.tolerance.limit,
        reason=stored.tolerance.reason,
        equal_codes=found.equal_codes,
        oracle=_oracle_of(encoder),
        vectors=None,
        nested=opened.nested,
    )


def _index_of(opened: Opened, cells: Sequence[str], vectors: Path) -> IndexReport:
    """Return what a file of vectors is to the first of the cells whose space it is of."""
    reasons = []
    for cell in cells:
        try:
            report = _index_report(vectors, opened.spec(cell), opened.name_of(cell))
            return replace(report, cell=cell if opened.nested else None)
        except UsageError as error:
            reasons.append(error)
    raise reasons[0]


def _index_report(vectors: Path, spec: ArtifactSpec, name: object) -> IndexReport:
    count, space = require_vectors_of(vectors, spec, name)
    spoken = spec.speaks if space != spec.space_id else None
    return IndexReport(vectors, count, None, space, spoken)


def artifact_files(folder: Path, spec: ArtifactSpec) -> dict[str, bytes]:
    """Return the files of an artifact folder that a bundle holds, name to content.

    Args:
        folder: the artifact.
        spec: its specification.

    Raises:
        UsageError: when one of them is missing.
    """
    ranges = [RANGES] if spec.vectors in LEVELS else []
    names = [SPEC, TOKENIZER, *artifact.graph_names(spec.engine, folder), *ranges]
    for name in names:
        artifact.require_part(folder, name)
    parts = {name: artifact.read_file(folder, name) for name in names}
    return parts | artifact.settings_in(folder)
