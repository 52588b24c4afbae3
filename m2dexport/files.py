"""Writing that leaves nothing half-written: build in a hidden folder, then rename."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from m2dexport.errors import M2DError, UsageError, one_line

if sys.platform != "win32":
    import fcntl

PROVENANCE = "m2dexport.json"  # in the folder of a sub-model: what it was cut from
SPEC = "artifact.json"  # in the folder of an artifact: what a runtime must know
FILES = "files.json"  # likewise: the hashes of its other files
EXPORT = "golden.json"  # in a folder for another program: what it must give
#: What a sub-model says of itself to transformers; artifacts and bundles carry it, for export.
MODEL_SETTINGS = ("config.json", "tokenizer_config.json")

_SUB_MODEL_KEYS = ("format", "sliced_from")
_ARTIFACT_KEYS = ("format", "space_id")
_EXPORT_KEYS = ("format", "consumer", "texts")
_GRAPHS = (
    *("model.onnx", "model.xml", "model.bin", "table.safetensors"),
    *("engine.toml", "model.engine"),
)
_ARTIFACT = {SPEC, FILES, "tokenizer.json", "ranges.json", *MODEL_SETTINGS, *_GRAPHS}
_CHUNK = 1 << 20
_LICENSES = ("LICENSE", "LICENCE", "COPYING", "NOTICE")
_SUFFIXES = ("", ".txt", ".md")
#: What a full disk says; numpy says nothing but that it wrote too little.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, None)
_PREFIX = "m2dexport-"
LOCK = "m2dexport.lock"  # of a folder that one process writes to
_PROOF = b"m2dexport removes this folder once no process holds the lock on this file\n"


def sha256_of(path: Path) -> str:
    """Return the hex sha256 of a file, read in chunks of 1 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def license_files(folder: Path) -> tuple[Path, ...]:
    """Return the licence and notice files of a folder, such as LICENSE and NOTICE.txt, sorted."""
    names = [stem + suffix for stem in _LICENSES for suffix in _SUFFIXES]
    return tuple(sorted(folder / name for name in names if (folder / name).is_file()))


def license_texts(folder: Path) -> dict[str, str]:
    """Return the texts of ``license_files`` by the files' names."""
    return {
        path.name: path.read_text(encoding="utf-8", errors="replace")
        for path in license_files(folder)
    }


def require_file(path: Path, *, force: bool = False) -> None:
    """Refuse an output file before any work is done.

    Args:
        path: the file to be written.
        force: whether a file that is there is to be replaced.

    Raises:
        UsageError: when ``path`` exists and is not a file that may be replaced, lies below a file,
            or where this user may not write.
    """
    if path.is_dir():
        raise UsageError(f"{path} is a folder; name a file with --out.")
    if os.path.lexists(path):
        if not force:
            raise _exists(path)
        if path.is_symlink() or not path.is_file():
            raise UsageError(f"{path} is not a regular file; name another place with --out.")
    _require_below_folder(path)


def require_folder(path: Path, *, force: bool = False) -> None:
    """Refuse an output folder before any work is done.

    Args:
        path: the folder to be written.
        force: whether an empty folder, or one that m2dexport wrote, is to be replaced.

    Raises:
        UsageError: when ``path`` exists and is not a folder that may be replaced, lies below a
            file, or where this user may not write.
    """
    if os.path.lexists(path):
        if not force:
            raise _exists(path)
        if path.is_symlink() or not path.is_dir() or not _can_be_made_again(path):
            raise UsageError(
                f"{path} holds what is not an output of m2dexport, which replaces only its own; "
                "remove it, or name another place with --out."
            )
    _require_below_folder(path)


def _exists(path: Path) -> UsageError:
    return UsageError(
        f"{path} already exists; name another place with --out, or replace it with --force."
    )


