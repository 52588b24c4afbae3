"""From a profile's cell to the bundle that deploys it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from m2dexport.align.texts import sha256_of_texts, texts_or_shipped
from m2dexport.build.aligned import build_aligned
from m2dexport.build.build import build_artifact
from m2dexport.build.recipe import Recipe
from m2dexport.checkpoint.open import Checkpoint, open_checkpoint
from m2dexport.data import calibration_texts, texts_sha256
from m2dexport.engines import ENGINES, Compilation, Device
from m2dexport.errors import UsageError, one_line
from m2dexport.files import require_file, scratch_folder
from m2dexport.precisions import BitOrder, WeightPrecision
from m2dexport.profile.identity import model_sha256
from m2dexport.profile.schema import Cell, Profile
from m2dexport.profile.select import needs_consent
from m2dexport.progress import OnProgress, one_step
from m2dexport.runtime.artifact import Loss
from m2dexport.runtime.bundle import BundleInfo
from m2dexport.runtime.index import Index, read_index
from m2dexport.runtime.manifest import Figures
from m2dexport.runtime.packing import write_nested

_PACK = "pack and verify"


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
    if model is None and named is not None and "/" in named and not Path(named).exists():
        raise UsageError(
            f"the profile measured {named}, which is not there from here; say where that "
            "checkpoint is by --model."
        )
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
    if model_sha256(checkpoint) != profile.checkpoint.model_sha256:
        raise UsageError(
            f"{named or 'the shipped checkpoint'} has the weights that the profile measured, and "
            "another configuration, tokenizer, pooling, head, prompts or maximum length; profile "
            "again."
        )
    return checkpoint


@dataclass(frozen=True)
class Deployment:
    """What must be the same as when a profile was made, and what it does not know."""

    calibration: Sequence[str] | None = None  # the profile's; None: the shipped texts
    align_texts: Iterable[str] | None = None  # likewise, of aligned cells
    bit_order: BitOrder = "big"  # where the first dim of a packed byte goes
    index: Index | None = None  # what wrote the index that the bundle is to query
    elsewhere: bool = False  # the device may be another machine's
    compilation: Compilation = Compilation()  # of an engine for a GPU; no shapes: the profile's
    device: Device | None = None  # what the bundle runs on; None: what the cell was measured on
    target: str | None = None  # of the profile, that the cell is of; None: the first
    allow_batch_dependent: bool = False  # a text's vector may depend on the texts beside it


def bundle_cell(
    profile: Profile,
    cell_id: str,
    checkpoint: Checkpoint,
    out: str | Path,
    deployment: Deployment = Deployment(),
    on_progress: OnProgress = lambda *_: None,
    *,
    force: bool = False,
) -> BundleInfo:
    """Build the artifact of one cell of a profile as it was measured, and pack it.

    Engine, precisions and the processors that int8 is made for are the cell's, and so is the device
    unless the deployment names another. The bundle says what the profile measured of it; one that
    speaks the full model's space carries the loss that the profile measured there.

    Args:
        profile: the profile.
        cell_id: such as "6x128-int8-int8"; ``select`` names one.
        checkpoint: what was profiled, from ``open_profiled``.
        out: the bundle to write.
        deployment: the texts that the profile was made with, bit order and index.
        on_progress: called at every step.
        force: whether a file at ``out`` is replaced.

    Raises:
        UsageError: when the profile has no such cell, its vectors depend on the batch and the
            deployment does not allow that, its texts were others, or the index is not of the full
            model at this dim.
        ParityError: when the artifact does not reproduce the torch original.
    """
    return bundle_cells(profile, [cell_id], checkpoint, out, deployment, on_progress, force=force)


def bundle_cells(
    profile: Profile,
    cell_ids: Sequence[str],
    checkpoint: Checkpoint,
    out: str | Path,
    deployment: Deployment = Deployment(),
    on_progress: OnProgress = lambda *_: None,
    *,
    force: bool = False,
) -> BundleInfo:
    """Build the artifacts of cells as ``bundle_cell`` does, and pack them into one file.

    An aligned cell speaks the space of the cell of the full depth that has its codes, if that is
    among them and the deployment names no other index. The bundle says what the profile measured of
    each cell; the deepest is its default, of several as deep the first.

    Args:
        profile: the profile.
        cell_ids: such as "6x128-int8-int8" and "2x128-aligned-int8-int8".
        checkpoint: what was profiled, from ``open_profiled``.
        out: the bundle to write.
        deployment: as for ``bundle_cell``; an index is that of all cells.
        on_progress: called at every step, one per cell and one for packing them.
        force: whether a file at ``out`` is replaced.

    Raises:
        UsageError: as ``bundle_cell``, or when a cell is named twice.
        ParityError: likewise.
    """
    require_file(Path(out), force=force)
    for cell_id in cell_ids:
        if cell_ids.count(cell_id) > 1:
            raise UsageError(f"the cell {cell_id} is named twice; name each once.")
    cells = [_deployable(profile, cell_id, deployment) for cell_id in cell_ids]
    folders: dict[str, Path] = {}
    with scratch_folder() as scratch:
        for cell in sorted(cells, key=lambda cell: cell.align == "full"):
            index = deployment.index
            if cell.align == "full" and index is None:
                index = _index_among(profile, cells, cell, folders)
            folders[cell.id] = scratch / cell.id
            chosen = replace(deployment, index=index)
            _build(profile, cell, checkpoint, folders[cell.id], chosen, on_progress)
        figures = {cell.id: _figures(profile, cell) for cell in cells}
        with one_step(on_progress, _PACK):
            return write_nested([folders[cell.id] for cell in cells], out, figures, force=force)


def _deployable(profile: Profile, cell_id: str, deployment: Deployment) -> Cell:
    """Return a cell of a profile that the deployment allows, and whose texts it has."""
    cell = profile.cell(cell_id, deployment.target)
    if needs_consent(cell) and not deployment.allow_batch_dependent:
        raise UsageError(
            f"with {cell_id}, a text's vector depends on the texts beside it; accept that by "
            "--allow-batch-dependent, or let select name another cell."
        )
    _require_texts(profile, cell, deployment)
    return cell


def _build(
    profile: Profile,
    cell: Cell,
    checkpoint: Checkpoint,
    folder: Path,
    deployment: Deployment,
    on_progress: OnProgress,
) -> None:
    recipe = _recipe(profile, cell, deployment)
    build = build_aligned if cell.align == "full" else build_artifact

    def inside(step: str, done: int, total: int) -> None:
        on_progress(f"{cell.id}: {step}", done, total)

    with one_step(on_progress, f"build {cell.id}"):
        build(checkpoint, cell.layers, cell.dim, folder, recipe, inside)


def _index_among(
    profile: Profile, cells: Sequence[Cell], query: Cell, folders: dict[str, Path]
) -> Index | None:
    """Return what writes the index that an aligned cell is to query, if it was built, too."""
    wanted = (profile.checkpoint.layers, query.dim, query.vectors, "none")
    for cell in cells:
        if (cell.layers, cell.dim, cell.vectors, cell.align) == wanted:
            return replace(read_index(folders[cell.id]), name=cell.id)
    return None


def _figures(profile: Profile, cell: Cell) -> Figures:
    first = cell.latency[0]
    return Figures(
        target=cell.target,
        machine=one_line(profile.target(cell.target).machine.cpu) or "unknown",
        threads=cell.device.threads,
        batch=first.batch,
        sequence=first.sequence,
        p50_ms=cell.p50_ms,
        p95_ms=cell.p95_ms,
        peak_memory_bytes=cell.peak_memory_bytes,
        quality=cell.mean_quality,
    )


def _recipe(profile: Profile, cell: Cell, deployment: Deployment) -> Recipe:
    return Recipe(
        engine=cell.engine,
        device=deployment.device or Device(**cell.device.model_dump()),
        weights=cell.weights,
        isa=cell.isa,
        vectors=cell.vectors,
        bit_order=deployment.bit_order,
        calibration=deployment.calibration,
        allow_batch_dependent=deployment.allow_batch_dependent,
        align_texts=deployment.align_texts,
        index=deployment.index,
        losses=_losses(profile, cell),
        elsewhere=deployment.elsewhere,
        compilation=_compilation(cell, deployment.compilation),
    )


def _compilation(cell: Cell, named: Compilation) -> Compilation:
    """Return what an engine is compiled for, whose shapes are those that were timed."""
    if not ENGINES[cell.engine].on_gpu:
        return Compilation()
    shapes = tuple((point.batch, point.sequence) for point in cell.latency)
    return replace(named, shapes=named.shapes or shapes)


def _require_texts(profile: Profile, cell: Cell, deployment: Deployment) -> None:
    given = deployment.calibration
    texts = calibration_texts() if given is None else given
    if texts_sha256(texts) != profile.calibration_sha256:
        raise UsageError(
            "the profile was calibrated with other texts; name the same file by --calibration."
        )
    fitted = profile.aligned_with
    if cell.align == "full" and (
        fitted is None or sha256_of_texts(texts_or_shipped(deployment.align_texts)) != fitted.sha256
    ):
        raise UsageError(
            "the profile was aligned on other texts; name the same file by --align-texts."
        )


def _losses(profile: Profile, cell: Cell) -> dict[WeightPrecision, dict[str, Loss]]:
    """Return weights of an index -> what the cell's queries find there, by metric."""
    return {
        wrote.weights: {
            metric: Loss(points, wrote.quality[metric]) for metric, points in found.items()
        }
        for index, found in cell.as_query.items()
        if (wrote := profile.cell(index, cell.target))
    }
