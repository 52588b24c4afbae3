"""Which scales int8 takes for the values that matrices multiply, and the codes that follow.

All of it is numpy, on calibration rows, and knows no graph: inputs can be fitted side by side.
``int8`` says what the two kinds of scales are, and writes them into a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from m2dexport.precisions import Isa
from m2dexport.quantize.codes import symmetric_int8
from m2dexport.quantize.rounding import round_weights

Floats = NDArray[np.float32]

ZERO = 128  # the code of 0.0 in signed inputs
TINY = np.float32(1e-10)  # the scale of a token that is all zeros
_SMOOTHING = 0.85  # a in the formula of ``int8``
_MARGIN = 1.15  # fixed ranges are this much wider than what the calibration texts show
#: A channel spikes when it goes this far beyond the typical channel; so many at most are kept wide.
_TOKEN_SPIKE = 2.0
_FIXED_SPIKE = 3.0
_MOST_SPIKES = 16
#: Keeping spikes wide takes three more operators: their error without must be this many times more.
_SPIKES_PAY = 1.25
#: A fixed scale is faster; beyond this many times the error of per-token scales it is not used.
_FIXED_MAX_ERROR = 4.0


@dataclass(frozen=True)
class Seen:
    """What was seen of one value that matrices multiply."""

    rows: Floats  # (rows, in), its values on calibration texts
    floor: float  # below which it never falls, as a positive number; 0: there is no such bound
    normed: bool  # whether it comes out of a norm, so that fixed scales may do


@dataclass(frozen=True)
class FixedScales:
    """``codes = round(x * factor + centre) + 128``, the same for every token."""

    factor: Floats  # (in,)
    centre: Floats  # (in,)
    spikes: NDArray[np.int64]  # channels that are multiplied in float32 instead


@dataclass(frozen=True)
class TokenScales:
    """``codes = round((x + shift) / scale) + zero``; a token's largest is ``levels`` scales."""

    shift: float  # makes every value positive, where there is a known lower bound; else 0
    cap: float  # the largest value, after the shift, that codes must reach
    spikes: NDArray[np.int64]  # channels that are multiplied in float32 instead

    @property
    def levels(self) -> int:
        """The largest code, less the code of zero."""
        return 255 if self.shift else 127

    @property
    def zero(self) -> int:
        """The code of zero."""
        return 0 if self.shift else ZERO


@dataclass(frozen=True)
class Codes:
    """One matrix in codes, fitted to what it multiplies."""

    values: NDArray[np.int8]  # (in, out)
    scale: Floats  # (out,)
    bias: Floats  # (out,), which takes what quantization adds to the mean output off it
    spikes: Floats  # (spikes, out), the rows that stay in float32


@dataclass(frozen=True)
class Fitted:
    """The scales of one value, and the matrices that it meets."""

    scales: FixedScales | TokenScales
    codes: tuple[Codes, ...]


_Scales = TypeVar("_Scales", FixedScales, TokenScales)


def fit_scales(seen: Seen, weights: Sequence[Floats], isa: Isa, *, per_token: bool) -> Fitted:
    """Return the fastest kind of scales that does for a value, and its matrices' codes.

    Args:
        seen: the value.
        weights: the matrices that multiply it, (in, out) each.
        isa: "portable" makes codes whose products no processor saturates, "vnni" finer ones.
        per_token: whether scales of that kind are of use; else they come without codes.
    """
    scales = _choose_scales(seen, np.concatenate(weights, axis=1))
    if isinstance(scales, TokenScales) and not per_token:
        return Fitted(scales, ())
    return Fitted(scales, tuple(_codes_of(weight, seen.rows, scales, isa) for weight in weights))


def _codes_of(weight: Floats, rows: Floats, scales: FixedScales | TokenScales, isa: Isa) -> Codes:
    narrow, wide = _narrow(weight, scales.spikes), rows[:, scales.spikes] @ weight[scales.spikes]
    if isinstance(scales, FixedScales):
        codes = _fixed_values(rows, scales)
        values, scale = round_weights(narrow / scales.factor[:, None], codes, isa)
        product = (codes @ values) * scale
    else:
        codes, token_scale = _token_values(rows, scales)
        values, scale = round_weights(narrow, codes * token_scale, isa)
        product = (codes @ values) * token_scale * scale
    error = rows @ weight - product - wide
    return Codes(values, scale, error.mean(axis=0), weight[scales.spikes])


