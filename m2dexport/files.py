"""Writing that leaves nothing half-written: build under a temporary name, then rename."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from m2dexport.errors import M2DError, UsageError

_CHUNK = 1 << 20


def sha256_of(path: Path) -> str:
    """Return the hex sha256 of a file, read in chunks of 1 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def require_new(path: Path, *, overwrite: bool = False) -> None:
    """Refuse an output path before any work is done.

    Raises:
        UsageError: when ``path`` exists and ``overwrite`` is false, or lies below a file.
    """
    if path.exists() and not overwrite:
        raise UsageError(f"{path} already exists; remove it, or name another place with --out.")
    parent = next((p for p in path.absolute().parents if p.exists()), None)
    if parent is not None and not parent.is_dir():
        raise UsageError(f"{path} cannot be written: {parent} is a file, not a folder.")


@contextlib.contextmanager
def atomic_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty temporary folder that becomes ``path`` when the block succeeds.

    Raises:
        UsageError: when ``path`` exists and ``overwrite`` is false.
        M2DError: when the disk is full or the place cannot be written.
    """
    require_new(path, overwrite=overwrite)
    with _temporary_sibling(path) as temporary:
        temporary.mkdir()
        yield temporary
        if path.is_dir():
            shutil.rmtree(path)
        temporary.replace(path)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary file name beside ``path`` that becomes ``path`` when the block succeeds.

    An existing file is replaced.

    Raises:
        M2DError: when the disk is full or the place cannot be written.
    """
    with _temporary_sibling(path) as temporary:
        yield temporary
        temporary.replace(path)


@contextlib.contextmanager
def _temporary_sibling(path: Path) -> Iterator[Path]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep_stale(path)
        holder = Path(tempfile.mkdtemp(prefix=f".{path.name}.{os.getpid()}.", dir=path.parent))
    except OSError as error:
        raise _write_error(path, error) from error
    try:
        yield holder / path.name
    except OSError as error:
        raise _write_error(path, error) from error
    finally:
        shutil.rmtree(holder, ignore_errors=True)


def _sweep_stale(path: Path) -> None:
    """Remove what a killed process left while it was writing this very path."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.*"):
        pid = leftover.name[len(path.name) + 2 :].split(".")[0]
        if pid.isdigit() and not _alive(int(pid)):
            shutil.rmtree(leftover, ignore_errors=True)


def _alive(pid: int) -> bool:
    import psutil  # here, since reading a bundle never needs it

    return bool(psutil.pid_exists(pid))


def _write_error(path: Path, error: OSError) -> M2DError:
    return M2DError(f"{path} could not be written: {error.strerror or error}; nothing was kept.")
