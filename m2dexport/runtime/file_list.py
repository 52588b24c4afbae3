"""files.json of an artifact folder: the hashes of its files, to notice what was changed since.

A space_id does not depend on the bytes of a graph, and a folder has no golden texts: without the
list, a graph with other weights would pass for the one that was checked against torch.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from m2dexport.errors import BundleError, FormatError
from m2dexport.files import FILES, sha256_of
from m2dexport.strict import Name, Sha256, parse_json, read_value, require_format

FORMAT = 1
_MOST = 1 << 20  # bytes of files.json; a folder holds about ten files


@dataclass(frozen=True)
class FileList:
    """The content of files.json."""

    format: int
    files: dict[Name, Sha256]  # all but files.json itself


def write_file_list(folder: Path) -> None:
    """Write files.json of what a folder holds; the last step of whatever writes an artifact."""
    names = {path.name for path in folder.iterdir()} - {FILES}
    listed = FileList(FORMAT, {name: sha256_of(folder / name) for name in names})
    text = json.dumps(asdict(listed), indent=2, sort_keys=True, ensure_ascii=False)
    (folder / FILES).write_text(f"{text}\n", encoding="utf-8", newline="\n")


def require_listed(folder: Path) -> None:
    """Refuse an artifact folder whose files are others than when it was written.

    Files that no build wrote do not count: a LICENSE may be added, and nothing else is read.

    Raises:
        FormatError: when it has no files.json, as those of older versions, or one of another
            format.
        BundleError: naming a file that was changed or removed.
    """
    for name, sha256 in sorted(_read(folder).items()):
        path = folder / name
        if not path.exists():
            raise BundleError(f"{path} was removed after the build; build the artifact again.")
        if not path.is_file() or sha256_of(path) != sha256:
            raise BundleError(f"{path} was changed after the build; build the artifact again.")


def _read(folder: Path) -> dict[str, str]:
    path = folder / FILES
    if not path.is_file():
        raise FormatError(
            f"{folder} has no {FILES}, with which artifacts are built since; build it again."
        )
    if path.stat().st_size > _MOST:
        raise BundleError(f"{path} is larger than {_MOST:,} bytes; build the artifact again.")
    stored = parse_json(path.read_bytes(), path, BundleError)
    require_format(stored, FORMAT, path, BundleError)
    return read_value(FileList, stored, path, BundleError).files
