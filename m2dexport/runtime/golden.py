"""Golden texts: what a bundle must give on any device, and how far it may be off.

Float results differ between CPUs and thread counts, so vectors are compared within a tolerance
and never by hash.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m2dexport.errors import BundleError
from m2dexport.runtime.artifact import ArtifactSpec
from m2dexport.runtime.encoder import Encoder
from m2dexport.vectors.codecs import Ranges, code_dtype, decode_vectors

TEXTS: tuple[str, ...] = (
    "",
    "a",
    "A man is playing a guitar.",
    "Naïve café in São Paulo, Ångström & Über!",
    "😀 👩‍👩‍👧 🇨🇭 🎉",
    "今日は良い天気ですね。你好，世界。안녕하세요",
    "Привет, как дела? مرحبا بالعالم",
    "http://example.org/a?b=c&d=%20 3.14159e-10\tFOO_bar",
)

#: Longer texts are only tokenized: a device may lack the memory for one of 8,192 tokens.
RUN_TOKENS = 1024

MAX_DIFFERENCE = "max_difference"  # largest absolute difference of one value
MIN_COSINE = "min_cosine"  # smallest cosine of one text's vectors
MIN_EQUAL_BITS = "min_equal_bits"  # smallest share of equal bits of one text's codes


@dataclass(frozen=True)
class Golden:
    """One text and what it must become."""

    text: str
    prompt: str | None  # name; None: the default
    ids: list[int]  # token ids, specials included, cut at the maximum length
    vector: list[float] | list[int] | None  # final vector or code; None: only tokenized


@dataclass(frozen=True)
class Tolerance:
    """How far the worst golden text may be off."""

    metric: str  # MAX_DIFFERENCE, MIN_COSINE or MIN_EQUAL_BITS
    limit: float
    reason: str

    def holds(self, worst: float) -> bool:
        """Whether ``worst`` is within the limit; NaN is not."""
        return worst <= self.limit if self.metric == MAX_DIFFERENCE else worst >= self.limit


@dataclass(frozen=True)
class Comparison:
    """The worst of all golden texts, each alone and in a batch."""

    worst: float  # by the tolerance's metric
    equal_codes: float | None  # share of equal codes, 0..1; None for float32


def golden_of(
    encoder: Encoder, other: Encoder, ranges: Ranges | None
) -> tuple[list[Golden], Tolerance]:
    """Return the golden texts of an artifact, with the results of running it, and a tolerance.

    Args:
        encoder: the artifact, with one thread.
        other: the same artifact with another number of threads, to see how much that changes.
        ranges: its ranges, None for a precision without.
    """
    names = [None, *sorted(encoder.spec.prompts)]
    tokenized = [
        Golden(text, name, encoder.tokenize([text], prompt=name)[0], None)
        for name in names
        for text in (*TEXTS, *_long_texts(encoder, name))
    ]
    codes = _run(encoder, [row for row in tokenized if _runs(row)], 1)
    rows = iter(codes)
    golden = [
        Golden(row.text, row.prompt, row.ids, _to_list(next(rows)) if _runs(row) else None)
        for row in tokenized
    ]
    metric = _metric(encoder)
    measured = [compare(each, golden, metric, ranges).worst for each in (encoder, other)]
    worst = max(measured) if metric == MAX_DIFFERENCE else min(measured)
    return golden, _tolerance(encoder, metric, worst)


def compare(
    encoder: Encoder, golden: Sequence[Golden], metric: str, ranges: Ranges | None
) -> Comparison:
    """Run the golden texts, alone and in batches, and compare with the stored results."""
    rows = [row for row in golden if _runs(row)]
    try:
        expected = np.array([row.vector for row in rows], dtype=np.float64)
    except (ValueError, TypeError) as error:
        raise BundleError("the golden vectors are not numbers of one length each.") from error
    worst, equal = [], []
    for batch_size in (1, len(rows)):
        found = _run(encoder, rows, batch_size)
        if found.shape != expected.shape:
            raise BundleError(
                f"the graph puts out {found.shape[1:]} values a text where the golden vectors "
                f"have {expected.shape[1:]}; build the bundle anew."
            )
        worst.append(_worst(metric, found, expected, ranges, encoder.spec))
        equal.append(float(np.mean(found == expected)))
    is_float = encoder.spec.vectors == "float32"
    pick = max if metric == MAX_DIFFERENCE else min
    # Not pick(worst): a NaN in second place would be passed over.
    value = float("nan") if np.isnan(worst).any() else pick(worst)
    return Comparison(value, None if is_float else min(equal))


def golden_json(golden: Sequence[Golden], tolerance: Tolerance) -> bytes:
    """Return the content of golden.json."""
    stored = {"tolerance": asdict(tolerance), "texts": [asdict(row) for row in golden]}
    return (json.dumps(stored, ensure_ascii=False, sort_keys=True) + "\n").encode()


def golden_from_json(content: bytes) -> tuple[list[Golden], Tolerance]:
    """Return what ``golden_json`` stored.

    Raises:
        BundleError: when it is not that.
    """
    try:
        stored: dict[str, Any] = json.loads(content)
        golden = [
            Golden(row["text"], row["prompt"], row["ids"], row["vector"]) for row in stored["texts"]
        ]
        told = stored["tolerance"]
        tolerance = Tolerance(str(told["metric"]), float(told["limit"]), str(told["reason"]))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BundleError(f"golden.json cannot be read: {error!r}.") from error
    if tolerance.metric not in (MAX_DIFFERENCE, MIN_COSINE, MIN_EQUAL_BITS):
        raise BundleError(f"golden.json asks for {tolerance.metric!r}, which is unknown.")
    if not any(_runs(row) for row in golden):
        raise BundleError("golden.json has no text to run.")
    return golden, tolerance


def _runs(row: Golden) -> bool:
    return len(row.ids) <= RUN_TOKENS


def _run(encoder: Encoder, rows: Sequence[Golden], batch_size: int) -> NDArray[Any]:
    """Return the vectors of ``rows``; the prompts are run one after another."""
    parts: dict[int, NDArray[Any]] = {}
    for name in dict.fromkeys(row.prompt for row in rows):
        chosen = [index for index, row in enumerate(rows) if row.prompt == name]
        texts = [rows[index].text for index in chosen]
        vectors = encoder.encode(texts, prompt=name, batch_size=batch_size)
        parts |= dict(zip(chosen, vectors, strict=True))
    return np.stack([parts[index] for index in range(len(rows))])


def _long_texts(encoder: Encoder, prompt: str | None) -> list[str]:
    """Return texts of four times the maximum length, exactly it, and one token less."""
    longest = encoder.spec.max_length
    texts = ["a long text " * (4 * longest // 3 + 1)]
    for word in ("a", "1", "the"):
        one, two = (len(ids) for ids in encoder.tokenize([word, f"{word} {word}"], prompt=prompt))
        count = longest - one + 1  # words of an exact fit, when each further one is one token
        exact, under = (" ".join([word] * max(n, 0)) for n in (count, count - 1))
        lengths = [len(ids) for ids in encoder.tokenize([exact, under], prompt=prompt)]
        if two == one + 1 and count > 1 and lengths == [longest, longest - 1]:
            return [*texts, exact, under]
    return texts  # no room beside the prompt, or an unusual tokenizer


def _metric(encoder: Encoder) -> str:
    if encoder.spec.vectors in ("ubinary", "binary"):
        return MIN_EQUAL_BITS
    if encoder.spec.vectors != "float32" or _integer(encoder):
        return MIN_COSINE
    return MAX_DIFFERENCE


def _integer(encoder: Encoder) -> bool:
    return encoder.spec.weights.startswith("int")


def _tolerance(encoder: Encoder, metric: str, measured: float) -> Tolerance:
    """Return the limit, from what changed on the build machine and what other CPUs add."""
    integer = _integer(encoder)
    why = (
        "integer weights: 8-bit products saturate on CPUs without VNNI"
        if integer
        else "float sums are taken in another order on other CPUs"
    )
    if metric == MAX_DIFFERENCE:
        return Tolerance(metric, 1e-4, f"{why}; vectors have length 1 and 7 stored decimals.")
    if metric == MIN_COSINE:
        # One code of int4 that falls on the other side of its border moves a short vector by .002.
        margin = 0.005 if integer or encoder.spec.vectors == "int4" else 0.0005
        reason = f"{measured:.6f} between thread counts and batches, less {margin:g}: {why}"
        return Tolerance(metric, round(measured - margin, 6), f"{reason}.")
    # An angle whose cosine is 1 - 0.005 turns 3.2% of the signs.
    margin = max(0.05 if integer else 0.01, 1.5 / encoder.spec.dim)
    reason = f"{measured:.4f} between thread counts and batches, less {margin:.4f}: {why}"
    return Tolerance(metric, round(measured - margin, 6), f"{reason}.")


def _worst(
    metric: str,
    found: NDArray[Any],
    expected: NDArray[Any],
    ranges: Ranges | None,
    spec: ArtifactSpec,
) -> float:
    found, expected = (
        decode_vectors(
            codes.astype(code_dtype(spec.vectors)), spec.vectors, spec.dim, ranges, spec.bit_order
        ).astype(np.float64)
        for codes in (found, expected)
    )
    if metric == MIN_EQUAL_BITS:
        return float((found == expected).mean(axis=1).min())
    if metric == MAX_DIFFERENCE:
        return float(np.abs(found - expected).max())
    norms = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
    cosines = (found * expected).sum(axis=1) / np.maximum(norms, 1e-12)
    return float(cosines.min())


def _to_list(vector: NDArray[Any]) -> list[float] | list[int]:
    values: list[float] | list[int] = vector.tolist()
    if vector.dtype == np.float32:
        return [round(value, 7) for value in values]
    return values
