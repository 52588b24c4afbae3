"""The licence travels with the weights: checkpoint, sub-model, artifact, bundle."""

from __future__ import annotations

from pathlib import Path

_STEMS = ("LICENSE", "LICENCE", "COPYING", "NOTICE")
_SUFFIXES = ("", ".txt", ".md")


def license_files(folder: Path) -> tuple[Path, ...]:
    """Return the licence and notice files of a folder, such as LICENSE and NOTICE.txt, sorted."""
    names = [stem + suffix for stem in _STEMS for suffix in _SUFFIXES]
    return tuple(sorted(folder / name for name in names if (folder / name).is_file()))
