"""The .m2d file: a canonical ZIP archive, in which every byte is decided by what it holds.

Entries are stored uncompressed, sorted by name, dated 1980-01-01, with fixed modes and neither
comments nor extra fields, so the same files always make the same bytes. The reader works out the
headers that the archive must have and compares them, and checks each entry's CRC-32, size and
sha256: no byte can change unnoticed. This detects damage and mix-ups. It does not authenticate:
whoever can write a new archive can write new checksums, so get bundles from where you trust.
"""

from __future__ import annotations

import hashlib
import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from m2dexport.engines import ENGINES
from m2dexport.errors import BundleError, M2DError, UsageError, one_line
from m2dexport.files import MODEL_SETTINGS, SPEC
from m2dexport.runtime.artifact import GRAPH_FILES, RANGES, SMALL_LIMIT, TOKENIZER
from m2dexport.runtime.manifest import MANIFEST, MOST_BYTES, Manifest, read_manifest
from m2dexport.strict import parse_json, shown

GOLDEN = "golden.json"
#: Of a nested bundle: what cells have and the default one lacks.
POOL = "cells.bin"
#: Over the manifest, by whoever made the bundle.
SIGNATURE = "signature.json"
#: What the manifest does not list.
UNLISTED = frozenset({MANIFEST, SIGNATURE})
#: What the files of an encoder must be, and may be.
REQUIRED = frozenset({SPEC, GOLDEN, TOKENIZER})
OF_A_CELL = REQUIRED | GRAPH_FILES | {RANGES, *MODEL_SETTINGS}
KNOWN = OF_A_CELL | UNLISTED | {POOL}

#: Bytes at most of what is parsed, and then takes up to 27 times as much memory.
_PARSED = {SPEC: 1 << 22, RANGES: 1 << 22, SIGNATURE: 1 << 22, GOLDEN: 1 << 25}

_LIMIT = MOST_BYTES
_MOST_ENTRIES = 16
_VERSION = 20  # ZIP 2.0
_UNIX = 3
_MODE = 0o100644  # a regular file
_MIDNIGHT, _FIRST_DAY = 0, 1 << 5 | 1  # 1980-01-01 00:00, the first date that ZIP can hold
_LOCAL = struct.Struct("<4s5H3L2H")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_END = struct.Struct("<4s4H2LH")
#: What zipfile raises on damaged archives (RuntimeError: an entry marked as encrypted).
_UNREADABLE = (OSError, zipfile.BadZipFile, EOFError, struct.error, ValueError, RuntimeError)


@dataclass(frozen=True)
class _Entry:
    name: str
    size: int  # bytes
    crc: int  # CRC-32 of the content


def write_archive(path: Path, files: Mapping[str, bytes]) -> None:
    """Write the canonical archive of ``files``; the same files make the same bytes.

    Raises:
        M2DError: when they are too large for one archive.
    """
    entries = [_Entry(name, len(files[name]), zlib.crc32(files[name])) for name in sorted(files)]
    total = sum(entry.size for entry in entries)
    if total > _LIMIT - (1 << 16):
        raise M2DError(
            f"the files take {total:,} bytes and a bundle holds at most {_LIMIT - (1 << 16):,}; "
            "choose a smaller cell."
        )
    headers, directory = _layout(entries)
    with path.open("wb") as stream:
        for header, entry in zip(headers, entries, strict=True):
            stream.write(header)
            stream.write(files[entry.name])
        stream.write(directory)


def open_bundle(path: Path) -> dict[str, bytes]:
    """Return every file of a bundle by name, after checking each byte of the archive.

    Nothing is unpacked to disk. The graph is not run: ``verify_bundle`` does that.

    Raises:
        UsageError: when there is no such file.
        BundleError: when it is not a bundle, is damaged, or was made by another format.
    """
    return read_bundle(path)[0]


