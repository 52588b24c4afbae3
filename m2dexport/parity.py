"""Parity before hand-over: an artifact must reproduce the torch original on ragged text."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from m2dexport.errors import ParityError

#: Texts on which exporters differ: empty, emoji, other scripts, accents, one token, far too long.
PROBES: tuple[str, ...] = (
    "",
    " ",
    "a",
    "Hello, world!",
    "A man is playing a guitar.",
    "The quick brown fox jumps over the lazy dog near the old stone bridge at noon.",
    "naïve café, Ångström, São Paulo, über",
    "😀 emoji 👩‍👩‍👧 and 🇨🇭 flags 🎉🎉",
    "今日は良い天気ですね。你好，世界。안녕하세요",
    "Привет, как дела? مرحبا بالعالم",
    "def f(x):\n\treturn x ** 2  # 3.14159e-10",
    "http://example.org/a?b=c&d=%20 user@example.org",
    "WHY IS EVERYTHING IN CAPITALS AND WITHOUT PUNCTUATION",
    "one two three four five six seven eight nine ten " * 5,
    "A long text goes past the maximum length of the model. " * 200,
)

#: Largest absolute difference of fp32 vectors, and smallest mean cosine of the others.
MAX_DIFFERENCE = 1e-4
MIN_MEAN_COSINE = {"fp16": 0.9999, "int8": 0.98}
#: A text's vector alone and in a batch: below this cosine, it depends on its neighbours.
MIN_BATCH_COSINE = 0.99999


@dataclass(frozen=True)
class Parity:
    """What was measured between an artifact and the torch original, on final float vectors."""

    texts: int
    max_difference: float  # largest absolute difference of one value
    mean_cosine: float
    min_cosine: float
    batch_cosine: float  # smallest cosine of a text alone to the same text in a mixed batch

    @property
    def batch_invariant(self) -> bool:
        """Whether a text's vector is the same alone and in any batch."""
        return self.batch_cosine >= MIN_BATCH_COSINE


def measure_parity(
    expected: NDArray[np.float32], batched: NDArray[np.float32], alone: NDArray[np.float32]
) -> Parity:
    """Compare an artifact with the original.

    Args:
        expected: the original's float32 (texts, dim) vectors, normalised.
        batched: the artifact's, of all texts in one mixed batch.
        alone: the artifact's, of each text by itself.
    """
    # Each text is judged by the worse of its two vectors.
    cosines = np.minimum(_cosines(expected, batched), _cosines(expected, alone))
    differences = np.maximum(np.abs(expected - batched), np.abs(expected - alone))
    return Parity(
        texts=len(expected),
        max_difference=float(differences.max()),
        mean_cosine=float(cosines.mean()),
        min_cosine=float(cosines.min()),
        batch_cosine=float(_cosines(batched, alone).min()),
    )


def require_parity(parity: Parity, weights: str, name: str) -> None:
    """Refuse an artifact that does not reproduce the original within its precision.

    Raises:
        ParityError: with the figure and the limit.
    """
    if weights == "fp32" and not parity.max_difference <= MAX_DIFFERENCE:
        raise ParityError(
            f"{name} differs from the torch original by {parity.max_difference:.2g} where "
            f"{MAX_DIFFERENCE:g} is allowed; nothing was written."
        )
    limit = MIN_MEAN_COSINE.get(weights, -1.0)
    if not parity.mean_cosine >= limit:
        raise ParityError(
            f"{name} has a mean cosine of {parity.mean_cosine:.4f} to the torch original where "
            f"{weights} needs {limit:g}; nothing was written."
        )


def _cosines(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float64]:
    a, b = a.astype(np.float64), b.astype(np.float64)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosines: NDArray[np.float64] = (a * b).sum(axis=1) / np.maximum(norms, 1e-12)
    return cosines
