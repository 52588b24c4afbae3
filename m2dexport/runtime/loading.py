"""Load a bundle, one of its cells, or an artifact folder, ready to encode."""

from __future__ import annotations

import logging
from pathlib import Path

import tokenizers

from m2dexport.engines import Device
from m2dexport.errors import UsageError
from m2dexport.runtime import artifact, golden
from m2dexport.runtime.archive import GOLDEN
from m2dexport.runtime.cells import Opened, cell_of, open_cells, unknown_cell
from m2dexport.runtime.encoder import (
    Encoder,
    decoded,
    encoder_from_files,
    keeping_engines,
)
from m2dexport.runtime.one_space import require_one_space, require_ranges_of_graph

_LOG = logging.getLogger(__name__)


def load(
    path: str | Path,
    device: Device = Device(),
    cell: str | None = None,
    *,
    budget_ms: float | None = None,
    max_mb: float | None = None,
) -> Encoder:
    """Load a bundle (a .m2d archive) or an artifact folder.

    Of a nested bundle, limits choose the deepest cell that is within them by what the bundle says,
    and a line of the log says why; ``Nested.within`` measures instead.

    Args:
        path: the archive or the folder.
        device: what to run it on; what it leaves open is as the artifact says.
        cell: the id of a cell; None: the bundle's default, than which none is deeper.
        budget_ms: milliseconds at most of the median that the profile measured, on its machine.
        max_mb: size at most of the cell's files, in 10^6 bytes.

    Raises:
        UsageError: when there is nothing there, the folder is not an artifact, there is no such
            cell, or none is within the limits.
        BundleError: when the archive is damaged or does not match its checksums, or files do not
            belong together.
        DriftError: when an engine that was built for this machine's GPU does not give the golden
            vectors.

    Example:
        >>> load("edge.m2d").encode(["A man is playing a guitar."]).shape
        (1, 128)
    """
    path = Path(path)
    limited = budget_ms is not None or max_mb is not None
    if cell is not None and limited:
        raise UsageError("a cell is named, and limits to choose one by; leave one of them out.")
    if path.is_dir():
        return _load_folder(path, device, cell, limited=limited)
    opened = open_cells(path)
    if limited:
        cell = choose_cell(opened, budget_ms, max_mb)
    return load_cell(opened, cell, device)


def _load_folder(path: Path, device: Device, cell: str | None, *, limited: bool) -> Encoder:
    spec = artifact.read_spec(path)
    if limited:
        raise UsageError(f"{path} is one cell, and so none can be chosen; name a nested bundle.")
    if cell not in (None, cell_of(spec)):
        raise unknown_cell(path, cell, [cell_of(spec)])
    tokenizer_json = decoded(artifact.read_file(path, artifact.TOKENIZER), path)
    graph = artifact.graph_files(path, spec.engine)
    device = keeping_engines(path, spec, device)
    ranges = artifact.read_ranges(path)
    encoder = Encoder(spec, tokenizer_json, graph, device, ranges)
    require_one_space(spec, ranges, encoder.tokenizer_sha256, path)
    require_ranges_of_graph(spec, ranges, encoder.graph_ranges, path)
    return encoder


def load_cell(
    opened: Opened,
    cell: str | None = None,
    device: Device = Device(),
    known: dict[bytes, tokenizers.Tokenizer] | None = None,
) -> Encoder:
    """Load a cell of a bundle that was read.

    Args:
        opened: the bundle.
        cell: the id; None: the default.
        device: what to run it on; what it leaves open is as the artifact says.
        known: tokenizer.json -> its tokenizer, of cells that were loaded before; the cell takes
            its own from there, or adds it.

    Raises:
        UsageError: when there is no such cell.
        BundleError: as ``load``.
    """
    files = opened.files(cell)
    known = {} if known is None else known
    content = files[artifact.TOKENIZER]
    where = opened.name_of(opened.require_cell(cell))
    encoder = encoder_from_files(files, opened.path, device, known.get(content), where)
    known[content] = encoder.tokenizer
    if encoder.on_gpu:  # by an engine that was built here, or kept here by whoever could write it
        golden.require_golden(encoder, files[GOLDEN], where)
    return encoder


def choose_cell(opened: Opened, budget_ms: float | None, max_mb: float | None) -> str:
    """Return the deepest cell of a bundle that is within limits by what its manifest says.

    Args:
        opened: the bundle.
        budget_ms: milliseconds at most of the median that the profile measured; None: no limit.
        max_mb: size at most of the cell's files, in 10^6 bytes; None: no limit.

    Raises:
        UsageError: when none is, or no time is known.
    """
    path, known = opened.path, {}
    for cell in opened.cells:
        entry = opened.manifest.cells.get(cell)
        figures, size = entry.figures if entry else None, opened.size_of(cell) / 1e6
        if budget_ms is not None and figures is None:
            raise UsageError(
                f"{path} says no time of {cell}, since it was packed from an artifact, and only "
                "bundle PROFILE.JSON --cell knows times; measure here with encode --within-ms or "
                "Nested.within, or set no budget_ms."
            )
        known[cell] = f"{size:.2f} MB"
        if figures and budget_ms is not None:
            known[cell] += (
                f", {figures.p50_ms:.2f} ms for {figures.batch}x{figures.sequence} tokens on "
                f"{figures.machine}"
            )
        in_time = budget_ms is None or (figures is not None and figures.p50_ms <= budget_ms)
        if in_time and (max_mb is None or size <= max_mb):
            _LOG.info(
                "%s: chose %s; no deeper cell is within the limits: %s", path, cell, known[cell]
            )
            return cell
    least = opened.cells[-1]
    raise UsageError(
        f"no cell of {path} is within {_limits(budget_ms, max_mb)}; the shallowest, {least}, takes "
        f"{known[least]}."
    )


def _limits(budget_ms: float | None, max_mb: float | None) -> str:
    limits = {"ms": budget_ms, "MB": max_mb}
    return " and ".join(f"{limit:g} {unit}" for unit, limit in limits.items() if limit is not None)
