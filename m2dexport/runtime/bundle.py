"""Bundle: one file for the device, which proves there that it is whole and works."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from m2dexport.engines import Device
from m2dexport.errors import BundleError, UsageError
from m2dexport.files import atomic_file, license_files, require_file
from m2dexport.runtime import artifact, golden
from m2dexport.runtime.archive import (
    GOLDEN,
    MANIFEST,
    manifest_json,
    manifest_of,
    open_bundle,
    write_archive,
)
from m2dexport.runtime.artifact import GRAPH_FILES, RANGES, SPEC, TOKENIZER, ArtifactSpec
from m2dexport.runtime.encoder import Encoder, encoder_from_files
from m2dexport.runtime.golden import MAX_DIFFERENCE, Golden
from m2dexport.vectors.codecs import LEVELS, Ranges, ranges_from_json

__all__ = ["BundleInfo", "VerifyReport", "open_bundle", "verify_bundle", "write_bundle"]

_SHOWN = 60  # characters of a text in a message


@dataclass(frozen=True)
class BundleInfo:
    """A finished bundle."""

    path: Path
    size_bytes: int
    space_id: str
    files: tuple[str, ...]  # names of the entries, manifest.json included


@dataclass(frozen=True)
class VerifyReport:
    """What a bundle was found to be on this machine."""

    path: Path
    space_id: str
    files: int  # checked by size and sha256
    texts: int  # golden texts tokenized and, up to 1,024 tokens, run
    metric: str  # max_difference, min_cosine (decoded vectors) or min_equal_bits
    worst: float  # of all texts, each alone and in a batch
    limit: float
    reason: str  # why the limit is what it is
    equal_codes: float | None  # share of equal codes, 0..1; None for float32

    def sentence(self) -> str:
        """Return the report as one line."""
        sign = "<=" if self.metric == MAX_DIFFERENCE else ">="
        codes = "" if self.equal_codes is None else f", {self.equal_codes:.2%} of codes equal"
        return (
            f"{self.path}: {self.files} files whole, {self.texts} golden texts reproduced "
            f"({self.metric} {self.worst:.6g} {sign} {self.limit:g}{codes}), space {self.space_id}"
        )


def write_bundle(folder: Path, out: Path, *, force: bool = False) -> BundleInfo:
    """Pack an artifact folder into one file and verify it; the same inputs give the same bytes.

    The golden vectors are what the artifact itself gives, with one thread, on this machine:
    ``build`` has already compared it with the torch original.

    Args:
        folder: an artifact folder, as ``build`` makes it.
        out: the file to write, usually named ``*.m2d``.
        force: whether a file that is there is replaced.

    Raises:
        UsageError: when ``folder`` is no artifact, or ``out`` exists and is not to be replaced.
        BundleError: when the artifact's files do not belong together.

    Example:
        >>> write_bundle(Path("artifact"), Path("edge.m2d")).space_id
        'm2d1-5c0f6e1f0b3c9a7d2f4e8a6b1c3d5e7f'
    """
    require_file(out, force=force)
    spec = artifact.read_spec(folder)
    files = _artifact_files(folder, spec)
    ranges = _ranges(files)
    devices = [replace(spec.device, threads=threads) for threads in (1, 2)]
    encoders = [encoder_from_files(files, folder, device) for device in devices]
    files[GOLDEN] = golden.golden_json(*golden.golden_of(encoders[0], encoders[1], ranges))
    licenses = {
        path.name: path.read_text(encoding="utf-8", errors="replace")
        for path in license_files(folder)
    }
    files[MANIFEST] = manifest_json(files, spec, licenses)
    with atomic_file(out, force=force) as temporary:
        write_archive(temporary, files)
        _verify(open_bundle(temporary), out, devices[0])
    return BundleInfo(out, out.stat().st_size, spec.space_id, tuple(sorted(files)))


def verify_bundle(path: Path, device: Device = Device()) -> VerifyReport:
    """Check every byte of a bundle, its space_id, and its golden texts by running them here.

    Args:
        path: the bundle.
        device: what to run it on; what it leaves open is as the artifact says.

    Raises:
        UsageError: when there is no such file.
        BundleError: when anything does not match, naming what.
    """
    if not path.is_file():
        raise UsageError(f"{path} is not a bundle file; bundle makes one.")
    return _verify(open_bundle(path), path, device)


def _verify(files: Mapping[str, bytes], path: Path, device: Device) -> VerifyReport:
    encoder = encoder_from_files(files, path, device)
    ranges = _ranges(files)
    _require_one_space(encoder, files, ranges, path)
    rows, tolerance = golden.golden_from_json(files[GOLDEN])
    _require_ids(encoder, rows, path)
    found = golden.compare(encoder, rows, tolerance.metric, ranges)
    if not tolerance.holds(found.worst):
        raise BundleError(
            f"{path} does not reproduce its golden vectors on this machine: {tolerance.metric} is "
            f"{found.worst:.6g} where the limit is {tolerance.limit:g} ({tolerance.reason}) "
            "Rebuild the artifact for this device."
        )
    return VerifyReport(
        path=path,
        space_id=encoder.spec.space_id,
        files=len(files),
        texts=len(rows),
        metric=tolerance.metric,
        worst=found.worst,
        limit=tolerance.limit,
        reason=tolerance.reason,
        equal_codes=found.equal_codes,
    )


def _artifact_files(folder: Path, spec: ArtifactSpec) -> dict[str, bytes]:
    ranges = [RANGES] if spec.vectors in LEVELS else []
    names = [SPEC, TOKENIZER, *GRAPH_FILES[spec.engine], *ranges]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UsageError(f"{folder} is not an artifact: it has no {missing[0]}; build makes one.")
    return {name: (folder / name).read_bytes() for name in names}


def _ranges(files: Mapping[str, bytes]) -> Ranges | None:
    if RANGES not in files:
        return None
    try:
        return ranges_from_json(files[RANGES].decode())
    except (UsageError, UnicodeDecodeError) as error:
        raise BundleError(f"{RANGES} cannot be read: {error}") from error


def _require_one_space(
    encoder: Encoder, files: Mapping[str, bytes], ranges: Ranges | None, path: Path
) -> None:
    """Refuse files that are whole one by one and do not belong together."""
    spec = encoder.spec
    if (spec.vectors in LEVELS) != (ranges is not None):
        raise BundleError(f"{path}: {RANGES} and vectors={spec.vectors} do not go together.")
    if ranges is not None and len(ranges.low) != spec.dim:
        raise BundleError(f"{path}: {RANGES} has {len(ranges.low)} dims and the model {spec.dim}.")
    try:
        expected = artifact.space_id_of_artifact(spec, ranges, files[TOKENIZER].decode())
    except UsageError as error:
        raise BundleError(f"{path}: {error}") from error
    told = {spec.space_id, manifest_of(files, path)["space_id"]}
    if told != {expected}:
        raise BundleError(
            f"{path} tells space {' and '.join(sorted(map(str, told)))} and its content makes "
            f"{expected}: a prompt, the tokenizer or the ranges changed; build the bundle anew."
        )


def _require_ids(encoder: Encoder, rows: Sequence[Golden], path: Path) -> None:
    for row in rows:
        if encoder.tokenize([row.text], prompt=row.prompt)[0] != row.ids:
            raise BundleError(
                f"{path}: {row.text[:_SHOWN]!r} (prompt {row.prompt!r}) becomes other tokens on "
                "this machine than where the bundle was made; install the same tokenizers version."
            )
