"""Vector precision, as functions: the codes of normalised vectors, in numpy only.

``search.Codec`` applies them to the vectors of one artifact.

======================  ======================================================================
precision               stored
======================  ======================================================================
float32                 the vector
int8                    256 levels of each dim's frozen range
int8-symmetric          127 times the value, rounded: codes that an index compares as they are
int4                    16 levels of each dim's frozen range, two in a byte
ubinary, binary         the sign of each value, eight in a byte, as uint8 or int8
======================  ======================================================================

int8, ubinary and binary are those of ``sentence_transformers.util.quantize_embeddings`` (6.2) given
the same ranges, bit for bit; golden files pin all of them as ``CODEC_VERSION``.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from m2dexport.errors import FormatError, UsageError
from m2dexport.precisions import BitOrder, VectorPrecision
from m2dexport.strict import parse_json, read_value, shown

#: Stored with every artifact and its ranges; it rises when the codes of a precision change.
CODEC_VERSION = 1

#: Levels above the lowest of the precisions that need ranges.
LEVELS: dict[VectorPrecision, int] = {"int8": 255, "int4": 15}
#: Dims in a byte of the packed precisions, which have a bit order.
PER_BYTE: dict[VectorPrecision, int] = {"int4": 2, "ubinary": 8, "binary": 8}
#: int8-symmetric codes a value of 1, the largest that a normalised vector has, as this.
SYMMETRIC_LEVELS = 127

Floats = NDArray[np.float32]

#: Fewer texts than this say too little about where a dim's values lie.
MIN_CALIBRATION_TEXTS = 100
_HOLD_OUT = 5  # one calibration text in so many is held out to measure clipping
NORM_EPSILON = np.float32(1e-12)  # of torch.nn.functional.normalize; graphs divide by it, too
_RANGES_FILE = "the ranges file"


@dataclass(frozen=True)
class Ranges:
    """The frozen range of each dim of int8 or int4 vectors, measured once on calibration texts."""

    low: Floats  # (dim,): the lowest level begins here
    high: Floats  # (dim,): the highest level begins here

    def step(self, precision: VectorPrecision) -> Floats:
        """Return the width of one level, float32 (dim,); 1 where the range is empty."""
        step: Floats = (self.high - self.low) / np.float32(LEVELS[precision])
        step[step == 0] = 1
        return step

    def sha256(self) -> str:
        """Return a hash of the values."""
        values = np.stack([self.low, self.high]).astype("<f4")
        return hashlib.sha256(values.tobytes()).hexdigest()

    def to_json(self) -> str:
        """Return the text of ranges.json; float32 values survive the round trip exactly."""
        stored = {"codec": CODEC_VERSION, "low": self.low.tolist(), "high": self.high.tolist()}
        return json.dumps(stored) + "\n"


@dataclass(frozen=True)
class _StoredRanges:
    codec: int
    low: list[float]
    high: list[float]


def ranges_from_json(text: bytes | str) -> Ranges:
    """Return the ranges stored by ``Ranges.to_json``.

    Raises:
        UsageError: when the text is not that, or was written by a later version of the codec.
    """
    content = parse_json(text, _RANGES_FILE)
    if isinstance(content, dict):
        require_codec(content.get("codec", CODEC_VERSION), _RANGES_FILE)
    stored = read_value(_StoredRanges, content, _RANGES_FILE)
    low, high = (np.asarray(values, dtype=np.float32) for values in (stored.low, stored.high))
    if low.shape != high.shape:
        raise UsageError("the ranges file does not hold a low and a high for every dim.")
    if (high < low).any():
        raise UsageError("the ranges file has a dim whose high is below its low.")
    return Ranges(low, high)


def require_codec(version: object, where: object) -> None:
    """Refuse a codec version that this package does not know.

    Raises:
        FormatError: naming the version and the remedy.
        UsageError: likewise, when it is not a number.
    """
    if version != CODEC_VERSION:
        raise (FormatError if type(version) is int else UsageError)(
            f"{where} has codec version {shown(version)} and this m2dexport reads version "
            f"{CODEC_VERSION}; install the m2dexport that made it."
        )


def calibrate_ranges(vectors: Floats) -> Ranges:
    """Return the smallest and largest value of each dim over calibration texts.

    Args:
        vectors: float32 (texts, dim), normalised, of the weight precision that will ship.

    Raises:
        UsageError: when there are too few texts, NaN or infinite values, or a constant dim.
    """
    if len(vectors) < MIN_CALIBRATION_TEXTS:
        raise UsageError(
            f"{len(vectors)} calibration texts are too few to freeze ranges; "
            f"pass at least {MIN_CALIBRATION_TEXTS}."
        )
    if not np.isfinite(vectors).all():
        raise UsageError("the calibration vectors hold NaN or infinite values; check the weights.")
    low, high = vectors.min(axis=0), vectors.max(axis=0)
    if (low == high).any():
        dim = int(np.argmax(low == high))
        raise UsageError(
            f"dim {dim} is constant over the calibration texts; pass texts that differ."
        )
    return Ranges(low.astype(np.float32), high.astype(np.float32))


def normalize(vectors: Floats) -> Floats:
    """Return (texts, dim) vectors divided by their L2 norm; zero vectors stay zero."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    normalized: Floats = vectors / np.maximum(norms, NORM_EPSILON)
    return normalized


