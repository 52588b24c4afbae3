"""golden.json: what a bundle must give on any device, stage by stage, and how far it may be off.

Float results differ between CPUs and releases of an engine, so vectors are compared within a
tolerance and never by hash. ``spread`` makes all of this.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray

from m2dexport.engines import ENGINES
from m2dexport.errors import BundleError, DriftError, M2DError, one_line
from m2dexport.files import SPEC
from m2dexport.runtime.archive import GOLDEN
from m2dexport.runtime.artifact import ArtifactSpec
from m2dexport.runtime.encoder import Encoder
from m2dexport.runtime.tolerance import (
    LOOSEST,
    MIN_EQUAL_BITS,
    Metric,
    Spread,
    Tolerance,
    metric_of,
    tolerance_of,
)
from m2dexport.strict import Within, read_json, shown
from m2dexport.vectors.codecs import code_dtype, code_width, encode_vectors

#: Longer texts are only tokenized: a device may lack the memory for one of 8,192 tokens.
RUN_TOKENS = 1024
#: Different texts of every prompt: the fixed ones of ``golden_texts`` and the overlong one.
MIN_TEXTS = 11
TOP = 3  # documents of each query whose order counts


#: Coordinates of vectors of length 1, codes and packed bytes are far within this.
_Value = Annotated[float, Within(-1e6, 1e6)]
#: Similarities are stored with six decimals, of products that a search may add in another order.
_ROUNDED = 1e-5

_TokenId = Annotated[int, Within(0, (1 << 31) - 1)]
_Row = Annotated[int, Within(0, 9_999)]
_Cosine = Annotated[float, Within(-1.001, 1.001)]


@dataclass(frozen=True)
class Golden:
    """One text and what it must become, stage by stage."""

    text: str
    prompt: str | None  # name; None: the default
    ids: list[_TokenId]  # specials included, cut at the maximum length
    #: What the codec is given, float32 (dim,): after pooling, cut and normalisation. None: it is
    #: the vector (float32), the text is only tokenized, or a GPU's engine made the vector.
    pooled: list[_Value] | None
    vector: list[_Value] | None  # final vector or code; None: only tokenized


@dataclass(frozen=True)
class Order:
    """A small corpus: which documents each query finds, by the search of the codec."""

    documents: Annotated[list[str], Within(TOP, 1_000)]
    queries: Annotated[list[str], Within(1, 1_000)]
    document_prompt: str | None  # name; None: the default
    query_prompt: str | None
    similarity: list[list[_Cosine]]  # (queries, documents)
    nearest: list[list[_Row]]  # (queries, 3): rows of the documents, the most similar first


@dataclass(frozen=True)
class GoldenFile:
    """The content of golden.json."""

    tolerance: Tolerance
    spread: Spread
    texts: Annotated[list[Golden], Within(1, 10_000)]
    order: Order

    def to_json(self) -> bytes:
        """Return the content of golden.json: the same results are the same bytes."""
        content = json.dumps(
            asdict(self), ensure_ascii=False, sort_keys=True, separators=(",", ":")
        )
        return f"{content}\n".encode()


@dataclass(frozen=True)
class Comparison:
    """The worst of all golden texts, each by itself and in a batch."""

    worst: float  # by the tolerance's metric
    equal_codes: float | None  # share of equal codes, 0..1; None for float32


def require_golden(encoder: Encoder, content: bytes, path: object) -> tuple[GoldenFile, Comparison]:
    """Run the golden texts of a bundle, and refuse an encoder that gives something else.

    Args:
        encoder: of the bundle.
        content: of its golden.json.
        path: the bundle, or a cell of one, for messages.

    Raises:
        BundleError: when golden.json is not that of the bundle.
        DriftError: naming the first stage that differs: tokens, vectors or the order of documents;
            or when the texts do not run.
    """
    golden = golden_from_json(content, encoder.spec, f"{path}: {GOLDEN}")
    _require_coded(encoder, golden, f"{path}: {GOLDEN}")
    with _named(path):
        _require_ids(encoder, golden.texts, path)
        found = compare(encoder, golden.texts, golden.tolerance.metric)
    if not golden.tolerance.holds(found.worst):
        raise DriftError(_drift(encoder, golden, found, path))
    with _named(path):
        _require_order(encoder, golden, path)
    return golden, found


@contextmanager
def _named(path: object) -> Iterator[None]:
    """Say of which bundle it is that the golden texts do not run."""
    try:
        yield
    except DriftError:  # which names it
        raise
    except BundleError as error:
        raise BundleError(f"{path}: {error}") from error
    except M2DError as error:
        raise DriftError(
            f"{path} does not run its golden texts on this machine: {error}"
        ) from error


def compare(encoder: Encoder, texts: Sequence[Golden], metric: Metric) -> Comparison:
    """Run the golden texts, one by one and in batches, and compare with the stored results."""
    rows = [row for row in texts if runs(row)]
    expected = np.array([row.vector for row in rows], dtype=code_dtype(encoder.spec.vectors))
    found = [run(encoder, rows, batch_size) for batch_size in (1, len(rows))]
    worst = [worst_of(metric, each, expected, encoder) for each in found]
    equal = min(float(np.mean(each == expected)) for each in found)
    return Comparison(min(worst), None if encoder.spec.vectors == "float32" else equal)


def worst_of(
    metric: Metric, found: NDArray[Any], expected: NDArray[Any], encoder: Encoder
) -> float:
    """Return the metric of the text that is furthest off; both are codes, (texts, width).

    The cosine is ``1 - |a - b|^2 / (|a|^2 + |b|^2)``: that of vectors of one length, and less where
    the lengths differ.
    """
    a, b = (encoder.codec.decode(codes).astype(np.float64) for codes in (found, expected))
    if metric == MIN_EQUAL_BITS:
        return float((a == b).mean(axis=1).min())
    both = np.square(a).sum(axis=1) + np.square(b).sum(axis=1)
    apart = np.square(a - b).sum(axis=1) / np.where(both > 0, both, 1)
    return float(1 - apart.max())


def golden_from_json(content: bytes, spec: ArtifactSpec, where: object = GOLDEN) -> GoldenFile:
    """Return the content of golden.json.

    Args:
        content: of the file.
        spec: the artifact that it must fit.
        where: what messages call the file.

    Raises:
        BundleError: when it is not that, or would let any vector pass.
    """
    golden = read_json(GoldenFile, content, where, BundleError)
    tolerance, metric = golden.tolerance, metric_of(spec)
    if tolerance.metric != metric:
        raise BundleError(
            f"{where} compares by {tolerance.metric} where weights={spec.weights} and "
            f"vectors={spec.vectors} are compared by {metric}; build the bundle again."
        )
    if not LOOSEST[metric] <= tolerance.limit <= 1:
        raise BundleError(
            f"{where} has a limit of {tolerance.limit:g} for {metric}, which must be within "
            f"{LOOSEST[metric]:g} and 1; build the bundle again."
        )
    for number, row in enumerate(golden.texts):
        _require_row(row, f"{where}: text {number}", spec)
    if tolerance.limit < tolerance_of(spec, golden.spread).limit:
        raise BundleError(
            f"{where} has a limit of {tolerance.limit:.9g}, which its spread does not explain; "
            "build the bundle again."
        )
    if not any(runs(row) for row in golden.texts):
        raise BundleError(f"{where} has no text to run; build the bundle again.")
    _require_enough(golden.texts, where, spec)
    _require_whole(golden.order, f"{where}: order", spec)
    return golden


def _require_row(row: Golden, where: str, spec: ArtifactSpec) -> None:
    _require_prompt(row.prompt, where, spec)
    if len(row.ids) > spec.max_length:
        raise BundleError(f"{where} has {len(row.ids)} tokens; {SPEC} allows {spec.max_length}.")
    if (row.vector is not None) != runs(row):
        raise BundleError(f"{where} has a vector only if it has at most {RUN_TOKENS} tokens.")
    width = code_width(spec.dim, spec.vectors)
    if row.vector is not None and len(row.vector) != width:
        raise BundleError(
            f"{where} has a vector of {len(row.vector)} values; vectors={spec.vectors} of "
            f"{spec.dim} dims have {width}."
        )
    if row.pooled is not None and len(row.pooled) != spec.dim:
        raise BundleError(f"{where} has a pooled vector of {len(row.pooled)} dims, not {spec.dim}.")
    coded = runs(row) and spec.vectors != "float32"
    if row.pooled is not None and not coded:
        raise BundleError(f"{where} has a pooled vector, and is not run or not coded.")
    # Of a GPU's engine it is known where the bundle was made without one.
    if row.pooled is None and coded and not ENGINES[spec.engine].on_gpu:
        raise BundleError(f"{where} lacks its pooled vector; build the bundle again.")
    dtype = code_dtype(spec.vectors)
    codes = range(np.iinfo(dtype).min, np.iinfo(dtype).max + 1) if dtype.kind in "iu" else None
    if codes is not None and any(value not in codes for value in row.vector or ()):
        raise BundleError(f"{where} has a vector of other values than {dtype} has.")


def _require_enough(rows: Sequence[Golden], where: object, spec: ArtifactSpec) -> None:
    for name in (None, *sorted(spec.prompts)):
        count = len({row.text for row in rows if row.prompt == name})
        if count < MIN_TEXTS:
            raise BundleError(
                f"{where} has {count} different texts with the prompt {shown(name)}, and at least "
                f"{MIN_TEXTS} are needed; build the bundle again."
            )


def _require_prompt(name: str | None, where: str, spec: ArtifactSpec) -> None:
    if name is not None and name not in spec.prompts:
        raise BundleError(f"{where} has the prompt {shown(name)}, which {SPEC} lacks.")


def _require_whole(order: Order, where: str, spec: ArtifactSpec) -> None:
    for name in (order.document_prompt, order.query_prompt):
        _require_prompt(name, where, spec)
    count = len(order.documents)
    if [len(row) for row in order.similarity] != [count] * len(order.queries):
        raise BundleError(f"{where} does not have a similarity of every query and document.")
    if [len(row) for row in order.nearest] != [TOP] * len(order.queries):
        raise BundleError(f"{where} does not have {TOP} rows for every query.")
    if any(row >= count for rows in order.nearest for row in rows):
        raise BundleError(f"{where} has a row beyond the {count} documents.")
    for similarity, nearest in zip(order.similarity, order.nearest, strict=True):
        best, found = sorted(similarity, reverse=True), [similarity[row] for row in nearest]
        if len(set(nearest)) < TOP or not np.allclose(found, best[:TOP], rtol=0, atol=_ROUNDED):
            raise BundleError(
                f"{where} has {nearest} for the {TOP} nearest documents, and others are more "
                "similar; build the bundle again."
            )


def _require_ids(encoder: Encoder, rows: Sequence[Golden], path: object) -> None:
    for row in rows:
        if encoder.tokenize([row.text], prompt=row.prompt)[0] != row.ids:
            raise DriftError(
                f"{path}: {shown(row.text)} (prompt {shown(row.prompt)}) becomes other tokens on "
                "this machine than where the bundle was made; install the same tokenizers version."
            )


def _drift(encoder: Encoder, golden: GoldenFile, found: Comparison, path: object) -> str:
    """Say which vectors differ: a graph that puts out codes keeps the pooled ones to itself."""
    spec, tolerance = encoder.spec, golden.tolerance
    coded = spec.vectors != "float32" and ENGINES[spec.engine].encodes
    return (
        f"{path} does not reproduce its golden vectors on this machine: after the same tokens, the "
        f"{'code' if coded else 'pooled vector'} differs; {tolerance.metric} is {found.worst:.6g} "
        f"where the limit is {tolerance.limit:g} ({one_line(tolerance.reason)}) They were made by "
        f"{golden.spread.engine} and this is {encoder.describe()['engine']}. Rebuild the artifact "
        "for this device."
    )


def _require_order(encoder: Encoder, golden: GoldenFile, path: object) -> None:
    """Refuse another order of documents, but for neighbours that are as good as equal."""
    order, allowed = golden.order, golden.tolerance.swap(encoder.spec.dim)
    similarity = np.array(order.similarity)
    expected = np.take_along_axis(similarity, np.array(order.nearest), axis=1)
    queries = encoder.encode(order.queries, prompt=order.query_prompt)
    documents = encoder.encode(order.documents, prompt=order.document_prompt)
    rows = encoder.codec.search(queries, documents, top=TOP).rows
    lost = expected - np.take_along_axis(similarity, rows, axis=1)
    if lost.max() > allowed:
        number, place = np.unravel_index(lost.argmax(), lost.shape)
        raise DriftError(
            f"{path} orders documents otherwise on this machine, though its vectors are within "
            f"their limit: {shown(order.queries[number])} finds document {rows[number, place]} in "
            f"place {place + 1}, less similar by {lost.max():.4f} than the golden one where "
            f"{allowed:.4f} is allowed. Rebuild the artifact for this device."
        )
    moved = float(np.abs(encoder.codec.similarity(queries, documents) - similarity).max())
    if moved > golden.tolerance.turn():
        raise DriftError(
            f"{path} has a query and a document whose similarity is off by {moved:.4f} on this "
            f"machine where {golden.tolerance.turn():.4f} is allowed. Rebuild the artifact for "
            "this device."
        )


def _require_coded(encoder: Encoder, golden: GoldenFile, where: str) -> None:
    """Refuse pooled vectors that are not what the codes were made of."""
    rows = [row for row in golden.texts if row.pooled is not None]
    if not rows:
        return
    spec, metric = encoder.spec, golden.tolerance.metric
    pooled = np.array([row.pooled for row in rows], dtype=np.float32)
    expected = np.array([row.vector for row in rows], dtype=code_dtype(spec.vectors))
    coded = encode_vectors(pooled, spec.vectors, encoder.ranges, spec.bit_order)
    if not golden.tolerance.holds(worst_of(metric, coded, expected, encoder)):
        raise BundleError(
            f"{where} has pooled vectors whose codes are not its vectors; build the bundle again."
        )


def runs(row: Golden) -> bool:
    """Say whether a golden text is short enough to be run on any device."""
    return len(row.ids) <= RUN_TOKENS


def run(encoder: Encoder, rows: Sequence[Golden], batch_size: int) -> NDArray[Any]:
    """Return the vectors of ``rows``; the prompts are run one after another."""
    parts: dict[int, NDArray[Any]] = {}
    for name in dict.fromkeys(row.prompt for row in rows):
        chosen = [index for index, row in enumerate(rows) if row.prompt == name]
        texts = [rows[index].text for index in chosen]
        vectors = encoder.encode(texts, prompt=name, batch_size=batch_size)
        parts |= dict(zip(chosen, vectors, strict=True))
    return np.stack([parts[index] for index in range(len(rows))])
