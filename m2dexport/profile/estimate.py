"""How long a sweep will take, from what there is to do and how long a few batches take."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from m2dexport.batches import encode_tokens
from m2dexport.profile.grid import Graph, Pass, by_target, places_of
from m2dexport.profile.passes import Basis
from m2dexport.profile.plan import Plan
from m2dexport.profile.surface import loaded_runner

_BATCH = 16
_SINGLE = 5  # runs of one text
#: Of a pass: what scoring its cells takes beside encoding the texts.
_SCORED = 1.3
# Seconds, as measured on the checkpoint that ships: of a pass, to load, check and write its graphs;
# of a graph of all layers, to find its settings; of any, to start a process for its memory; of
# all, to write the report.
_CHECKED, _SETTINGS, _STARTED, _WRITTEN = 2.0, 1.0, 1.0, 1.5
#: Texts that take as long to encode as calibrating and rounding weights of a precision, likewise.
_QUANTIZED = {"int8": 6000}
# Of a graph: rounds at the first shape and at others, runs to warm up, seconds at least, and the
# runs at the first shape that the short requests for its memory amount to.
_FIRST, _OTHER, _WARM_UP, _LEAST, _REQUESTS = 100, 30, 12, 0.3, 500
_SAMPLES = 2  # of a target, each timed beside the graph that it shares its latency with
#: What may be wrong with it either way.
_LOW, _HIGH = 0.7, 2.0


@dataclass(frozen=True)
class _Speed:
    """How long the graph of all depths takes, in seconds."""

    text: float  # of many
    token: float  # of many
    single: float  # a text by itself

    def run(self, shape: tuple[int, int]) -> float:
        """Return the seconds of a run of (batch, tokens)."""
        return max(self.single, shape[0] * shape[1] * self.token)


def estimate(basis: Basis, passes: Sequence[Pass], plans: Sequence[Plan]) -> str:
    """Return a sentence on how long what is missing will take; a few batches are run for it.

    Args:
        basis: what is measured.
        passes: those that are to be measured.
        plans: all of the sweep.
    """
    speed, texts = _speed(basis, passes[0]), len(basis.corpus.ids)
    targets = by_target(plans)
    graphs = [{place.graph for place in places_of(target).values()} for target in targets]
    timed = sum(
        _of_target(speed, target[0], found) for target, found in zip(targets, graphs, strict=True)
    )
    scored = sum(_of_pass(speed, one, texts) for one in passes)
    whole = scored + timed + _WRITTEN
    return (
        f"About {_minutes(_LOW * whole)} to {_minutes(_HIGH * whole)} minutes by a few batches: "
        f"{texts:,} texts in {len(passes)} passes, then {sum(map(len, graphs))} graphs to time."
    )


def _speed(basis: Basis, one: Pass) -> _Speed:
    ids = sorted(basis.corpus.ids, key=len)
    size = min(_BATCH, len(ids))
    places = [int(share * (len(ids) - size)) for share in (0.1, 0.3, 0.5, 0.7, 0.9)]
    # Of one length, as they will be.
    batches = [ids[place : place + size] for place in places]
    source = basis.sources[one.plan.engine]
    run = loaded_runner(source.graph, one.plan)
    encode_tokens(run, ids[:size], source.pad_id, size)
    start = time.perf_counter()
    for batch in batches:
        encode_tokens(run, batch, source.pad_id, size)
    many = time.perf_counter() - start
    start = time.perf_counter()
    for text in islice(batches[0], _SINGLE):
        encode_tokens(run, [text], source.pad_id, 1)
    single = (time.perf_counter() - start) / min(_SINGLE, size)
    tokens = sum(len(text) for batch in batches for text in batch)
    return _Speed(many / (len(batches) * size), many / max(tokens, 1), single)


def _of_pass(speed: _Speed, one: Pass, texts: int) -> float:
    """Return the seconds that a pass takes, which runs no layer above the deepest it measures."""
    share = max(one.plan.depths) / one.plan.compared_with[0]
    return share * speed.text * (texts * _SCORED + _QUANTIZED.get(one.weights, 0)) + _CHECKED


def _of_target(speed: _Speed, plan: Plan, graphs: set[Graph]) -> float:
    """Return the seconds that it takes to time the graphs of a target, and for their memory."""
    found = _SAMPLES * 2 * _rounds(speed.run(plan.shapes[0]), plan, first=True)
    for graph in graphs:
        share = graph.layers / plan.compared_with[0]
        runs = [share * speed.run(shape) for shape in plan.shapes]
        found += sum(_rounds(each, plan, first=not place) for place, each in enumerate(runs))
        found += share * _SETTINGS + _STARTED + _REQUESTS * runs[0]
    return found


def _rounds(run: float, plan: Plan, *, first: bool) -> float:
    """Return the seconds of the rounds of a graph at a shape, of which a run takes so many."""
    rounds = plan.repeats or (_FIRST if first else _OTHER)
    return max(_LEAST, (rounds + _WARM_UP) * run)


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f}" if seconds >= 90 else f"{max(seconds / 60, 0.1):.1f}"