def truncate(vectors: Floats, dim: int) -> Floats:
    """Return the leading ``dim`` values of (texts, width) vectors, normalised after the cut."""
    return normalize(vectors[:, :dim])


def cosines(a: NDArray[np.floating], b: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return the cosine of each row of ``a`` with the same row of ``b``, float64 (rows,).

    ``a @ b / (|a| * |b|)`` in float64, so that 1 - cosine is right to about 1e-15; 0 where one row
    is zero, and 1 where both are, as those of a text without tokens are at depth 0.

    Args:
        a: (rows, dim), of any length.
        b: likewise.
    """
    first, second = a.astype(np.float64), b.astype(np.float64)
    lengths = np.linalg.norm(first, axis=1), np.linalg.norm(second, axis=1)
    norms = lengths[0] * lengths[1]
    found: NDArray[np.float64] = (first * second).sum(axis=1) / np.where(norms > 0, norms, 1)
    found[(lengths[0] == 0) & (lengths[1] == 0)] = 1
    return found


def encode_vectors(
    vectors: Floats,
    precision: VectorPrecision,
    ranges: Ranges | None = None,
    bit_order: BitOrder = "big",
) -> NDArray[Any]:
    """Return the codes of normalised float32 (texts, dim) vectors; a row does not see the others.

    * float32: the vectors;
    * int8 (texts, dim): ``clip(floor((x - low) / step), 0, 255) - 128`` in float32, with
      ``step = (high - low) / 255``;
    * int8-symmetric, int8 (texts, dim): ``clip(rint(127 * x), -127, 127)``;
    * int4, uint8 (texts, ceil(dim / 2)): ``clip(floor((x - low) / step), 0, 15)`` with
      ``step = (high - low) / 15``;
    * ubinary, uint8 (texts, ceil(dim / 8)): the bits ``x > 0``;
    * binary, int8 (texts, ceil(dim / 8)): the bytes of ubinary, less 128.

    A row of a packed precision is filled up with zero bits.

    Raises:
        UsageError: when a vector holds NaN or infinite values, or int8 or int4 is asked for without
            ranges, or with ranges of another dim.
    """
    if not np.isfinite(vectors).all():
        row = int(np.argmin(np.isfinite(vectors).all(axis=1)))
        raise UsageError(f"vector {row} holds NaN or infinite values and has no code.")
    if precision == "float32":
        return vectors.astype(np.float32, copy=False)
    if precision == "int8-symmetric":
        top = np.float32(SYMMETRIC_LEVELS)
        return _int8(np.clip(np.rint(vectors * top), -top, top))
    if precision in ("ubinary", "binary"):
        bits = np.packbits(vectors > 0, axis=-1, bitorder=bit_order)
        return bits if precision == "ubinary" else _int8(bits.astype(np.int16) - 128)
    ranges = require_ranges(precision, ranges, vectors.shape[1])
    top = np.float32(LEVELS[precision])
    levels = np.clip(np.floor((vectors - ranges.low) / ranges.step(precision)), 0, top)
    if precision == "int8":
        return _int8(levels - 128)
    return _pack_pairs(levels.astype(np.uint8), bit_order)


def decode_vectors(
    codes: NDArray[Any],
    precision: VectorPrecision,
    dim: int,
    ranges: Ranges | None = None,
    bit_order: BitOrder = "big",
) -> Floats:
    """Return what codes stand for, float32 (texts, dim), not normalised.

    The middle of each level's interval for int8 and int4, code / 127 for int8-symmetric, and signs
    of -1 and 1 for ubinary and binary: their dot product is ``dim - 2 * Hamming distance``.

    Raises:
        UsageError: when the codes are not of this precision and dim, or int8 or int4 codes come
            without ranges, or with ranges of another dim.
    """
    expected = (code_width(dim, precision), code_dtype(precision))
    if (codes.shape[-1], codes.dtype) != expected:
        raise UsageError(
            f"{precision} vectors of {dim} dims are {expected[0]} values of {expected[1]} each, "
            f"not {codes.shape[-1]} of {codes.dtype}."
        )
    if precision == "float32":
        return codes
    if precision == "int8-symmetric":
        symmetric: Floats = codes.astype(np.float32) / np.float32(SYMMETRIC_LEVELS)
        return symmetric
    if precision in ("ubinary", "binary"):
        offset = 128 if precision == "binary" else 0
        packed = (codes.astype(np.int16) + offset).astype(np.uint8)
        bits = np.unpackbits(packed, axis=-1, count=dim, bitorder=bit_order)
        return bits.astype(np.float32) * 2 - 1
    ranges = require_ranges(precision, ranges, dim)
    if precision == "int8":
        levels = codes.astype(np.float32) + 128
    else:
        levels = _unpack_pairs(codes, dim, bit_order).astype(np.float32)
    decoded: Floats = ranges.low + (levels + np.float32(0.5)) * ranges.step(precision)
    return decoded


def require_ranges(precision: VectorPrecision, ranges: Ranges | None, dim: int) -> Ranges:
    """Return ``ranges`` when they can code vectors of ``dim``.

    Raises:
        UsageError: when there are none, or they are of another dim.
    """
    if ranges is None:
        raise UsageError(f"{precision} vectors need ranges, measured on calibration texts.")
    if len(ranges.low) != dim:
        raise UsageError(f"the ranges have {len(ranges.low)} dims and the vectors {dim}.")
    return ranges


def clipping_rate(vectors: Floats, ranges: Ranges) -> float:
    """Return the share of the values of (texts, dim) vectors outside the ranges, 0..1."""
    return float(np.mean((vectors < ranges.low) | (vectors > ranges.high)))


def held_out_clipping_rate(vectors: Floats) -> float:
    """Return the share of an unseen text's values that its ranges will clip, 0..1.

    One in five of the calibration vectors, (texts, dim), is held out and measured against ranges of
    the others.
    """
    held_out = np.arange(len(vectors)) % _HOLD_OUT == 0
    seen = vectors[~held_out]
    return clipping_rate(vectors[held_out], Ranges(seen.min(axis=0), seen.max(axis=0)))


def code_width(dim: int, precision: VectorPrecision) -> int:
    """Return how many values a stored vector has: dims, or bytes of a packed precision."""
    return -(-dim // PER_BYTE.get(precision, 1))


def code_dtype(precision: VectorPrecision) -> np.dtype[Any]:
    """Return the type of a stored vector's values."""
    dtypes: dict[VectorPrecision, DTypeLike] = {
        "float32": np.float32,
        "int4": np.uint8,
        "ubinary": np.uint8,
    }
    return np.dtype(dtypes.get(precision, np.int8))


def bytes_per_vector(dim: int, precision: VectorPrecision) -> int:
    """Return the bytes that one stored vector takes."""
    return code_width(dim, precision) * code_dtype(precision).itemsize


def _int8(codes: NDArray[Any]) -> NDArray[np.int8]:
    return codes.astype(np.int8)


def _pack_pairs(levels: NDArray[np.uint8], bit_order: BitOrder) -> NDArray[np.uint8]:
    padded = np.pad(levels, ((0, 0), (0, levels.shape[1] % 2)))
    first, second = padded[:, 0::2], padded[:, 1::2]
    high, low = (first, second) if bit_order == "big" else (second, first)
    return (high * 16 + low).astype(np.uint8)


def _unpack_pairs(codes: NDArray[np.uint8], dim: int, bit_order: BitOrder) -> NDArray[np.uint8]:
    halves = (codes >> 4, codes & 15)
    pairs = np.stack(halves if bit_order == "big" else halves[::-1], axis=-1)
    return pairs.reshape(len(codes), 2 * codes.shape[1])[:, :dim]
