"""Rounding of weights to 8-bit and 4-bit codes, with only numpy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Codes = NDArray[np.uint8]

#: Values that share one scale in the block-wise precisions.
BLOCK = 32
_TINY = np.float32(1e-12)
#: Factors by which the range of a 4-bit block is shrunk, for trial: its outliers then saturate.
_SHRINKS = np.linspace(1.0, 0.7, 7, dtype=np.float32)
_CHUNK = 1 << 22  # values rounded at a time: several copies of a large table would not fit


@dataclass(frozen=True)
class Blocks:
    """Rows of block-wise codes: ``(codes - zero) * scale``; the last block is padded."""

    codes: Codes  # (rows, blocks, BLOCK)
    scale: Floats  # (rows, blocks, 1)
    zero: Codes  # (rows, blocks, 1): the code of 0


def symmetric_int8(weight: Floats, axis: int) -> tuple[NDArray[np.int8], Floats]:
    """Return codes of -127..127 and their float32 scale, which is constant along ``axis``."""
    scale = (np.maximum(np.abs(weight).max(axis=axis, keepdims=True), _TINY) / 127).astype(
        np.float32
    )
    codes = np.clip(np.round(weight / scale), -127, 127).astype(np.int8)
    return codes, scale


def quantize_blocks(rows: Floats, bits: int) -> Blocks:
    """Round float32 (rows, width) in blocks of ``BLOCK`` along the width.

    * 8 bits: symmetric around code 128;
    * 4 bits: from the smallest to the largest value of a block, multiplied by whichever of seven
      factors leaves the smallest squared error.
    """
    blocks = -(-rows.shape[1] // BLOCK)
    padded = np.pad(rows, ((0, 0), (0, blocks * BLOCK - rows.shape[1])))
    chunks = np.array_split(padded, max(1, padded.size // _CHUNK))
    round_blocks = _round_int8 if bits == 8 else _round_int4
    done = [round_blocks(chunk.reshape(len(chunk), blocks, BLOCK)) for chunk in chunks]
    return Blocks(
        np.concatenate([part.codes for part in done]),
        np.concatenate([part.scale for part in done]),
        np.concatenate([part.zero for part in done]),
    )


def _round_int8(values: Floats) -> Blocks:
    codes, scale = symmetric_int8(values, axis=-1)
    return Blocks(
        (codes.astype(np.int16) + 128).astype(np.uint8),
        scale,
        np.full_like(scale, 128, dtype=np.uint8),
    )


def _round_int4(values: Floats) -> Blocks:
    low = np.minimum(values.min(axis=-1, keepdims=True), 0)
    high = np.maximum(values.max(axis=-1, keepdims=True), 0)
    best, least = None, np.full_like(low, np.inf)
    for shrink in _SHRINKS:
        scale = np.maximum((high - low) * shrink, _TINY) / np.float32(15)
        zero = np.clip(np.round(-low * shrink / scale), 0, 15)
        codes = np.clip(np.round(values / scale) + zero, 0, 15)
        error = np.square((codes - zero) * scale - values).sum(axis=-1, keepdims=True)
        better = error < least
        least = np.where(better, error, least)
        found = Blocks(codes.astype(np.uint8), scale, zero.astype(np.uint8))
        best = found if best is None else _choose(better, found, best)
    assert best is not None
    return best


def _choose(where: NDArray[np.bool_], one: Blocks, other: Blocks) -> Blocks:
    return Blocks(
        np.where(where, one.codes, other.codes),
        np.where(where, one.scale, other.scale),
        np.where(where, one.zero, other.zero),
    )


def pack_nibbles(codes: Codes) -> Codes:
    """Return 4-bit codes two to a byte along the last axis, the first of a pair in the low half."""
    packed: Codes = codes[..., 0::2] | (codes[..., 1::2] << np.uint8(4))
    return packed


def pack_halves(codes: Codes) -> Codes:
    """Return 4-bit codes two to a byte, the first half of the last axis in the low halves."""
    half = codes.shape[-1] // 2
    packed: Codes = codes[..., :half] | (codes[..., half:] << np.uint8(4))
    return packed