def _can_be_made_again(folder: Path) -> bool:
    """Say whether a folder is empty, an artifact, an export, a sub-model, or a grid of those."""
    children = set(folder.iterdir())
    if _has_keys(folder / SPEC, _ARTIFACT_KEYS):
        known = {folder / name for name in _ARTIFACT}
        return children <= known.union(license_files(folder))
    return is_export(folder) or _is_sub_model(folder) or all(map(_is_sub_model, children))


def is_export(folder: Path) -> bool:
    """Say whether a folder was written for another program."""
    return _has_keys(folder / EXPORT, _EXPORT_KEYS)


def _is_sub_model(folder: Path) -> bool:
    return _has_keys(folder / PROVENANCE, _SUB_MODEL_KEYS)


def _has_keys(path: Path, keys: Sequence[str]) -> bool:
    """Say whether a file holds a JSON object with some keys."""
    try:
        stored = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(stored, dict) and stored.keys() >= set(keys)


def _require_below_folder(path: Path) -> None:
    parent = next((p for p in path.absolute().parents if p.exists()), None)
    if parent is not None and not parent.is_dir():
        raise UsageError(f"{path} cannot be written: {parent} is a file, not a folder.")
    if parent is not None and not os.access(parent, os.W_OK | os.X_OK):
        raise UsageError(f"{path} cannot be written: {parent} is not open to this user.")


