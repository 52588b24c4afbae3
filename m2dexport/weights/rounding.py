"""Rounding of a weight matrix to 8 bits, where each row makes up for the errors of those before."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

Floats = NDArray[np.float32]

#: Largest sum of two neighbouring codes of the same sign. x86 processors without VNNI add the
#: products of two neighbouring unsigned and signed bytes in 16 bits, and saturate (onnxruntime
#: issue 14642): 255 * 128 < 2**15, so these codes never do, on any input. Opposite signs cannot
#: overflow.
_PAIR = 128
#: Largest codes that are tried. Up to 64, the limit never bites; above, steps are finer, and the
#: more neighbours meet the limit the less that helps.
_LARGEST = (64, 80, 100)

_DAMPING = 0.01  # of the mean diagonal, as in GPTQ
_BLOCK = 64


def round_weights(weight: Floats, inputs: Floats) -> tuple[NDArray[np.int8], Floats]:
    """Return int8 codes (in, out) and the float32 scale (out,) of each output channel.

    GPTQ (Frantar et al. 2022, algorithm 1) on the quantized inputs that the matrix will really
    meet: rows are rounded one after another, and what a row's rounding changes in the output is
    spread over the rows that are still to come. Every code is such that the integer product is
    exact on all processors.

    Args:
        weight: (in, out).
        inputs: (rows, in), the dequantized inputs of the calibration texts.
    """
    hessian = (inputs.T @ inputs).astype(np.float64) / len(inputs)
    spread = _spread(hessian)
    widest = np.maximum(np.abs(weight).max(axis=0), 1e-12)
    best: tuple[float, NDArray[np.int8], Floats] | None = None
    for largest in _LARGEST:
        scale = widest / np.float32(largest)
        codes = _compensated(weight / scale, spread, largest)
        error = (codes * scale - weight).astype(np.float64)
        loss = float(np.einsum("io,io->", error, hessian @ error))
        if best is None or loss < best[0]:
            best = loss, codes.astype(np.int8), scale
    assert best is not None
    return best[1], best[2]


def _compensated(rest: Floats, spread: Floats, largest: int) -> Floats:
    """Round the rows of a weight in units of its scale; ``rest`` is used up."""
    rows, columns = rest.shape
    codes = np.zeros((rows, columns), dtype=np.float32)
    for start in range(0, rows, _BLOCK):
        stop = min(rows, start + _BLOCK)
        errors = np.zeros((stop - start, columns), dtype=np.float32)
        for row in range(start, stop):
            neighbour = codes[row - 1] if row % 2 else np.zeros(columns, dtype=np.float32)
            codes[row] = _round_row(rest[row], neighbour, largest)
            error = (rest[row] - codes[row]) / spread[row, row]
            errors[row - start] = error
            rest[row + 1 : stop] -= spread[row, row + 1 : stop, None] * error
        rest[stop:] -= spread[start:stop, stop:].T @ errors
    return codes


def _round_row(values: Floats, neighbour: Floats, largest: int) -> Floats:
    """Round one row within what the row before it leaves free."""
    high = np.minimum(largest, _PAIR - np.maximum(neighbour, 0))
    low = np.maximum(-largest, -_PAIR - np.minimum(neighbour, 0))
    rounded: Floats = np.clip(np.round(values), low, high)
    return rounded


def _spread(hessian: NDArray[np.float64]) -> Floats:
    """Return the upper Cholesky factor of the damped inverse Hessian, (in, in)."""
    mean = float(np.mean(np.diag(hessian)))
    damped = hessian + np.eye(len(hessian)) * (_DAMPING * mean if mean > 0 else 1.0)
    inverse = linalg.cho_solve(linalg.cho_factor(damped), np.eye(len(damped)))
    upper: Floats = linalg.cholesky(inverse).astype(np.float32)
    return upper
