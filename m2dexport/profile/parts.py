"""Parts of a sweep: what was measured, kept at once, so that an interrupted sweep goes on.

A part is named by the hash of all that decides it, and appears whole or not at all: it is written
under a temporary name, flushed to the disk, and renamed. So whatever is there when a sweep is
killed, or the power fails, can be trusted. What was done to it afterwards shows in its hash, which
it holds.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m2dexport.errors import M2DError
from m2dexport.files import LOCK, NO_ROOM, locked_folder, scratch_folder, sha256_of
from m2dexport.strict import sha256_of_json

#: From what is done, all that decides the outcome (JSON), and what does it to the outcome (JSON),
#: which a sweep that goes on takes from the one before.
Remember = Callable[[str, Any, Callable[[], Any]], Any]

#: The folder of a sweep's parts, in that of its profile.
STORE = ".sweep"

#: In that folder while the profile's files are written.
WRITING = "writing"

_UNFINISHED = "unfinished"
_SEAL = "seal.json"  # in the folder of a part: the hashes of its files
#: A part that is a file where a folder should be, or the like; other errors of the disk are told.
_OTHER_KIND = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
_FEW_DIGITS, _DIGITS = 8, 24  # of the hashes in a name: of the sweep, of the part


@dataclass(frozen=True)
class Parts:
    """The parts of one sweep, in a folder that no other process writes to."""

    folder: Path
    decides: str = ""  # a hash of what decides all of them alike

    def remember(self, step: str, inputs: Any, measure: Callable[[], Any]) -> Any:
        """Return the outcome of a step as JSON holds it: measured before, or now.

        Args:
            step: what is done, such as "latency".
            inputs: all else that decides the outcome, as JSON.
            measure: does it; the outcome goes into JSON.
        """
        path = self.folder / f"{self._name(step, inputs)}.json"
        if not path.exists():
            outcome = json.loads(json.dumps(measure()))
            text = json.dumps({"outcome": outcome, "sha256": sha256_of_json(outcome)})
            with self._kept(path) as unfinished:
                unfinished.write_text(text, encoding="utf-8")
        return json.loads(path.read_text(encoding="utf-8"))["outcome"]

    def files(self, step: str, inputs: Any, make: Callable[[Path], None]) -> Path:
        """Return the folder of a step that makes files: made before, or now.

        Args:
            step: what is done, such as "maps".
            inputs: all else that decides the outcome, as JSON.
            make: fills an empty folder.
        """
        path = self.path(step, inputs)
        if not path.exists():
            with self._kept(path) as unfinished:
                unfinished.mkdir()
                make(unfinished)
                hashes = json.dumps(_hashes(unfinished))
                (unfinished / _SEAL).write_text(hashes, encoding="utf-8")
        return path

    def path(self, step: str, inputs: Any) -> Path:
        """Return where ``files`` keeps a step; whether it was done is whether that exists."""
        return self.folder / self._name(step, inputs)

    def count(self, step: str = "") -> int:
        """Return how many parts of this sweep there are, of one step or of all."""
        return len(list(self.folder.glob(f"{step}*-{self._own}-*")))

    def held(self) -> int:
        """Return how many parts the folder holds, of whatever sweep."""
        beside = LOCK, WRITING, _UNFINISHED
        return sum(path.name not in beside for path in self.folder.iterdir())

    def begin_writing(self) -> None:
        """Note that the profile's files are being written: some may be there already."""
        (self.folder / WRITING).touch()

    @property
    def _own(self) -> str:
        return sha256_of_json(self.decides)[:_FEW_DIGITS]

    def deciding(self, decides: Any) -> Parts:
        """Return the same parts for a sweep that something (JSON) decides as a whole.

        Raises:
            M2DError: when one of those that are there is not as it was written.
        """
        parts = Parts(self.folder, sha256_of_json(decides))
        for path in sorted(self.folder.glob(f"*-{parts._own}-*")):
            if not _is_whole(path):
                raise M2DError(f"{path} is damaged; start over with --fresh.")
        return parts

    def _name(self, step: str, inputs: Any) -> str:
        return f"{step}-{self._own}-{sha256_of_json([self.decides, inputs])[:_DIGITS]}"

    @contextmanager
    def _kept(self, path: Path) -> Iterator[Path]:
        """Yield a name that becomes ``path`` once what it names is on the disk."""
        unfinished = self.folder / _UNFINISHED
        _remove(unfinished)
        yield unfinished
        for each in (*sorted(unfinished.rglob("*")), unfinished):
            _flush(each)
        unfinished.rename(path)
        _flush(self.folder)


