"""Rounding of a weight matrix: later rows compensate for the errors of earlier ones (GPTQ)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

from m2dexport.precisions import Isa
from m2dexport.quantize.saturation import MAX_PAIR

Floats = NDArray[np.float32]
Bits = Literal[4, 8]

#: Largest codes to try. Up to 64, no two neighbours exceed ``MAX_PAIR``. Larger ones make steps
#: finer, but help less the more neighbours reach that limit.
_LARGEST = {"portable": (64, 80, 100), "vnni": (127,)}

_DAMPING = 0.01  # of the mean diagonal, as in GPTQ
_BLOCK = 64
#: Shares of a block's largest value that 4-bit codes reach, for trial: larger ones then saturate.
_SHARES = np.linspace(1.0, 0.65, 8, dtype=np.float32)
LEAST_SCALE = np.float32(2**-24)  # the smallest float16 above 0


def round_weights(weight: Floats, inputs: Floats, isa: Isa) -> tuple[NDArray[np.int8], Floats]:
    """Return int8 codes (in, out) and the float32 scale (out,) of each output channel.

    GPTQ (Frantar et al. 2022, algorithm 1) on the quantized inputs that the matrix will really get:
    rows are rounded one after another, and the rows still to come compensate for the change that
    rounding a row makes to the output.

    Args:
        weight: (in, out).
        inputs: (rows, in), the dequantized inputs of the calibration texts.
        isa: "portable" limits neighbouring codes so that no processor's product can saturate;
            of the largest codes tried, the one with the smallest error is taken.
    """
    hessian = (inputs.T @ inputs).astype(np.float64) / len(inputs)
    spread = _spread(hessian)
    widest = np.maximum(np.abs(weight).max(axis=0), 1e-12)
    best: tuple[float, NDArray[np.int8], Floats] | None = None
    for largest in _LARGEST[isa]:
        scale = widest / np.float32(largest)
        codes = _compensated(weight / scale, spread, largest, isa)
        error = (codes * scale - weight).astype(np.float64)
        loss = float(np.einsum("io,io->", error, hessian @ error))
        if best is None or loss < best[0]:
            best = loss, codes.astype(np.int8), scale
    assert best is not None
    return best[1], best[2]


def _compensated(rest: Floats, spread: Floats, largest: int, isa: Isa) -> Floats:
    """Round the rows of a weight, in units of its scale; overwrites ``rest``."""
    codes = np.zeros_like(rest)
    nothing = np.zeros(rest.shape[1], dtype=np.float32)

    def rounded(row: int) -> Floats:
        neighbour = codes[row - 1] if isa == "portable" and row % 2 else nothing
        codes[row] = kept = _round_row(rest[row], neighbour, largest)
        return kept

    for start in range(0, len(rest), _BLOCK):
        _round_together(rest, spread, range(start, min(len(rest), start + _BLOCK)), rounded)
    return codes


def _round_together(
    rest: Floats, spread: Floats, rows: range, rounded: Callable[[int], Floats]
) -> None:
    """Round some rows one after another; all rows behind them compensate, in ``rest``.

    Args:
        rest: (in, out), what is still to be represented; overwritten.
        spread: of ``_spread``.
        rows: those to round.
        rounded: from the number of a row to what rounding leaves of it.
    """
    errors = np.zeros((len(rows), rest.shape[1]), dtype=np.float32)
    stop = rows.stop
    for row in rows:
        error = (rest[row] - rounded(row)) / spread[row, row]
        errors[row - rows.start] = error
        rest[row + 1 : stop] -= spread[row, row + 1 : stop, None] * error
    rest[stop:] -= spread[rows.start : stop, stop:].T @ errors


def round_blocks(
    weight: Floats, inputs: Floats, bits: Bits, block: int
) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """Return symmetric codes (in, out) and the float16 scale (in / block, out) of each block.

    GPTQ as in ``round_weights``; a block's scale is chosen once the rows before it have been
    rounded, among eight shares of its largest value, by the squared error that is left.

    Args:
        weight: (in, out).
        inputs: (rows, in), the inputs of the calibration texts.
        bits: 8 makes codes of -127 to 127, 4 of -7 to 7.
        block: values along the first axis that share a scale; it must divide it.
    """
    largest = largest_code(bits)
    spread = _spread((inputs.T @ inputs).astype(np.float64) / len(inputs))
    rest = weight.copy()
    codes = np.zeros(weight.shape, dtype=np.int8)
    scales = np.zeros((len(weight) // block, weight.shape[1]), dtype=np.float16)
    for index, start in enumerate(range(0, len(weight), block)):
        scales[index] = block_scale(rest[start : start + block], bits)
        scale = scales[index].astype(np.float32)

        def rounded(row: int, scale: Floats = scale) -> Floats:
            values = np.clip(np.round(rest[row] / scale), -largest, largest)
            codes[row] = values
            kept: Floats = values * scale
            return kept

        _round_together(rest, spread, range(start, start + block), rounded)
    return codes, scales


def block_scale(values: Floats, bits: Bits) -> NDArray[np.float16]:
    """Return the scale (out,) of a block (rows, out) that leaves the smallest squared error."""
    largest = largest_code(bits)
    widest = np.abs(values).max(axis=0) / np.float32(largest)
    best = np.zeros(values.shape[1], dtype=np.float16)
    least = np.full(values.shape[1], np.inf, dtype=np.float32)
    for share in _SHARES if bits == 4 else _SHARES[:1]:
        scale = np.maximum(widest * share, LEAST_SCALE).astype(np.float16)
        wide = scale.astype(np.float32)
        kept = np.clip(np.round(values / wide), -largest, largest) * wide
        error = np.square(kept - values).sum(axis=0)
        best, least = np.where(error < least, scale, best), np.minimum(error, least)
    return best


def largest_code(bits: Bits) -> int:
    """Return the largest of a block's symmetric codes; the smallest is its negative."""
    return 127 if bits == 8 else 7


def _round_row(values: Floats, neighbour: Floats, largest: int) -> Floats:
    """Round one row within the limit that the row before it leaves."""
    high = np.minimum(largest, MAX_PAIR - np.maximum(neighbour, 0))
    low = np.maximum(-largest, -MAX_PAIR - np.minimum(neighbour, 0))
    rounded: Floats = np.clip(np.round(values), low, high)
    return rounded


def _spread(hessian: NDArray[np.float64]) -> Floats:
    """Return the upper Cholesky factor of the damped inverse Hessian, (in, in)."""
    mean = float(np.mean(np.diag(hessian)))
    damped = hessian + np.eye(len(hessian)) * (_DAMPING * mean if mean > 0 else 1.0)
    inverse = linalg.cho_solve(linalg.cho_factor(damped), np.eye(len(damped)))
    upper: Floats = linalg.cholesky(inverse).astype(np.float32)
    return upper