def read_bundle(path: Path) -> tuple[dict[str, bytes], Manifest]:
    """Return the files of a bundle, as ``open_bundle``, and what manifest.json says.

    Raises:
        UsageError: as ``open_bundle``.
        BundleError: likewise.
    """
    if not path.exists():
        raise UsageError(f"{path} does not exist; name a bundle or an artifact folder.")
    if not path.is_file():  # nor a pipe, which would wait for a writer
        raise UsageError(f"{path} is not a bundle file; bundle makes one.")
    try:
        with path.open("rb") as stream:
            files = _read_archive(stream, path)
    except _UNREADABLE as error:
        reason = one_line(getattr(error, "strerror", None) or error)
        raise BundleError(f"{path} cannot be read as a bundle: {reason}; copy it again.") from error
    manifest = read_manifest(files, path)
    _check_names(files, manifest, path)
    for name, entry in manifest.files.items():
        if len(files[name]) != entry.size:
            raise BundleError(
                f"{path}: {name} has {len(files[name]):,} bytes where the manifest says "
                f"{entry.size:,}; copy the bundle again."
            )
        if hashlib.sha256(files[name]).hexdigest() != entry.sha256:
            raise BundleError(f"{path}: {name} does not match its sha256; copy the bundle again.")
    return files, manifest


def _read_archive(stream: BinaryIO, path: Path) -> dict[str, bytes]:
    size = _require_plain_end(stream, path)
    with zipfile.ZipFile(stream) as archive:
        infos = archive.infolist()
        for info in infos:
            _require_plain_entry(info, path)
        names = [info.filename for info in infos]
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise BundleError(f"{path} holds {shown(twice)} twice; a bundle never does.")
        _require_canonical(stream, infos, size, path)
        return {info.filename: archive.read(info) for info in infos}


def _require_plain_end(stream: BinaryIO, path: Path) -> int:
    """Return the archive's size after checking the record at its very end.

    It bounds what the ZIP reader is then willing to read into memory.
    """
    size = stream.seek(0, 2)
    if size > _LIMIT:
        raise BundleError(f"{path} has {size:,} bytes; a bundle has at most {_LIMIT:,}.")
    stream.seek(max(0, size - _END.size))
    tail = stream.read(_END.size)
    if len(tail) < _END.size or not tail.startswith(b"PK\5\6"):
        raise BundleError(f"{path} is not a bundle, or its end is missing; copy it again.")
    entries, directory_size = _END.unpack(tail)[4:6]
    if entries > _MOST_ENTRIES or directory_size > size or directory_size > 1 << 16:
        raise BundleError(f"{path} lists {entries} files; a bundle has at most {len(KNOWN)}.")
    return size


def _require_plain_entry(info: zipfile.ZipInfo, path: Path) -> None:
    # orig_filename: zipfile cuts a name at a zero byte.
    name = info.orig_filename
    if name != Path(name).name or "\\" in name or ":" in name or name in (".", ".."):
        raise BundleError(
            f"{path} holds {shown(name)}; a bundle has no folders and no absolute names."
        )
    if info.external_attr >> 16 != _MODE:
        raise BundleError(f"{path}: {shown(name)} is a link, a folder or has a mode of its own.")
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
        raise BundleError(
            f"{path}: {shown(name)} is compressed; a bundle stores files as they are."
        )
    require_size(name, info.file_size, path)


def _require_canonical(
    stream: BinaryIO, infos: Sequence[zipfile.ZipInfo], size: int, path: Path
) -> None:
    """Compare every byte outside the contents with what a bundle of these files must have there.

    This also refuses overlapping and surplus content: the sizes add up to the archive's own.
    """
    entries = [_Entry(info.orig_filename, info.file_size, info.CRC) for info in infos]
    damaged = BundleError(f"{path} is damaged or was not written by m2dexport; copy it again.")
    if [entry.name for entry in entries] != sorted(entry.name for entry in entries):
        raise damaged
    headers, directory = _layout(entries)
    offset = 0
    for header, entry in zip(headers, entries, strict=True):
        stream.seek(offset)
        if stream.read(len(header)) != header:
            raise damaged
        offset += len(header) + entry.size
    stream.seek(offset)
    if offset + len(directory) != size or stream.read(len(directory)) != directory:
        raise damaged


