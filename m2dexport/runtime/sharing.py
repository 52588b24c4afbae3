"""What files have in common, found in their bytes: so a nested bundle stores it once.

Files are cut where their content says so: where eight bytes have a certain hash. So equal content
is cut alike, wherever in a file and behind whatever it stands, and nothing need be known of graphs,
engines or formats. Equal pieces are compared byte by byte; the hash only says where to cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from m2dexport.runtime.manifest import Span

_LEAST = 2048  # bytes of a piece, the last one of a file apart
_BITS = 12  # a cut every 2^12 bytes beyond that, on average
_WORD = 8
_MIX, _FACTOR = np.uint64(0x5BD1E9955BD1E995), np.uint64(0x9E3779B97F4A7C15)


def share(
    stored: Mapping[str, bytes], cells: Sequence[Mapping[str, bytes]], rest: str
) -> tuple[bytes, list[dict[str, list[Span]]]]:
    """Return the content that several cells' files need beside what is stored, and their spans.

    Args:
        stored: entries, name to content, whose content need not be stored again.
        cells: the files of each cell, name to content.
        rest: the name of the entry that the content returned will be.

    Returns:
        The content of ``rest``, and per cell the spans of each file; the same arguments give the
        same result.
    """
    found: dict[bytes, tuple[str, int]] = {}  # piece -> where it is first
    for name in sorted(stored):
        for offset, piece in _pieces(stored[name]):
            found.setdefault(piece, (name, offset))
    more = bytearray()
    spans = []
    for files in cells:
        spans.append({name: _spans(files[name], found, rest, more) for name in sorted(files)})
    return bytes(more), spans


def _spans(
    content: bytes, found: dict[bytes, tuple[str, int]], rest: str, more: bytearray
) -> list[Span]:
    """Return the spans of a file; what was not found yet goes to the end of ``more``."""
    spans: list[Span] = []
    for _, piece in _pieces(content):
        if piece not in found:
            found[piece] = (rest, len(more))
            more += piece
        entry, offset = found[piece]
        last = spans[-1] if spans else None
        if last and (last.entry, last.offset + last.size) == (entry, offset):
            spans[-1] = Span(entry, last.offset, last.size + len(piece))
        else:
            spans.append(Span(entry, offset, len(piece)))
    return spans


def _pieces(content: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield offset and content of every piece of a file."""
    cuts = _cuts(content)
    start = 0
    while start < len(content):
        after = int(np.searchsorted(cuts, start + _LEAST))
        end = int(cuts[after]) if after < len(cuts) else len(content)
        yield start, content[start:end]
        start = end


def _cuts(content: bytes) -> NDArray[np.int64]:
    """Return the offsets, ascending, at which the next eight bytes have the hash of a cut."""
    cuts = []
    for first in range(min(_WORD, len(content))):
        words = np.frombuffer(content, "<u8", (len(content) - first) // _WORD, first)
        hashes = (words ^ _MIX) * _FACTOR >> np.uint64(64 - _BITS)
        cuts.append(np.flatnonzero(hashes == 0) * _WORD + first)
    return np.sort(np.concatenate(cuts)) if cuts else np.zeros(0, dtype=np.int64)
