"""From a profile's cell to the bundle that deploys it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from m2dexport.build.build import build_artifact
from m2dexport.build.recipe import Recipe
from m2dexport.checkpoint.open import Checkpoint, open_checkpoint
from m2dexport.data import calibration_texts, texts_sha256
from m2dexport.engines import Device
from m2dexport.errors import UsageError
from m2dexport.files import require_file, scratch_folder
from m2dexport.precisions import BitOrder
from m2dexport.profile.schema import Profile
from m2dexport.runtime.bundle import BundleInfo, write_bundle


def open_profiled(
    profile: Profile,
    model: str | None = None,
    *,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> Checkpoint:
    """Return the checkpoint that a profile measured.

    Args:
        profile: the profile.
        model: where the checkpoint is now; None: where it was.
        allow_pickle: as for ``open_checkpoint``; a profile does not grant it.
        trust_remote_code: likewise.

    Raises:
        UsageError: when it is gone or has changed since.
    """
    named, trained = model or profile.checkpoint.model, profile.checkpoint.trained
    checkpoint = open_checkpoint(
        named,
        allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code,
        pooling=profile.checkpoint.pooling,
        trained=",".join(f"{n}:{d}" for n, d in trained) if trained else None,
    )
    if checkpoint.weights_sha256 != profile.checkpoint.sha256:
        raise UsageError(
            f"the weights of {named or 'the shipped checkpoint'} are not those that the profile "
            "measured; profile again."
        )
    return checkpoint


def bundle_cell(
    profile: Profile,
    cell_id: str,
    checkpoint: Checkpoint,
    out: str | Path,
    *,
    calibration: Sequence[str] | None = None,
    bit_order: BitOrder = "big",
    force: bool = False,
) -> BundleInfo:
    """Build the artifact of one cell of a profile as it was measured, and pack it.

    Engine, device, precisions and the processors that int8 is made for are the cell's.

    Args:
        profile: the profile.
        cell_id: such as "6x128-int8-int8"; ``select`` names one.
        checkpoint: what was profiled, from ``open_profiled``.
        out: the bundle to write.
        calibration: the texts that the profile was calibrated with; None: the shipped ones.
        bit_order: where the first dim of a packed byte goes; it does not change quality.
        force: whether a file at ``out`` is replaced.

    Raises:
        UsageError: when the profile has no such cell, or its calibration texts were others.
        ParityError: when the artifact does not reproduce the torch original.
    """
    out = Path(out)
    require_file(out, force=force)
    cell = profile.cell(cell_id)
    texts = calibration_texts() if calibration is None else calibration
    if texts_sha256(texts) != profile.calibration_sha256:
        raise UsageError(
            "the profile was calibrated with other texts; name the same file by --calibration."
        )
    recipe = Recipe(
        engine=cell.engine,
        device=Device(cell.device.provider, cell.device.threads, cell.device.spin),
        weights=cell.weights,
        isa=cell.isa,
        vectors=cell.vectors,
        bit_order=bit_order,
        calibration=calibration,
        allow_batch_dependent="batch_dependent" in cell.flags,
    )
    with scratch_folder() as scratch:
        folder = scratch / "artifact"
        build_artifact(checkpoint, cell.layers, cell.dim, folder, recipe)
        return write_bundle(folder, out, force=force)
