"""Golden texts: what a bundle must give on any device, and how far it may be off.

Float results differ between CPUs and thread counts, so vectors are compared within a tolerance
and never by hash.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray

from m2dexport.engines import ENGINES
from m2dexport.errors import BundleError, one_line
from m2dexport.files import SPEC
from m2dexport.runtime.archive import GOLDEN
from m2dexport.runtime.artifact import ArtifactSpec
from m2dexport.runtime.encoder import Encoder
from m2dexport.strict import Within, read_json, shown
from m2dexport.vectors.codecs import code_dtype, code_width, cosines

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

Metric = Literal["max_difference", "min_cosine", "min_equal_bits"]
MAX_DIFFERENCE: Metric = "max_difference"  # largest absolute difference of one value
MIN_COSINE: Metric = "min_cosine"  # smallest cosine of one text's vectors
MIN_EQUAL_BITS: Metric = "min_equal_bits"  # smallest share of equal bits of one text's codes

#: A limit beyond these would let vectors of another model pass.
_LOOSEST: dict[Metric, float] = {MAX_DIFFERENCE: 0.01, MIN_COSINE: 0.9, MIN_EQUAL_BITS: 0.5}


_TokenId = Annotated[int, Within(0, (1 << 31) - 1)]


@dataclass(frozen=True)
class Golden:
    """One text and what it must become."""

    text: str
    prompt: str | None  # name; None: the default
    ids: list[_TokenId]  # specials included, cut at the maximum length
    vector: list[float] | None  # final vector or code; None: only tokenized


@dataclass(frozen=True)
class Tolerance:
    """How far the worst golden text may be off."""

    metric: Metric
    limit: float
    reason: str

    def holds(self, worst: float) -> bool:
        """Whether ``worst`` is within the limit; NaN is not."""
        return worst <= self.limit if self.metric == MAX_DIFFERENCE else worst >= self.limit


@dataclass(frozen=True)
class _Stored:
    tolerance: Tolerance
    texts: Annotated[list[Golden], Within(1, 10_000)]


@dataclass(frozen=True)
class Comparison:
    """The worst of all golden texts, each by itself and in a batch."""

    worst: float  # by the tolerance's metric
    equal_codes: float | None  # share of equal codes, 0..1; None for float32


def golden_of(encoder: Encoder) -> tuple[list[Golden], Tolerance]:
    """Return the golden texts of an artifact, with the results of running it, and a tolerance.

    Args:
        encoder: the artifact, with one thread: the results must not depend on this machine's cores.
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
    metric = _metric(encoder.spec)
    return golden, _tolerance(encoder.spec, metric, compare(encoder, golden, metric).worst)


def compare(encoder: Encoder, golden: Sequence[Golden], metric: Metric) -> Comparison:
    """Run the golden texts, one by one and in batches, and compare with the stored results."""
    rows = [row for row in golden if _runs(row)]
    expected = np.array([row.vector for row in rows], dtype=np.float64)
    worst, equal = [], []
    for batch_size in (1, len(rows)):
        found = _run(encoder, rows, batch_size)
        worst.append(_worst(metric, found, expected, encoder))
        equal.append(float(np.mean(found == expected)))
    is_float = encoder.spec.vectors == "float32"
    pick = max if metric == MAX_DIFFERENCE else min
    # Not pick(worst): a NaN in second place would be passed over.
    value = float("nan") if np.isnan(worst).any() else pick(worst)
    return Comparison(value, None if is_float else min(equal))


def require_golden(
    encoder: Encoder, content: bytes, path: object
) -> tuple[list[Golden], Tolerance, Comparison]:
    """Run the golden texts of a bundle, and refuse an encoder that does not give their vectors.

    Args:
        encoder: of the bundle.
        content: of its golden.json.
        path: the bundle, or a cell of one, for messages.

    Raises:
        BundleError: when a text becomes other tokens here, or the vectors are off by more than the
            tolerance.
    """
    rows, tolerance = golden_from_json(content, encoder.spec)
    _require_ids(encoder, rows, path)
    found = compare(encoder, rows, tolerance.metric)
    if not tolerance.holds(found.worst):
        reason = one_line(tolerance.reason)
        raise BundleError(
            f"{path} does not reproduce its golden vectors on this machine: {tolerance.metric} is "
            f"{found.worst:.6g} where the limit is {tolerance.limit:g} ({reason}) Rebuild "
            "the artifact for this device."
        )
    return rows, tolerance, found


def golden_json(golden: Sequence[Golden], tolerance: Tolerance) -> bytes:
    """Return the content of golden.json."""
    content = asdict(_Stored(tolerance, list(golden)))
    return (json.dumps(content, ensure_ascii=False, sort_keys=True) + "\n").encode()


