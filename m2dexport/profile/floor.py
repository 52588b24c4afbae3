"""The floor of a profile: depth 0, in every weight precision that its engine runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m2dexport.batches import encode_tokens
from m2dexport.build.parity import PROBES, Run, embed_probes, measure_parity, require_parity
from m2dexport.engines import STATIC_ENGINE, Device, engine_maker, engine_runner
from m2dexport.errors import M2DError
from m2dexport.graph.static import static_graph
from m2dexport.graph.vector import depth_graph, vector_graph
from m2dexport.measure.latency import Candidate, write_candidate
from m2dexport.precisions import WeightPrecision
from m2dexport.profile.maps import Maps
from m2dexport.profile.surface import empty_in
from m2dexport.profile.views import View
from m2dexport.runtime.tokenizer import load_tokenizer, tokenize

Floats = NDArray[np.float32]
_BATCH = 32


@dataclass(frozen=True)
class Floor:
    """Depth 0 at one dim in one weight precision."""

    view: View
    candidate: Candidate


def token_ids(maps: Maps, texts: Sequence[str]) -> list[list[int]]:
    """Return the ids of texts, with their prompts, in the tables of depth 0; none without any."""
    if not maps.tables:
        return []
    tokenizer = load_tokenizer(maps.tokenizer_json)
    return [each.ids for each in tokenize(tokenizer, texts, "")]


def floor_of(
    maps: Maps, weights: WeightPrecision, ids: Sequence[list[int]], prompt: str, folder: Path
) -> Iterator[tuple[int, Floor | M2DError]]:
    """Yield every dim, with depth 0 there, or why it fails; none without an engine for the weights.

    Args:
        maps: with a table per dim.
        weights: the precision.
        ids: the ``token_ids`` of the texts that are encoded.
        prompt: that the probes stand behind.
        folder: where the files to be measured are written.
    """
    if weights not in engine_maker(STATIC_ENGINE).PRECISIONS or not maps.tables:
        return
    probes = token_ids(maps, [prompt + text for text in PROBES])
    candidates: dict[int, Candidate] = {}
    runs: list[Run] = []
    for dim, table in maps.tables.items():
        try:
            candidates[dim], run = _checked(table, weights, probes, folder / f"0x{dim}-{weights}")
            runs.append(run)
        except M2DError as error:
            yield dim, error
    if not candidates:
        return
    pad_id, empty = len(next(iter(maps.tables.values()))), partial(empty_in, folder)
    vectors = encode_tokens(partial(_beside, runs), ids, pad_id, _BATCH, empty=empty)
    assert vectors is not None
    of_dims = np.split(vectors, np.cumsum([*candidates])[:-1], axis=1)
    for (dim, candidate), own in zip(candidates.items(), of_dims, strict=True):
        yield dim, Floor(View(0, "full", dim, own, maps.ranges[dim]), candidate)


def _beside(runs: Sequence[Run], ids: NDArray[np.int64], mask: NDArray[np.int64]) -> Floats:
    """Return what several give of the same texts, one beside the other, (texts, all dims)."""
    return np.concatenate([run(ids, mask) for run in runs], axis=1)


def _checked(
    table: Floats, weights: WeightPrecision, probes: Sequence[Sequence[int]], folder: Path
) -> tuple[Candidate, Run]:
    """Store a table in a precision; return its file and what runs it.

    Raises:
        ParityError: when the precision turns vectors by more than it may.
    """
    maker, runner = engine_maker(STATIC_ENGINE), engine_runner(STATIC_ENGINE)
    dim = table.shape[1]
    graph = vector_graph(depth_graph(static_graph(table), 0), dim)
    contents = maker.files(maker.quantize(graph, weights))
    exact, run = (
        partial(_first_output, runner.run, runner.load(files, Device(), "portable"))
        for files in (maker.files(graph), contents)
    )
    longest = len(max(probes, key=len))
    expected, found = (embed_probes(each, probes, len(table), longest) for each in (exact, run))
    floor = maker.PRECISIONS[weights].floor
    parity = measure_parity(expected.alone, found)
    require_parity(parity, floor, f"depth 0 of {dim} dims in {weights}")
    return write_candidate(contents, folder, STATIC_ENGINE), run


def _first_output(
    run: Callable[..., list[Floats]], session: Any, ids: NDArray[np.int64], mask: NDArray[np.int64]
) -> Floats:
    return run(session, ids, mask)[0]