def _choose_scales(seen: Seen, weight: Floats) -> FixedScales | TokenScales:
    """Return the fastest kind of scales whose error on the calibration rows is not much larger."""
    rows, exact = seen.rows, seen.rows @ weight

    def error_of(scales: FixedScales | TokenScales) -> float:
        return _error(rows, weight, exact, scales)

    token, error = _with_spikes_that_pay(
        lambda most: _token_scales(rows, seen.floor, most), error_of
    )
    if not seen.normed:
        return token
    fixed, fixed_error = _with_spikes_that_pay(
        lambda most: _fixed_scales(rows, weight, most), error_of
    )
    return fixed if fixed_error <= _FIXED_MAX_ERROR * error else token


def _with_spikes_that_pay(
    scales_of: Callable[[int], _Scales], error_of: Callable[[_Scales], float]
) -> tuple[_Scales, float]:
    """Return the scales without spikes, or with, where that is much better, and their error."""
    plain, wide = scales_of(0), scales_of(_MOST_SPIKES)
    error = error_of(plain)
    if not wide.spikes.size:
        return plain, error
    wide_error = error_of(wide)
    return (wide, wide_error) if error > _SPIKES_PAY * wide_error else (plain, error)


def _error(rows: Floats, weight: Floats, exact: Floats, scales: FixedScales | TokenScales) -> float:
    """Return the square of what 8 bits, rounded to nearest, miss of the worst of the products.

    A constant error does not count: it is taken off the bias. The mean over all tokens would not
    see the few in which a channel spikes, and these decide about the worst text.
    """
    if isinstance(scales, FixedScales):
        seen, moved = _fixed_values(rows, scales), weight / scales.factor[:, None]
    else:
        codes, scale = _token_values(rows, scales)
        seen, moved = codes * scale, weight
    weight_codes, weight_scale = symmetric_int8(_narrow(moved, scales.spikes), axis=0)
    error = exact - seen @ (weight_codes * weight_scale)
    error -= rows[:, scales.spikes] @ weight[scales.spikes]
    return float(np.square(error - error.mean(axis=0)).sum(axis=1).max())


def _fixed_scales(rows: Floats, weight: Floats, most_spikes: int) -> FixedScales:
    low, high = rows.min(axis=0), rows.max(axis=0)
    half = np.maximum((high - low) / 2 * np.float32(_MARGIN), np.float32(1e-6))
    spikes = _spikes(half, _FIXED_SPIKE, most_spikes)
    half[spikes] = np.median(half)
    smooth = half**_SMOOTHING / np.maximum(np.abs(weight).max(axis=1), 1e-6) ** (1 - _SMOOTHING)
    factor = (127 / (half / smooth).max() / smooth).astype(np.float32)
    return FixedScales(factor, -(low + high) / 2 * factor, spikes)


def _fixed_values(rows: Floats, fixed: FixedScales) -> Floats:
    """Mirror ``int8`` in numpy: the codes of (rows, in), less their zero."""
    values: Floats = np.clip(np.round(rows * fixed.factor + fixed.centre), -ZERO, 255 - ZERO)
    return values


def _token_scales(rows: Floats, shift: float, most_spikes: int) -> TokenScales:
    largest = np.abs(rows + np.float32(shift)).max(axis=0)
    spikes = _spikes(largest, _TOKEN_SPIKE, most_spikes)
    if not spikes.size:
        return TokenScales(shift, float("inf"), spikes)
    # Above the largest of the other channels, so that a new text does not reach it there.
    others = float(np.delete(largest, spikes).max())
    cap = max(_TOKEN_SPIKE * float(np.median(largest)), _MARGIN * others)
    return TokenScales(shift, cap, spikes)


def _spikes(largest: Floats, factor: float, most: int) -> NDArray[np.int64]:
    """Return the ``most`` or fewer channels beyond ``factor`` times the typical channel."""
    order = np.argsort(-largest, kind="stable")[:most]
    found: NDArray[np.int64] = np.sort(order[largest[order] > factor * np.median(largest)])
    return found


def _narrow(weight: Floats, spikes: NDArray[np.int64]) -> Floats:
    """Return a weight without the rows of spikes, beside which the other rows would be coarse."""
    narrow: Floats = weight.copy()
    narrow[spikes] = 0
    return narrow


def _token_values(rows: Floats, scales: TokenScales) -> tuple[Floats, Floats]:
    """Mirror ``int8`` in numpy: codes less their zero, (rows, in), and scale, (rows, 1)."""
    moved = rows + np.float32(scales.shift)
    largest = np.clip(np.abs(moved).max(axis=1, keepdims=True), TINY, np.float32(scales.cap))
    scale = largest / np.float32(scales.levels)
    low = 0 if scales.shift else -scales.levels
    values: Floats = np.clip(np.round(moved / scale), low, scales.levels)
    return values, scale