def golden_from_json(content: bytes, spec: ArtifactSpec) -> tuple[list[Golden], Tolerance]:
    """Return what ``golden_json`` stored.

    Args:
        content: of golden.json.
        spec: the artifact that it must fit.

    Raises:
        BundleError: when it is not that, or would let any vector pass.
    """
    stored = read_json(_Stored, content, GOLDEN, BundleError)
    rows, tolerance = stored.texts, stored.tolerance
    metric, loosest = _metric(spec), _LOOSEST[tolerance.metric]
    if tolerance.metric != metric:
        raise BundleError(
            f"{GOLDEN} compares by {tolerance.metric} where weights={spec.weights} and "
            f"vectors={spec.vectors} are compared by {metric}; build the bundle again."
        )
    low, high = (0.0, loosest) if metric == MAX_DIFFERENCE else (loosest, 1.0)
    if not low <= tolerance.limit <= high:
        raise BundleError(
            f"{GOLDEN} has a limit of {tolerance.limit:g} for {metric}, which must be within "
            f"{low:g} and {high:g}; build the bundle again."
        )
    for number, row in enumerate(rows):
        _require_row(row, number, spec)
    if not any(_runs(row) for row in rows):
        raise BundleError(f"{GOLDEN} has no text to run; build the bundle again.")
    return rows, tolerance


def _require_row(row: Golden, number: int, spec: ArtifactSpec) -> None:
    where = f"{GOLDEN}: text {number}"
    if row.prompt is not None and row.prompt not in spec.prompts:
        raise BundleError(f"{where} has the prompt {shown(row.prompt)}, which {SPEC} lacks.")
    if len(row.ids) > spec.max_length:
        raise BundleError(f"{where} has {len(row.ids)} tokens; {SPEC} allows {spec.max_length}.")
    if (row.vector is not None) != _runs(row):
        raise BundleError(f"{where} has a vector only if it has at most {RUN_TOKENS} tokens.")
    width = code_width(spec.dim, spec.vectors)
    if row.vector is not None and len(row.vector) != width:
        raise BundleError(
            f"{where} has a vector of {len(row.vector)} values; vectors={spec.vectors} of "
            f"{spec.dim} dims have {width}."
        )


def _require_ids(encoder: Encoder, rows: Sequence[Golden], path: object) -> None:
    for row in rows:
        if encoder.tokenize([row.text], prompt=row.prompt)[0] != row.ids:
            raise BundleError(
                f"{path}: {shown(row.text)} (prompt {shown(row.prompt)}) becomes other tokens on "
                "this machine than where the bundle was made; install the same tokenizers version."
            )


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


def _metric(spec: ArtifactSpec) -> Metric:
    if spec.vectors in ("ubinary", "binary"):
        return MIN_EQUAL_BITS
    if spec.vectors != "float32" or _integer(spec) or _narrow(spec):
        return MIN_COSINE
    return MAX_DIFFERENCE


def _integer(spec: ArtifactSpec) -> bool:
    return spec.weights.startswith("int")


def _narrow(spec: ArtifactSpec) -> bool:
    """Say whether the graph computes in 16 bits, and does not just store its weights in them."""
    return ENGINES[spec.engine].on_gpu and spec.weights != "fp32"


def _tolerance(spec: ArtifactSpec, metric: Metric, measured: float) -> Tolerance:
    """Return the limit, from what batches change and what threads and other CPUs add."""
    integer = _integer(spec)
    coarse = integer or (_narrow(spec) and spec.weights == "bf16")
    why = "float sums are taken in another order by more threads and on other CPUs"
    if integer:
        why = f"integer weights: {why}, which moves activations to a neighbouring code"
    if ENGINES[spec.engine].on_gpu:
        why = f"measured by {spec.checked_by}; {why}, and on GPUs"
    if integer and spec.isa != "portable":
        why = f"{why}; made for {spec.isa}: CPUs without it use other, exact kernels"
    if metric == MAX_DIFFERENCE:
        return Tolerance(metric, 1e-4, f"{why}; vectors have length 1 and 7 stored decimals.")
    if metric == MIN_COSINE:
        # One code of int4 that falls on the other side of its border moves a short vector by .002.
        margin = 0.005 if coarse or spec.vectors == "int4" else 0.0005
    else:
        # An angle whose cosine is 1 - 0.005 turns 3.2% of the signs.
        margin = max(0.05 if coarse else 0.01, 1.5 / spec.dim)
    reason = f"{measured:.6f} between batches of one text and more, less {margin:.4f}: {why}."
    return Tolerance(metric, max(_LOOSEST[metric], round(measured - margin, 6)), reason)


def _worst(metric: Metric, found: NDArray[Any], expected: NDArray[Any], encoder: Encoder) -> float:
    """Return the metric of the text that is furthest off; both are codes, (texts, width)."""
    dtype = code_dtype(encoder.spec.vectors)
    found, expected = (
        encoder.codec.decode(codes.astype(dtype)).astype(np.float64) for codes in (found, expected)
    )
    if metric == MIN_EQUAL_BITS:
        return float((found == expected).mean(axis=1).min())
    if metric == MAX_DIFFERENCE:
        return float(np.abs(found - expected).max())
    return float(cosines(found, expected).min())


def _to_list(vector: NDArray[Any]) -> list[float]:
    values: list[float] = vector.tolist()
    if vector.dtype == np.float32:
        return [round(value, 7) for value in values]
    return values