@contextmanager
def open_parts(folder: Path, *, fresh: bool = False) -> Iterator[Parts]:
    """Yield the parts in a folder, which is removed when the block ends without an error.

    Args:
        folder: where they are kept.
        fresh: whether those that are there are dropped.

    Raises:
        UsageError: when another process has the folder.
        M2DError: when the disk is full, or something in the folder cannot be read or written.
    """
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    locked = locked_folder(folder, f"another sweep is writing to {folder.parent}")
    with _usable(folder, fresh=fresh), locked:
        parts = Parts(folder)
        if fresh:
            _clear(folder)
        try:
            yield parts
        except BaseException as error:
            _remove(folder / _UNFINISHED)
            count = parts.held()
            if not count:
                _remove_folders(made)
            if isinstance(error, OSError) and error.errno in NO_ROOM:
                raise _full(error, folder, count) from error
            raise
        _clear(folder)
        _remove_folders([folder])


@contextmanager
def passing_parts() -> Iterator[Parts]:
    """Yield a folder for parts that no other sweep will go on from."""
    with scratch_folder() as scratch:
        yield Parts(scratch)


def unpack(files: Mapping[str, bytes], folder: Path) -> None:
    """Write files, by their path in a folder, which need not exist."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def measure_anew(_step: str, _inputs: Any, measure: Callable[[], Any]) -> Any:
    """Measure without keeping anything."""
    return measure()


@contextmanager
def _usable(folder: Path, *, fresh: bool) -> Iterator[None]:
    """Say what to do where a folder cannot be used.

    If all is dropped anyway, what stands where the folder or its lock should be goes, too.
    """
    try:
        if fresh and not folder.is_dir():
            _remove(folder)
        if fresh and ((folder / LOCK).is_symlink() or not (folder / LOCK).is_file()):
            _remove(folder / LOCK)
        yield
    except OSError as error:
        if error.filename is None or not Path(error.filename).is_relative_to(folder):
            raise
        raise M2DError(
            f"{error.filename} cannot be used: {error.strerror}; start over with --fresh, or name "
            "another folder with --out."
        ) from error


def _hashes(folder: Path) -> dict[str, str]:
    """Return the hashes of the files of a part by their path in its folder."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != _SEAL]
    return {path.relative_to(folder).as_posix(): sha256_of(path) for path in files}


def _is_whole(part: Path) -> bool:
    """Say whether a part is as it was written."""
    try:
        if part.suffix == ".json":
            stored = json.loads(part.read_text(encoding="utf-8"))
            return bool(stored["sha256"] == sha256_of_json(stored["outcome"]))
        return bool(json.loads((part / _SEAL).read_text(encoding="utf-8")) == _hashes(part))
    except (*_OTHER_KIND, ValueError, KeyError, TypeError, RecursionError):
        return False


def _full(error: OSError, folder: Path, count: int) -> M2DError:
    counted = f"{count} part{'s' * (count > 1)}"
    kept = f"what was measured, {counted}, is kept" if count else "nothing was measured"
    return M2DError(
        f"the sweep cannot write to {folder}: {error.strerror or error}; {kept}; make room, "
        "and run the same command again."
    )


def _remove_folders(folders: Iterable[Path]) -> None:
    """Remove folders that hold nothing but perhaps the lock."""
    for each in folders:
        (each / LOCK).unlink(missing_ok=True)
        with suppress(OSError):
            each.rmdir()


def _clear(folder: Path) -> None:
    for each in folder.iterdir():
        if each.name != LOCK:
            _remove(each)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # which cannot be opened there
    file = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(file)
    finally:
        os.close(file)
