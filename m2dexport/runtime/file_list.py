"""files.json of an artifact folder: the hashes of its files, to notice what was changed since.

A space_id does not depend on the bytes of a graph, and a folder has no golden texts: without the
list, a graph with other weights would pass for the one that was checked against torch.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from m2dexport.errors import BundleError, FormatError, one_line
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
    listed = FileList(FORMAT, {name: sha256_of(folder / name) for name in _names_in(folder)})
    text = json.dumps(asdict(listed), indent=2, sort_keys=True, ensure_ascii=False)
    (folder / FILES).write_text(f"{text}\n", encoding="utf-8", newline="\n")


def require_listed(folder: Path) -> None:
    """Refuse an artifact folder whose files are others than when it was written.

    Hidden files do not count: file browsers write them, and nothing reads them.

    Raises:
        FormatError: when it has no files.json, as those of older versions, or one of another
            format.
        BundleError: naming a file that was changed, removed or added.
    """
    listed, held = _read(folder), _names_in(folder)
    for name in sorted({*listed, *held}):
        path = folder / name
        if name not in held:
            raise BundleError(f"{path} was removed after the build; build the artifact again.")
        if name not in listed:
            raise BundleError(f"{folder} holds {one_line(name)}, which no build wrote; remove it.")
        if not path.is_file() or sha256_of(path) != listed[name]:
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


def _names_in(folder: Path) -> set[str]:
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    return names - {FILES}
