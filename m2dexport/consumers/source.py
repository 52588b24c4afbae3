"""What is exported: an artifact folder or a bundle, read once, and loaded to be compared with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m2dexport.engines import ENGINES, Device
from m2dexport.errors import UsageError
from m2dexport.files import license_texts
from m2dexport.runtime import artifact
from m2dexport.runtime.artifact import ArtifactSpec
from m2dexport.runtime.bundle import artifact_files, verify_artifact, verify_opened
from m2dexport.runtime.cells import open_cells
from m2dexport.runtime.encoder import Encoder
from m2dexport.runtime.loading import load, load_cell
from m2dexport.runtime.manifest import Figures
from m2dexport.strict import parse_json


@dataclass(frozen=True)
class Options:
    """What a user may choose of an export."""

    cell: str | None = None  # of a nested bundle; None: the default
    plain: bool = False  # standard operators alone
    #: (texts, tokens) that a server is warmed up with; the most texts are those of its batches.
    #: None: what a profile timed, if one did, and some more.
    shapes: tuple[tuple[int, int], ...] | None = None


@dataclass(frozen=True)
class Source:
    """An artifact or a bundle."""

    path: Path
    encoder: Encoder  # of one thread: what is compared does not depend on the cores
    files: Mapping[str, bytes]  # by the names that they have in an artifact
    licenses: Mapping[str, str]  # file name to text
    figures: Figures | None = None  # that a profile measured; None: it was not built from one

    @property
    def spec(self) -> ArtifactSpec:
        """Its specification."""
        return self.encoder.spec

    @property
    def graph(self) -> dict[str, bytes]:
        """The files of its graph."""
        return {name: self.files[name] for name in ENGINES[self.spec.engine].files}

    def setting(self, name: str) -> dict[str, Any]:
        """Return what one of ``files.MODEL_SETTINGS`` says.

        Raises:
            UsageError: when it was built before artifacts carried them, or it is damaged.
        """
        if name not in self.files:
            raise UsageError(
                f"{self.path} does not carry the model's {name}, which other programs read; build "
                "it again with this version."
            )
        stored = parse_json(self.files[name], f"{self.path}: {name}")
        if not isinstance(stored, dict):
            raise UsageError(f"{self.path}: {name} is not an object; build it again.")
        return stored


def open_source(path: Path, cell: str | None) -> Source:
    """Return an artifact or a cell of a bundle, verified here as far as it can be.

    A bundle must give its golden vectors; an artifact has none.

    Args:
        path: the folder or the archive.
        cell: the id of a nested bundle's cell; None: the default.

    Raises:
        UsageError: when there is none at ``path``, or no such cell.
        BundleError: when it is damaged, or the artifact's files do not belong together.
        DriftError: when it does not give its golden vectors here.
    """
    one_thread = Device(threads=1)
    if path.is_dir():
        verify_artifact(path, one_thread)
        files = artifact_files(path, artifact.read_spec(path))
        return Source(path, load(path, one_thread, cell), files, license_texts(path))
    opened = open_cells(path)
    verify_opened(opened, one_thread, cell=opened.require_cell(cell))
    encoder = load_cell(opened, cell, one_thread)
    entry = opened.manifest.cells.get(opened.require_cell(cell))
    figures = entry.figures if entry else None
    return Source(path, encoder, opened.files(cell), opened.manifest.licenses, figures)