def _layout(entries: Sequence[_Entry]) -> tuple[list[bytes], bytes]:
    """Return the header in front of each entry and the directory behind the last one."""
    headers: list[bytes] = []
    directory, offset = b"", 0
    for entry in entries:
        name = entry.name.encode("ascii", "replace")
        # Needed version, flags, method "stored", time, date, CRC-32, stored size, size.
        shared = (_VERSION, 0, 0, _MIDNIGHT, _FIRST_DAY, entry.crc, entry.size, entry.size)
        header = _LOCAL.pack(b"PK\3\4", *shared, len(name), 0) + name
        made_by = _UNIX << 8 | _VERSION
        # Lengths of name, extra field and comment, disk, internal and external attributes.
        rest = (len(name), 0, 0, 0, 0, _MODE << 16, min(offset, _LIMIT))
        directory += _CENTRAL.pack(b"PK\1\2", made_by, *shared, *rest) + name
        headers.append(header)
        offset += len(header) + entry.size
    count = len(entries)
    end = _END.pack(b"PK\5\6", 0, 0, count, count, len(directory), min(offset, _LIMIT), 0)
    return headers, directory + end


def _engine_of(files: Mapping[str, bytes]) -> str:
    """Return the engine that a bundle's graph is for: of those whose files are there, its own."""
    there = [name for name, engine in ENGINES.items() if engine.files[0] in files] or ["onnx"]
    try:
        named = parse_json(files.get(SPEC, b""), SPEC).get("engine")
    except (UsageError, AttributeError):  # said when the specification is read
        named = None
    return named if named in there else there[0]


def _check_names(files: Mapping[str, bytes], manifest: Manifest, path: Path) -> None:
    for name in sorted(set(manifest.files) - set(files)):
        raise BundleError(f"{path} lacks {shown(name)}; build the bundle again.")
    if POOL in files and not manifest.cells:
        raise BundleError(f"{path} holds {POOL}, and its {MANIFEST} names no cells.")
    require_files_of_cell({name: files[name] for name in set(files) - UNLISTED - {POOL}}, path)
    for name in sorted(set(files) - set(manifest.files) - UNLISTED):
        raise BundleError(f"{path} holds {shown(name)}, which its manifest does not list.")


def require_size(name: str, size: int, where: object) -> None:
    """Refuse a file that is too large for its name, before it is read.

    Args:
        name: of the file.
        size: its bytes.
        where: the bundle, or a cell of it, for messages.

    Raises:
        BundleError: naming the limit.
    """
    most = _PARSED.get(name, SMALL_LIMIT)
    if size > most and name not in (*GRAPH_FILES, POOL):
        raise BundleError(f"{where}: {shown(name)} is larger than {most:,} bytes.")


def require_files_of_cell(files: Mapping[str, bytes], where: object) -> None:
    """Refuse files that are too few or too many for one encoder.

    Args:
        files: name to content.
        where: the bundle, for messages.

    Raises:
        BundleError: naming the file.
    """
    engine = _engine_of(files)
    required = REQUIRED | set(ENGINES[engine].files)
    for name in sorted(set(files) - OF_A_CELL):
        raise BundleError(f"{where} holds {shown(name)}, which does not belong in a bundle.")
    for name in sorted(GRAPH_FILES & set(files) - required - set(ENGINES[engine].may_hold)):
        raise BundleError(f"{where} holds {shown(name)} beside the graph of engine {engine}.")
    for name in sorted(required - set(files)):
        raise BundleError(f"{where} lacks {shown(name)}; build the bundle again.")
