"""Bundle: one file for the device, which proves there that it is whole and works."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m2dexport.engines import ENGINES, Device, here
from m2dexport.errors import BundleError, UsageError
from m2dexport.files import SPEC, atomic_file, license_files, require_file
from m2dexport.runtime import artifact, golden, golden_texts, spread
from m2dexport.runtime.archive import (
    GOLDEN,
    MANIFEST,
    manifest_of,
    open_bundle,
    read_manifest,
    write_archive,
)
from m2dexport.runtime.artifact import RANGES, TOKENIZER, ArtifactSpec, Spoken
from m2dexport.runtime.encoder import Encoder, encoder_from_files
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


@dataclass(frozen=True)
class IndexReport:
    """A file of vectors that was found to be of a bundle's or an artifact's space."""

    path: Path
    count: int  # vectors
    space_id: str  # that the encoder has in common with it
    spoken: Spoken | None  # where that is another encoder's, which the encoder speaks; else None

    def sentence(self) -> str:
        """Return the report as one line."""
        if self.spoken is None:
            return f"{self.path}: {self.count} vectors of this space"
        return (
            f"{self.path}: {self.count} vectors of space {self.space_id}, which this encoder "
            f"speaks ({self.spoken.layers} layers in {self.spoken.weights}); "
            f"{self.spoken.sentence()}"
        )


@dataclass(frozen=True)
class VerifyReport:
    """What a bundle was found to be on this machine."""

    path: Path
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

    def sentence(self) -> str:
        """Return the report as one line."""
        oracle = f", by {self.oracle} and not on a GPU" if self.oracle else ""
        codes = "" if self.equal_codes is None else f", {self.equal_codes:.2%} of codes equal"
        return (
            f"{self.path}: {self.files} files whole, {self.texts} golden texts reproduced "
            f"({self.metric} {self.worst:.6g} >= {self.limit:.9g}{codes}){oracle}, space "
            f"{self.space_id}"
        )


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
    folder, out = Path(folder), Path(out)
    require_file(out, force=force)
    spec = artifact.read_spec(folder)
    files = _artifact_files(folder, spec)
    device = here(spec.engine, replace(spec.device, threads=1), elsewhere=True).device
    encoder = encoder_from_files(files, folder, device)
    files[GOLDEN] = spread.golden_of(encoder, files, folder, device).to_json()
    licenses = {
        path.name: path.read_text(encoding="utf-8", errors="replace")
        for path in license_files(folder)
    }
    files[MANIFEST] = manifest_of(files, spec, licenses).to_json()
    with atomic_file(out, force=force) as temporary:
        write_archive(temporary, files)
        # With all threads: what they change must not be in the bytes, and must be in the limit.
        _verify(open_bundle(temporary), out, replace(device, threads=None))
    return BundleInfo(out, out.stat().st_size, spec.space_id, spec.speaks, tuple(sorted(files)))


def verify_bundle(
    path: str | Path, device: Device = Device(), vectors: Path | None = None
) -> VerifyReport:
    """Check every byte of a bundle, its space_id, and its golden texts by running them here.

    Args:
        path: the bundle.
        device: what to run it on; what it leaves open is as the artifact says.
        vectors: a .npy or .jsonl file of an index, whose vectors must be of the bundle's space.

    Raises:
        UsageError: when there is no such file, or ``vectors`` are of another space.
        BundleError: when anything is damaged or altered, naming what.
        DriftError: when it is whole and gives other tokens, vectors or neighbours here, naming the
            first of them.
    """
    path = Path(path)
    return _verify(open_bundle(path), path, device, vectors)


def verify_artifact(
    folder: Path, device: Device = Device(), vectors: Path | None = None
) -> ArtifactReport:
    """Check what can be checked of an artifact folder, which has no golden texts.

    That is its files, its graph, its tokenizer, its ranges and its space_id, and that texts run.

    Args:
        folder: the artifact.
        device: what to run it on; what it leaves open is as the artifact says.
        vectors: a .npy or .jsonl file of an index, whose vectors must be of the artifact's space.

    Raises:
        UsageError: when ``folder`` is not an artifact, or ``vectors`` are of another space.
        BundleError: when its files do not belong together.
        M2DError: when it does not run.
    """
    files = _artifact_files(folder, artifact.read_spec(folder))
    encoder = encoder_from_files(files, folder, device)
    _require_one_space(encoder, files, folder)
    texts = len(encoder.encode(golden_texts.TEXTS))
    index = _index_report(vectors, encoder.spec, folder)
    return ArtifactReport(folder, encoder.spec.space_id, len(files), texts, index)


def _oracle_of(encoder: Encoder) -> str | None:
    """Return what runs a graph that is for a GPU without one, None for all other graphs."""
    if encoder.on_gpu or not ENGINES[encoder.spec.engine].on_gpu:
        return None
    return encoder.describe()["engine"]


def _verify(
    files: Mapping[str, bytes], path: Path, device: Device, vectors: Path | None = None
) -> VerifyReport:
    encoder = encoder_from_files(files, path, device)
    _require_one_space(encoder, files, path)
    _require_manifest(encoder, files, path)
    stored, found = golden.require_golden(encoder, files[GOLDEN], path)
    return VerifyReport(
        path=path,
        space_id=encoder.spec.space_id,
        files=len(files),
        texts=len(stored.texts),
        metric=stored.tolerance.metric,
        worst=found.worst,
        limit=stored.tolerance.limit,
        reason=stored.tolerance.reason,
        equal_codes=found.equal_codes,
        oracle=_oracle_of(encoder),
        vectors=_index_report(vectors, encoder.spec, path),
    )


def _index_report(vectors: Path | None, spec: ArtifactSpec, path: Path) -> IndexReport | None:
    if vectors is None:
        return None
    count, space = require_vectors_of(vectors, spec, path)
    spoken = spec.speaks if space != spec.space_id else None
    return IndexReport(vectors, count, space, spoken)


def _artifact_files(folder: Path, spec: ArtifactSpec) -> dict[str, bytes]:
    ranges = [RANGES] if spec.vectors in LEVELS else []
    names = [SPEC, TOKENIZER, *artifact.graph_names(spec.engine, folder), *ranges]
    for name in names:
        artifact.require_part(folder, name)
    return {name: artifact.read_file(folder, name) for name in names}


def _require_one_space(encoder: Encoder, files: Mapping[str, bytes], path: Path) -> None:
    """Refuse files that are whole one by one and do not belong together."""
    spec, ranges = encoder.spec, encoder.ranges
    if (spec.vectors in LEVELS) != (ranges is not None):
        raise BundleError(f"{path}: {RANGES} and vectors={spec.vectors} do not go together.")
    if ranges is not None and len(ranges.low) != spec.dim:
        raise BundleError(f"{path}: {RANGES} has {len(ranges.low)} dims and the model {spec.dim}.")
    try:
        expected = artifact.space_id_of_artifact(spec, ranges, files[TOKENIZER].decode())
    except UsageError as error:
        raise BundleError(f"{path}: {error}") from error
    if spec.space_id != expected:
        raise BundleError(
            f"{path} is of space {spec.space_id} by its {SPEC}, and its content makes {expected}: "
            "a prompt, the tokenizer or the ranges changed; build it again."
        )
    for name, values in _expected_ranges(encoder).items():
        if not np.array_equal(encoder.graph_ranges.get(name, ()), values):
            raise BundleError(
                f"{path}: {RANGES} does not hold the ranges that the graph codes with ({name}); "
                "build it again."
            )


def _expected_ranges(encoder: Encoder) -> dict[str, NDArray[Any]]:
    """Return what the graph must code with, float32 (dim,), by its names there."""
    ranges = encoder.ranges
    if ranges is None or not ENGINES[encoder.spec.engine].encodes:
        return {}
    return {"range_low": ranges.low, "range_step": ranges.step(encoder.spec.vectors)}


def _require_manifest(encoder: Encoder, files: Mapping[str, bytes], path: Path) -> None:
    """Refuse a manifest that describes another artifact than the one beside it."""
    found = read_manifest(files, path)
    expected = manifest_of(files, encoder.spec, found.licenses)
    for field in fields(found):
        values = [getattr(manifest, field.name) for manifest in (found, expected)]
        if values[0] != values[1]:
            raise BundleError(
                f"{path}: {MANIFEST} and {SPEC} disagree about {field.name}; build the bundle "
                "again."
            )
