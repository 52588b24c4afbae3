"""What ships with m2dexport: a 2D Matryoshka checkpoint, evaluation sets and calibration texts."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from m2dexport.errors import UsageError

_HERE = Path(__file__).parent


def default_checkpoint() -> Path:
    """Return the folder of the checkpoint that ships."""
    return _HERE / "checkpoint"


def default_task_paths() -> tuple[Path, ...]:
    """Return STS-B dev and LIMIT-small, the default quality data."""
    return _HERE / "eval" / "stsb-dev.tsv", _HERE / "eval" / "limit-small"


def targets_folder() -> Path:
    """Return profiles/: in the package when installed, beside it in a clone."""
    packaged = _HERE.parent / "profiles"
    return packaged if packaged.is_dir() else _HERE.parent.parent / "profiles"


def shipped_targets() -> tuple[str, ...]:
    """Return the names of the targets that ship."""
    return tuple(sorted(path.stem for path in targets_folder().glob("*.toml")))


def calibration_texts() -> tuple[str, ...]:
    """Return the 1,000 English texts that freeze int8 and int4 ranges by default."""
    return read_texts(_HERE / "calibration.txt")


def align_texts_path() -> Path:
    """Return the file of 1,885 plain English sentences that maps are fitted on by default.

    They are none of the evaluation sets'. The calibration texts are made from templates: enough to
    find where values lie, and too few different words to learn a map from.
    """
    return _HERE / "align.txt"


def read_texts(path: Path) -> tuple[str, ...]:
    """Return the lines of a UTF-8 text file, empty ones left out.

    Raises:
        UsageError: when it cannot be read or holds no text.
    """
    lines = read_utf8(path).split("\n")
    texts = tuple(line.rstrip("\r") for line in lines if line.strip())
    if not texts:
        raise UsageError(f"{path} holds no text; it needs one text per line.")
    return texts


def read_utf8(path: Path) -> str:
    """Return the content of a UTF-8 text file, line ends as stored, without a byte order mark.

    Raises:
        UsageError: when it does not exist, is a folder, pipe or device, or is not UTF-8.
    """
    if not path.exists():
        raise UsageError(f"{path} does not exist.")
    if not path.is_file():  # a pipe would wait for a writer, and /dev/zero never ends
        raise UsageError(f"{path} is not a regular file; name a file.")
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path} is not UTF-8 text (byte {error.start} is {error.object[error.start]:#04x}); "
            "convert it first."
        ) from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}.") from error


def texts_sha256(texts: Sequence[str]) -> str:
    """Return the hash by which a manifest names calibration texts."""
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()
