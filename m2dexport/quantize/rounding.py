"""Rounding of a weight matrix to 8 bits: later rows compensate for the errors of earlier ones."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

from m2dexport.precisions import Isa
from m2dexport.quantize.saturation import MAX_PAIR

Floats = NDArray[np.float32]

#: Largest codes to try. Up to 64, no two neighbours exceed ``MAX_PAIR``. Larger ones make steps
#: finer, but help less the more neighbours reach that limit.
_LARGEST = {"portable": (64, 80, 100), "vnni": (127,)}

_DAMPING = 0.01  # of the mean diagonal, as in GPTQ
_BLOCK = 64


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
    rows, columns = rest.shape
    codes = np.zeros((rows, columns), dtype=np.float32)
    for start in range(0, rows, _BLOCK):
        stop = min(rows, start + _BLOCK)
        errors = np.zeros((stop - start, columns), dtype=np.float32)
        for row in range(start, stop):
            limited = isa == "portable" and row % 2
            neighbour = codes[row - 1] if limited else np.zeros(columns, dtype=np.float32)
            codes[row] = _round_row(rest[row], neighbour, largest)
            error = (rest[row] - codes[row]) / spread[row, row]
            errors[row - start] = error
            rest[row + 1 : stop] -= spread[row, row + 1 : stop, None] * error
        rest[stop:] -= spread[start:stop, stop:].T @ errors
    return codes


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
