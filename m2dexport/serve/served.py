"""The bundle that a server answers with: verified, loaded, and named."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m2dexport.engines import Device
from m2dexport.errors import UsageError
from m2dexport.files import SPEC
from m2dexport.runtime.artifact import UNTRAINED, trained_dims
from m2dexport.runtime.bundle import verify_artifact, verify_opened
from m2dexport.runtime.cells import open_cells
from m2dexport.runtime.encoder import Encoder
from m2dexport.runtime.loading import load, load_cell
from m2dexport.vectors.codecs import truncate

#: What tells a file from the one that was there before: device, inode, size, time in ns.
Identity = tuple[int, int, int, int]


@dataclass(frozen=True)
class Served:
    """A bundle that was verified here, and is loaded."""

    name: str  # what clients call it: its file's name without the ending
    created: int  # when its file was written, in seconds since 1970
    encoder: Encoder
    identity: Identity  # of the file that was read

    @property
    def space_id(self) -> str:
        """The space of its vectors."""
        return self.encoder.spec.space_id

    def facts(self) -> dict[str, Any]:
        """Return what every answer says of the vectors."""
        return {"space_id": self.space_id, "vectors": self.encoder.spec.vectors}

    def require_dimensions(self, dimensions: int) -> None:
        """Refuse to cut vectors to a width that the model was not trained to be cut to.

        Raises:
            UsageError: when it is wider than the vectors, or the trained grid is known and lacks
                it.
        """
        spec = self.encoder.spec
        if dimensions > spec.dim:
            raise UsageError(f"dimensions is {dimensions} and the vectors have {spec.dim}.")
        known = trained_dims(spec)
        if dimensions == spec.dim or known is None or dimensions in known:
            return
        names = ", ".join(map(str, [each for each in known if each < spec.dim])) or UNTRAINED
        raise UsageError(
            f"dimensions is {dimensions}, to which the model was not trained to be cut; choose "
            f"{spec.dim} or one of the trained ones below it: {names}."
        )

    def floats(self, codes: NDArray[Any], dimensions: int | None) -> NDArray[np.float32]:
        """Return what codes stand for, of length 1, float32 (texts, dimensions).

        Args:
            codes: (texts, width), as the encoder gives them.
            dimensions: leading dims to keep; None: all.
        """
        spec = self.encoder.spec
        if spec.vectors == "float32" and dimensions in (None, spec.dim):
            return codes
        return truncate(self.encoder.codec.decode(codes), dimensions or spec.dim)


def open_served(path: Path, device: Device, cell: str | None = None) -> Served:
    """Verify a bundle by its golden texts, and load it.

    Args:
        path: the bundle, or an artifact folder, of which less can be verified.
        device: what to run it on; what it leaves open is as the artifact says.
        cell: the id of a nested bundle's cell; None: the default, beside which all are verified.

    Raises:
        M2DError: as ``verify_bundle`` does.
    """
    if not path.exists():
        raise UsageError(f"{path} does not exist; name a bundle or an artifact folder.")
    if path.is_dir() and not (path / SPEC).exists():
        raise UsageError(f"{path} has no {SPEC}; name a bundle or an artifact folder.")
    identity = identity_of(path)  # before it is read, so that whatever replaces it then differs
    if path.is_dir():
        verify_artifact(path, device)
        encoder = load(path, device, cell)
    else:
        opened = open_cells(path)
        verify_opened(opened, device, cell=cell)
        encoder = load_cell(opened, cell, device)
    # Not that of what a link leads to: a new bundle must not change it.
    name = path.absolute().name.removesuffix(".m2d")
    return Served(name, identity[3] // 10**9, encoder, identity)


def identity_of(path: Path) -> Identity:
    """Return what changes when a bundle, or an artifact's specification, is replaced.

    Raises:
        OSError: when it is not there.
    """
    found = (path / SPEC if path.is_dir() else path).stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
