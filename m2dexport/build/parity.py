"""Parity before hand-over: an artifact must reproduce the torch original on ragged text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m2dexport.batches import encode_tokens
from m2dexport.cores import side_by_side
from m2dexport.errors import ParityError
from m2dexport.vectors.codecs import Ranges, cosines, encode_vectors

Floats = NDArray[np.float32]
#: From int64 (batch, sequence) ids and mask to ``batch`` rows.
Run = Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[Any]]

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

#: Largest absolute difference of a value where weights are not quantized.
MAX_DIFFERENCE = 1e-4
#: A text's vector by itself and in a batch: below this cosine, or with fewer equal int8 and ubinary
#: codes, it depends on its batch. Stored codes show far smaller differences than cosines.
MIN_BATCH_COSINE = 0.99999
MIN_BATCH_CODES = 0.999
_MORE_PADDING = 16  # tokens beyond twice a text's length


@dataclass(frozen=True)
class Embedded:
    """The probes' vectors in different company, one row a text."""

    batched: Floats  # of all texts in one mixed batch
    alone: Floats  # of each text by itself
    padded: Floats  # of each text by itself, padded to more than twice its length


@dataclass(frozen=True)
class Parity:
    """What was measured between an artifact and the torch original, on final float vectors."""

    texts: int
    max_difference: float  # largest absolute difference of one value
    mean_cosine: float
    min_cosine: float
    batch_cosine: float  # smallest cosine of a text alone to itself in a batch or padded
    batch_codes: float  # smallest share of int8 or ubinary codes that are equal in both, 0..1

    @property
    def batch_invariant(self) -> bool:
        """Whether a text's vector is the same alone, in any batch and under any padding."""
        return self.batch_cosine >= MIN_BATCH_COSINE and self.batch_codes >= MIN_BATCH_CODES


def embed_probes(
    run: Run, ids: Sequence[Sequence[int]], pad_id: int, max_length: int, workers: int = 1
) -> Embedded:
    """Run the probes alone, in one mixed batch, and alone under more padding than they need.

    Args:
        run: the model; its rows may have any shape.
        ids: the token ids of each probe.
        pad_id: the id that fills a batch.
        max_length: tokens at most, padding included.
        workers: requests that run at once.
    """

    def padded(input_ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[Any]:
        width = input_ids.shape[1]
        more = ((0, 0), (0, min(width + _MORE_PADDING, max_length - width)))
        return run(np.pad(input_ids, more, constant_values=pad_id), np.pad(mask, more))

    def rows(asked: tuple[Run, Sequence[Sequence[int]]]) -> Floats:
        found = encode_tokens(asked[0], asked[1], pad_id, len(ids))
        assert found is not None
        return found

    alone = [[text] for text in ids]
    asked = [(run, ids), *((run, text) for text in alone), *((padded, text) for text in alone)]
    batched, *others = side_by_side(rows, asked, workers)
    by_company = others[: len(ids)], others[len(ids) :]
    return Embedded(batched, *(np.concatenate(each) for each in by_company))


def measure_parity(expected: Floats, found: Embedded) -> Parity:
    """Compare an artifact with the original, and with itself in different company.

    Args:
        expected: the original's float32 (texts, dim) vectors, normalised.
        found: the artifact's, normalised.
    """
    company = (found.batched, found.alone, found.padded)
    # Each text is judged by the worst of its vectors.
    worst = np.minimum.reduce([cosines(expected, vectors) for vectors in company])
    ranges = _ranges(found.alone)
    return Parity(
        texts=len(expected),
        max_difference=max(float(np.abs(expected - vectors).max()) for vectors in company),
        mean_cosine=float(worst.mean()),
        min_cosine=float(worst.min()),
        batch_cosine=min(float(cosines(found.alone, v).min()) for v in company),
        batch_codes=min(_equal_codes(found.alone, vectors, ranges) for vectors in company),
    )


def _ranges(vectors: Floats) -> Ranges:
    """Return the probes' own ranges, wider than their extremes, which would lie on a border."""
    low, high = vectors.min(axis=0), vectors.max(axis=0)
    margin = (high - low) * np.float32(0.05)
    return Ranges(low - margin, high + margin)


def _equal_codes(a: Floats, b: Floats, ranges: Ranges) -> float:
    """Return the share of equal codes, of int8 or of single bits, whichever is smaller."""
    int8 = encode_vectors(a, "int8", ranges) == encode_vectors(b, "int8", ranges)
    return float(min(np.mean(int8), np.mean((a > 0) == (b > 0))))


def require_finite(vectors: Floats, name: str) -> None:
    """Refuse vectors that hold NaN or infinite values.

    Raises:
        ParityError: naming the artifact.
    """
    if not np.isfinite(vectors).all():
        raise ParityError(f"{name} returns NaN or infinite values for some texts.")


def require_parity(parity: Parity, floor: float | None, name: str) -> None:
    """Refuse an artifact that does not reproduce the original within its precision.

    Args:
        parity: what was measured.
        floor: the smallest mean cosine that will do; None: values must be equal up to
            ``MAX_DIFFERENCE``.
        name: what the message calls the artifact.

    Raises:
        ParityError: with the figure and the limit.
    """
    if floor is None and not parity.max_difference <= MAX_DIFFERENCE:
        raise ParityError(
            f"{name} differs from the torch original by {parity.max_difference:.2g} where "
            f"{MAX_DIFFERENCE:g} is allowed."
        )
    if floor is not None and not parity.mean_cosine >= floor:
        raise ParityError(
            f"{name} has a mean cosine of {parity.mean_cosine:.4f} to the torch original where "
            f"{floor:g} is needed."
        )


def require_batch_invariance(parity: Parity, name: str) -> None:
    """Refuse an artifact whose vectors depend on the texts beside them or on padding.

    Raises:
        ParityError: with the figures and the limits.
    """
    if not parity.batch_invariant:
        raise ParityError(
            f"{name}: a text's vector depends on its batch (cosine {parity.batch_cosine:.6f}, "
            f"{parity.batch_codes:.2%} of codes equal, where {MIN_BATCH_COSINE:g} and "
            f"{MIN_BATCH_CODES:.1%} are needed); choose other weights, or pass "
            "--allow-batch-dependent to have it run one text at a time."
        )