@contextlib.contextmanager
def atomic_file(path: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a temporary file name that becomes ``path`` when the block succeeds.

    Without ``force``, a file that another process put there meanwhile is kept.

    Args:
        path: the file to be written.
        force: whether a file that is there is replaced.

    Raises:
        UsageError: as ``require_file``.
        M2DError: when the disk is full or the place cannot be written.
    """
    require_file(path, force=force)
    with _beside(path) as temporary:
        yield temporary
        if force:
            temporary.replace(path)
        else:
            _create_file(temporary, path)


def keep_file(path: Path, content: bytes) -> bool:
    """Write a file that can be made again; warn where it cannot be written, and return False."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path, force=True) as part:
            part.write_bytes(content)
    except (OSError, M2DError) as error:
        warnings.warn(f"{one_line(error).rstrip('.')}; it is made again next time.", stacklevel=2)
        return False
    return True


@contextlib.contextmanager
def atomic_folder(path: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield an empty temporary folder that becomes ``path`` when the block succeeds.

    Without ``force``, a folder that another process put there meanwhile is kept.

    Args:
        path: the folder to be written.
        force: whether an empty folder, or one that m2dexport wrote, is replaced.

    Raises:
        UsageError: as ``require_folder``.
        M2DError: when the disk is full or the place cannot be written.
    """
    require_folder(path, force=force)
    with _beside(path) as temporary:
        temporary.mkdir()
        yield temporary
        if force:
            _replace_folder(temporary, path)
        else:
            _create_folder(temporary, path)


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """Yield an empty folder for the files of this process only, removed when the block ends.

    What killed processes of this user left in the folder for temporary files is removed first.
    """
    with _locked_folder(Path(tempfile.gettempdir()), _PREFIX) as folder:
        yield folder


@contextlib.contextmanager
def locked_folder(folder: Path, otherwise: str) -> Iterator[None]:
    """Make a folder if need be, and keep other processes out of it until the block ends.

    The lock goes with the process, however that ends.

    Args:
        folder: it stays, with what the block leaves in it.
        otherwise: what is said where another process has it, up to "; wait for ...".

    Raises:
        UsageError: when another process has it.
    """
    lock = _lock_in(folder, otherwise)
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)


def _lock_in(folder: Path, otherwise: str) -> int | None:
    """Return the lock of a folder, now held; None where files cannot be locked."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        if sys.platform == "win32":
            return None
        with contextlib.suppress(FileNotFoundError):  # the process before removes the folder
            lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(lock), (folder / LOCK).stat()):
                    return lock
            except BlockingIOError as error:
                os.close(lock)
                raise UsageError(
                    f"{otherwise}; wait until it has ended, or name another folder with --out."
                ) from error
            except FileNotFoundError:
                pass
            except OSError:  # a file system without locks
                os.close(lock)
                return None
            os.close(lock)  # of a file that was removed before it was locked


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """Yield ``path``'s name in a hidden folder beside it, and so on the same file system."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked_folder(path.parent, f".{_PREFIX}") as folder:
            yield folder / path.name
    except OSError as error:
        full = _is_scratch(path) and error.errno in NO_ROOM
        raise M2DError(
            f"{path} could not be written: {error.strerror or error}; nothing of it was kept"
            + ("; set TMPDIR to a folder with more room." if full else ".")
        ) from error


def _is_scratch(path: Path) -> bool:
    """Say whether a path is in a ``scratch_folder``, which no user has named."""
    temporary = Path(tempfile.gettempdir())
    inside = path.is_relative_to(temporary) and path != temporary
    return inside and path.relative_to(temporary).parts[0].startswith(_PREFIX)


def _create_file(temporary: Path, path: Path) -> None:
    """Name a file ``path`` unless that name is taken, which a rename would not notice."""
    try:
        try:
            os.link(temporary, path)
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links
            path.touch(exist_ok=False)
            temporary.replace(path)
    except FileExistsError as error:
        raise _exists(path) from error


def _create_folder(temporary: Path, path: Path) -> None:
    """Name a folder ``path`` unless that is taken; POSIX lets it take an empty folder's place."""
    try:
        temporary.rename(path)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise _exists(path) from error
        raise


def _replace_folder(temporary: Path, path: Path) -> None:
    """Move the old folder aside and the new one in.

    A process killed between the two leaves the old folder aside, where nothing sweeps it.
    """
    aside = Path(tempfile.mkdtemp(prefix=f".{_PREFIX}old-", dir=path.parent))
    old = aside / path.name
    with contextlib.suppress(FileNotFoundError):
        path.rename(old)
    try:
        _create_folder(temporary, path)
    except BaseException:
        if old.exists():
            old.rename(path)
        aside.rmdir()
        raise
    if old.exists():
        old.rename(temporary)  # whose folder is removed, by the next run if need be
    aside.rmdir()


@contextlib.contextmanager
def _locked_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """Yield a new empty folder in a folder that holds its lock, and remove both at the end.

    The lock goes with the process, in whatever container it runs; its number would say nothing
    there. A killed process's folder is removed by the next call with this parent and prefix.
    """
    _sweep(parent, prefix)
    holder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    lock = None
    try:
        lock = _take_lock(holder / LOCK, new=True)
        (holder / "files").mkdir()
        yield holder / "files"
    finally:
        _remove(holder)
        if lock is not None:
            os.close(lock)


def _sweep(parent: Path, prefix: str) -> None:
    """Remove the folders that killed processes of this user left."""
    for holder in parent.glob(f"{prefix}*"):
        lock = None if holder.is_symlink() else _take_lock(holder / LOCK, new=False)
        if lock is not None:
            _remove(holder)
            os.close(lock)


def _remove(holder: Path) -> None:
    shutil.rmtree(holder / "files", ignore_errors=True)  # the proof last: this may be cut off
    shutil.rmtree(holder, ignore_errors=True)


def _take_lock(path: Path, *, new: bool) -> int | None:
    """Return the file descriptor of a lock that is now held; it is free once that is closed.

    Args:
        path: the file to lock.
        new: True makes it and writes the proof that the folder is ours, once it is locked; False
            locks only a file of this user that holds the proof.

    Returns:
        None when the lock is another's, or where files cannot be locked: without a proof, a
        folder is never swept.
    """
    if sys.platform == "win32":
        return None
    flags = os.O_RDWR | (os.O_CREAT | os.O_EXCL if new else os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        lock = os.open(path, flags, 0o600)
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if new:
            os.write(lock, _PROOF)
            return lock
        if os.fstat(lock).st_uid == os.getuid() and os.read(lock, len(_PROOF) + 1) == _PROOF:
            return lock
    except OSError:
        pass
    os.close(lock)
    return None
