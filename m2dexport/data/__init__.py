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


def calibration_texts() -> tuple[str, ...]:
    """Return the 1,000 English texts that freeze int8 and int4 ranges by default."""
    return read_texts(_HERE / "calibration.txt")


def read_texts(path: Path) -> tuple[str, ...]:
    """Return the lines of a UTF-8 text file, empty ones left out.

    Raises:
        UsageError: when it cannot be read or holds no text.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read as UTF-8 text: {error}.") from error
    texts = tuple(line.rstrip("\r") for line in lines if line.strip())
    if not texts:
        raise UsageError(f"{path} holds no text; it needs one text a line.")
    return texts


def texts_sha256(texts: Sequence[str]) -> str:
    """Return the hash by which a manifest names calibration texts."""
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()
