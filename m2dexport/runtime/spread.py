"""Make golden.json: run the golden texts, see how far they move, and set the tolerance by that.

Integer activations turn a last bit into another code, and that into another vector: what differs
between two releases of an engine or two CPUs is of the size of what the weights' precision costs.
Other releases and CPUs are not at hand. What they do to a graph is, however: they round otherwise,
and so does a graph whose float32 constants are smaller by a unit in the last place, here and there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m2dexport.batches import encode_tokens
from m2dexport.engines import ENGINES, Device
from m2dexport.runtime.artifact import ArtifactSpec
from m2dexport.runtime.encoder import Encoder, encoder_from_files
from m2dexport.runtime.golden import TOP, Golden, GoldenFile, Order, run, runs, worst_of
from m2dexport.runtime.golden_texts import DOCUMENTS, QUERIES, TEXTS, long_texts
from m2dexport.runtime.graph_guard import examine_graph
from m2dexport.runtime.pooled import pooled_run
from m2dexport.runtime.tolerance import Spread, metric_of, tolerance_of

_SEEDS = (1, 2)  # each rounds otherwise
_PADDING = 16  # tokens beyond a text's own
_BLOCK = 1 << 20  # values that are rounded at once
#: Constants of the codec, which would code otherwise and not just compute otherwise.
_CODEC = frozenset({"range_low", "range_step", "place_values"})


def golden_of(
    encoder: Encoder, files: Mapping[str, bytes], path: Path, device: Device
) -> GoldenFile:
    """Return the golden texts of an artifact, with the results of running it, and a tolerance.

    Args:
        encoder: the artifact, with one thread: the results must not depend on this machine's cores.
        files: of the artifact, by name.
        path: the artifact, for messages.
        device: what the encoder runs on.

    Raises:
        M2DError: when the graph fails.
    """
    names = [None, *sorted(encoder.spec.prompts)]
    tokenized = [
        Golden(text, name, encoder.tokenize([text], prompt=name)[0], None, None)
        for name in names
        for text in (*TEXTS, *long_texts(encoder, name))
    ]
    rows = [row for row in tokenized if runs(row)]
    vectors = run(encoder, rows, 1)
    spread = _spread(encoder, rows, vectors, files, path, device)
    lists = map(_to_list, vectors)
    pooled = map(_to_list, _pooled(encoder, rows, files, device))
    texts = [
        replace(row, pooled=next(pooled, None), vector=next(lists)) if runs(row) else row
        for row in tokenized
    ]
    return GoldenFile(tolerance_of(encoder.spec, spread), spread, texts, _order(encoder))


def _pooled(
    encoder: Encoder, rows: Sequence[Golden], files: Mapping[str, bytes], device: Device
) -> NDArray[Any]:
    """Return what the codec is given of each text, or no rows where that is not known."""
    spec, none = encoder.spec, np.empty((0, encoder.spec.dim), np.float32)
    if spec.vectors == "float32" or not _can_be_changed(encoder, files):
        return none
    up_to_codec = pooled_run(spec, files, device.or_else(spec.device))
    if up_to_codec is None:
        return none
    found = encode_tokens(up_to_codec, [row.ids for row in rows], spec.pad_id, 1)
    assert found is not None
    return found


def _can_be_changed(encoder: Encoder, files: Mapping[str, bytes]) -> bool:
    """Say whether the graph runs as it is read, and not by an engine that was made of it."""
    return not encoder.on_gpu and not any(
        name in files for name in ENGINES[encoder.spec.engine].may_hold
    )


def _order(encoder: Encoder) -> Order:
    prompts = encoder.spec.prompts
    query, document = (name if name in prompts else None for name in ("query", "document"))
    queries = encoder.encode(QUERIES, prompt=query)
    documents = encoder.encode(DOCUMENTS, prompt=document)
    codec = encoder.codec
    return Order(
        documents=list(DOCUMENTS),
        queries=list(QUERIES),
        document_prompt=document,
        query_prompt=query,
        similarity=np.round(codec.similarity(queries, documents).astype(np.float64), 6).tolist(),
        nearest=codec.search(queries, documents, top=TOP).rows.tolist(),
    )


def _spread(
    encoder: Encoder,
    rows: Sequence[Golden],
    vectors: NDArray[Any],
    files: Mapping[str, bytes],
    path: Path,
    device: Device,
) -> Spread:
    """Measure how far the vectors of ``rows`` move; arguments are those of ``golden_of``."""

    def worst(found: Sequence[NDArray[Any]]) -> float:
        metric = metric_of(encoder.spec)
        moved = min(worst_of(metric, each, vectors, encoder) for each in found)
        return max(0.0, round(moved, 9))

    batches = [run(encoder, rows, len(rows))]
    if encoder.spec.batch_invariant:
        batches.append(_run_padded(encoder, rows))
    moved = []
    for seed in _SEEDS if _can_be_changed(encoder, files) else ():
        other = _rounded(encoder.spec, files, seed)
        if other is not None:
            moved.append(run(encoder_from_files(other, path, device), rows, 1))
    engine = encoder.describe()["engine"]
    return Spread(engine, worst(batches), worst(moved) if moved else None)


def _run_padded(encoder: Encoder, rows: Sequence[Golden]) -> NDArray[Any]:
    """Return the vectors of texts that are run by themselves, with more padding than they need."""
    spec = encoder.spec

    def padded(input_ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[Any]:
        width = input_ids.shape[1]
        more = ((0, 0), (0, max(0, min(_PADDING, spec.max_length - width))))
        return encoder.run(np.pad(input_ids, more, constant_values=spec.pad_id), np.pad(mask, more))

    found = encode_tokens(padded, [row.ids for row in rows], spec.pad_id, 1)
    assert found is not None
    return found


def _rounded(spec: ArtifactSpec, files: Mapping[str, bytes], seed: int) -> dict[str, bytes] | None:
    """Return the files, with half of the float32 values a unit in the last place nearer to zero.

    Single numbers stay, since a graph may count on them: ``1 - mask``, ``(1 - mask) * -3e38``.

    Returns:
        None when there are no such values.
    """
    names = ENGINES[spec.engine].files
    copies = {name: bytearray(files[name]) for name in names}
    constants = examine_graph(spec.engine, list(copies.values())).constants
    random, changed = np.random.default_rng(seed), False
    for name, constant in constants.items():
        if constant.dtype != np.float32 or name in _CODEC or constant.data.readonly:
            continue
        values = np.frombuffer(constant.data, "<f4")
        for start in range(0, len(values) if len(values) > 1 else 0, _BLOCK):
            block = values[start : start + _BLOCK]
            chosen = random.integers(0, 2, len(block), dtype=bool)
            block.view("<i4")[chosen & np.isfinite(block) & (block != 0)] -= 1
            changed = True
    if not changed:
        return None
    return {**files, **{name: bytes(copy) for name, copy in copies.items()}}


def _to_list(vector: NDArray[Any]) -> list[float]:
    values: list[float] = vector.tolist()
    if vector.dtype == np.float32:
        return [round(value, 7) for value in values]
    return values
