"""From a profile's cell to the bundle that deploys it."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from m2dexport.build.build import build_artifact
from m2dexport.build.recipe import Recipe
from m2dexport.checkpoint.open import open_checkpoint, weights_sha256
from m2dexport.data import calibration_texts, texts_sha256
from m2dexport.errors import UsageError
from m2dexport.files import require_new
from m2dexport.profile.manifest import read_profile
from m2dexport.runtime.bundle import BundleInfo, write_bundle


def bundle_cell(
    profile_path: Path,
    cell_id: str,
    out: Path,
    *,
    model: str | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    calibration: Sequence[str] | None = None,
) -> BundleInfo:
    """Build the artifact of one cell of a profile, and pack it.

    Args:
        profile_path: a profile.json.
        cell_id: such as "4x128-int8-int8"; ``select`` names one.
        out: the bundle to write; it must not exist.
        model: where the checkpoint that was profiled is now; None: where it was.
        allow_pickle: as for ``open_checkpoint``; a profile does not grant it.
        trust_remote_code: likewise.
        calibration: the texts that the profile was calibrated with; None: the shipped ones.

    Raises:
        UsageError: when the profile has no such cell, the checkpoint that it measured is gone or
            has changed since, or its calibration texts were others.
        ParityError: when the artifact does not reproduce the torch original.
    """
    require_new(out)
    profile = read_profile(profile_path)
    cell = profile.cell(cell_id)
    named = model or profile.checkpoint.model
    trained = profile.checkpoint.trained
    checkpoint = open_checkpoint(
        named,
        allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code,
        pooling=profile.checkpoint.pooling,
        trained=",".join(f"{n}:{d}" for n, d in trained) if trained else None,
    )
    if weights_sha256(checkpoint) != profile.checkpoint.sha256:
        raise UsageError(
            f"the weights of {named or 'the shipped checkpoint'} are not those that "
            f"{profile_path} measured; profile again."
        )
    if texts_sha256(calibration or calibration_texts()) != profile.calibration_sha256:
        raise UsageError(
            f"{profile_path} was calibrated with other texts; name the same file by --calibration."
        )
    with tempfile.TemporaryDirectory(prefix="m2dexport-") as scratch:
        artifact = build_artifact(
            checkpoint,
            cell.layers,
            cell.dim,
            Path(scratch) / "artifact",
            Recipe(
                weights=cell.weights,
                vectors=cell.vectors,
                calibration=calibration,
                allow_batch_dependent="batch_dependent" in cell.flags,
            ),
            engine=cell.engine,
        )
        return write_bundle(artifact.path, out)
