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
_LICENSES = ("LICENSE", "LICENCE", "COPYING", "NOTICE")
_SUFFIXES = ("", ".txt", ".md")


def sha256_of(path: Path) -> str:
    """Return the hex sha256 of a file, read in chunks of 1 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def require_new(path: Path) -> None:
    """Refuse an output path before any work is done.

    Raises:
        UsageError: when ``path`` exists, lies below a file, or where this user may not write.
    """
    if path.exists():
        raise UsageError(f"{path} already exists; remove it, or name another place with --out.")
    _require_below_folder(path)


def require_file(path: Path) -> None:
    """Refuse an output file that cannot be written or replaced, before any work is done.

    Raises:
        UsageError: when ``path`` is a folder, lies below a file, or where this user may not write.
    """
    if path.is_dir():
        raise UsageError(f"{path} is a folder; name a file with --out.")
    _require_below_folder(path)


def license_files(folder: Path) -> tuple[Path, ...]:
    """Return the licence and notice files of a folder, such as LICENSE and NOTICE.txt, sorted."""
    names = [stem + suffix for stem in _LICENSES for suffix in _SUFFIXES]
    return tuple(sorted(folder / name for name in names if (folder / name).is_file()))


def _require_below_folder(path: Path) -> None:
    parent = next((p for p in path.absolute().parents if p.exists()), None)
    if parent is not None and not parent.is_dir():
        raise UsageError(f"{path} cannot be written: {parent} is a file, not a folder.")
    if parent is not None and not os.access(parent, os.W_OK | os.X_OK):
        raise UsageError(f"{path} cannot be written: {parent} is not open to this user.")


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder that becomes ``path`` when the block succeeds.

    Raises:
        UsageError: when ``path`` exists.
        M2DError: when the disk is full or the place cannot be written.
    """
    require_new(path)
    with _temporary_sibling(path) as temporary:
        temporary.mkdir()
        yield temporary
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
    """Say whether a process may still run; not by psutil, which a device need not have."""
    if os.name != "posix":
        return True  # os.kill would end it there
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True  # another user's
    return True


def _write_error(path: Path, error: OSError) -> M2DError:
    return M2DError(f"{path} could not be written: {error.strerror or error}; nothing was kept.")
