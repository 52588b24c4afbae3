"""How long a sweep will take, from what there is to do and how long a few batches take."""

from __future__ import annotations

import time
from collections.abc import Sequence

from m2dexport.batches import encode_tokens
from m2dexport.profile.grid import Graph, Pass, by_target, places_of
from m2dexport.profile.passes import Basis
from m2dexport.profile.plan import Plan
from m2dexport.profile.surface import loaded_runner

_BATCH = 16
#: Seconds, as measured on the checkpoint that ships: to time a graph at a shape, and for the memory
#: of a process of its own.
_TIMED, _MEMORY = 0.5, 1.6
#: Of a pass: what scoring its cells takes beside encoding the texts.
_SCORED = 1.3
#: What may be wrong with it either way.
_LOW, _HIGH = 0.7, 2.0


def estimate(basis: Basis, passes: Sequence[Pass], plans: Sequence[Plan]) -> str:
    """Return a sentence on how long what is missing will take; a few batches are run for it.

    Args:
        basis: what is measured.
        passes: those that are to be measured.
        plans: all of the sweep.
    """
    ids = sorted(basis.corpus.ids, key=len)
    size = min(_BATCH, len(ids))
    places = [int(share * (len(ids) - size)) for share in (0.1, 0.3, 0.5, 0.7, 0.9)]
    source = basis.sources[passes[0].plan.engine]
    run = loaded_runner(source.graph, passes[0].plan)
    encode_tokens(run, ids[:size], source.pad_id, size)
    start = time.perf_counter()
    for place in places:  # batches of one length, as they will be
        encode_tokens(run, ids[place : place + size], source.pad_id, size)
    seconds = (time.perf_counter() - start) / (len(places) * size)
    texts = len(ids)
    graphs: set[tuple[str, Graph]] = set()
    timed = 0.0
    for target in by_target(plans):
        found = {place.graph for place in places_of(target).values()}
        graphs |= {(target[0].target, graph) for graph in found}
        timed += len(found) * (_TIMED * len(target[0].shapes) + _MEMORY)
    whole = seconds * texts * len(passes) * _SCORED + timed
    return (
        f"About {_minutes(_LOW * whole)} to {_minutes(_HIGH * whole)} minutes by a few batches: "
        f"{texts:,} texts in {len(passes)} passes, then {len(graphs)} graphs to time."
    )


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f}" if seconds >= 90 else f"{max(seconds / 60, 0.1):.1f}"
