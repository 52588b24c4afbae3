"""Vector precision: float32, int8 and ubinary codes of a normalised vector, in numpy alone.

The codes are those of ``sentence_transformers.util.quantize_embeddings`` (6.2) given the same
ranges, bit for bit; golden files pin them.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from m2dexport.errors import UsageError

VectorPrecision = Literal["float32", "int8", "ubinary"]
VECTOR_PRECISIONS: tuple[VectorPrecision, ...] = get_args(VectorPrecision)

Floats = NDArray[np.float32]

#: Fewer texts than this say too little about where a dim's values lie.
MIN_CALIBRATION_TEXTS = 100
_LEVELS = np.float32(255)
_TINY = np.float32(1e-12)  # of torch.nn.functional.normalize


@dataclass(frozen=True)
class Ranges:
    """The frozen range of each dim of int8 vectors, measured once on calibration texts."""

    low: Floats  # (dim,): coded as -128
    high: Floats  # (dim,): coded as 127

    @property
    def step(self) -> Floats:
        """Width of one code, float32 (dim,); 1 where the range is empty."""
        step: Floats = (self.high - self.low) / _LEVELS
        step[step == 0] = 1
        return step

    def sha256(self) -> str:
        """Return a hash of the values."""
        values = np.stack([self.low, self.high]).astype("<f4")
        return hashlib.sha256(values.tobytes()).hexdigest()

    def to_json(self) -> str:
        """Return the text of ranges.json; float32 values survive the round trip exactly."""
        return json.dumps({"low": self.low.tolist(), "high": self.high.tolist()}) + "\n"


def ranges_from_json(text: str) -> Ranges:
    """Return the ranges stored by ``Ranges.to_json``.

    Raises:
        UsageError: when the text is not that.
    """
    try:
        stored: dict[str, Any] = json.loads(text)
        low, high = (np.asarray(stored[key], dtype=np.float32) for key in ("low", "high"))
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError("the ranges file is not JSON with a list of low and high.") from error
    if low.ndim != 1 or low.shape != high.shape or not np.isfinite([low, high]).all():
        raise UsageError("the ranges file does not hold a finite low and high for every dim.")
    if (high < low).any():
        raise UsageError("the ranges file has a dim whose high is below its low.")
    return Ranges(low, high)


def calibrate_ranges(vectors: Floats) -> Ranges:
    """Return the smallest and largest value of each dim over calibration texts.

    Args:
        vectors: float32 (texts, dim), normalised, of the weight precision that will ship.

    Raises:
        UsageError: when there are too few texts, NaN or infinite values, or a constant dim.
    """
    if len(vectors) < MIN_CALIBRATION_TEXTS:
        raise UsageError(
            f"{len(vectors)} calibration texts are too few for int8 ranges; "
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
    normalized: Floats = vectors / np.maximum(norms, _TINY)
    return normalized


def truncate(vectors: Floats, dim: int) -> Floats:
    """Return the leading ``dim`` values, normalised after the cut."""
    return normalize(vectors[:, :dim])


def encode_vectors(
    vectors: Floats, precision: VectorPrecision, ranges: Ranges | None = None
) -> NDArray[Any]:
    """Return the codes of normalised float32 (texts, dim) vectors.

    * float32: the vectors;
    * int8 (texts, dim): ``clip(floor((x - low) / step), 0, 255) - 128`` in float32, with
      ``step = (high - low) / 255``;
    * ubinary, uint8 (texts, ceil(dim / 8)): ``x > 0``, first dim in the highest bit, each row
      padded with zero bits.

    Raises:
        UsageError: when int8 is asked for without ranges, or with ranges of another dim.
    """
    if precision == "float32":
        return vectors.astype(np.float32, copy=False)
    if precision == "ubinary":
        bits: NDArray[np.uint8] = np.packbits(vectors > 0, axis=-1)
        return bits
    if ranges is None:
        raise UsageError("int8 vectors need ranges, measured on calibration texts.")
    if len(ranges.low) != vectors.shape[1]:
        raise UsageError(
            f"the ranges have {len(ranges.low)} dims and the vectors {vectors.shape[1]}."
        )
    levels = np.clip(np.floor((vectors - ranges.low) / ranges.step), 0, _LEVELS)
    codes: NDArray[np.int8] = (levels - 128).astype(np.int8)
    return codes


def decode_int8(codes: NDArray[np.int8], ranges: Ranges) -> Floats:
    """Return the middle of each code's interval, float32 (texts, dim)."""
    levels = codes.astype(np.float32) + np.float32(128.5)
    decoded: Floats = ranges.low + levels * ranges.step
    return decoded


def clipping_rate(vectors: Floats, ranges: Ranges) -> float:
    """Return the share of values outside the ranges, 0..1."""
    return float(np.mean((vectors < ranges.low) | (vectors > ranges.high)))


def bytes_per_vector(dim: int, precision: VectorPrecision) -> int:
    """Return the bytes that one stored vector takes."""
    return {"float32": 4 * dim, "int8": dim, "ubinary": -(-dim // 8)}[precision]
