"""The grid of a sweep: the cells that its plans ask for, and the passes over the texts for them.

A pass is what quality depends on: an engine, a provider, and weights. Targets that differ in
threads or shapes share it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from m2dexport.engines import DEFAULT_ENGINE, ENGINES
from m2dexport.errors import UsageError
from m2dexport.precisions import Align, VectorPrecision, WeightPrecision
from m2dexport.profile.plan import Plan
from m2dexport.runtime.cells import cell_id

_Key = tuple[Any, ...]  # what a pass is told apart by, its weights first


@dataclass(frozen=True)
class Graph:
    """What latency, size and memory depend on."""

    layers: int
    weights: WeightPrecision
    align: Align = "none"
    dim: int | None = None  # of depth 0, whose table is another at every dim
    engine: str = DEFAULT_ENGINE  # of the transformer; depth 0 has one of its own

    def cell(self, dim: int, vectors: VectorPrecision) -> str:
        """Return the id of a cell that runs this graph."""
        return cell_id(self.layers, dim, self.weights, vectors, self.align, self.engine)


@dataclass(frozen=True)
class Place:
    """Where a cell is in the grid."""

    plan: Plan  # that asks for it
    graph: Graph
    dim: int
    vectors: VectorPrecision
    only_reference: bool = False  # no grid asks for it


def places_of(plans: Sequence[Plan]) -> dict[str, Place]:
    """Return the cells of one target by id: those that its plans ask for, and the reference.

    Args:
        plans: one for each engine of the target.
    """
    found: dict[str, Place] = {}
    for plan in plans:
        for name, place in _asked(plan):
            found.setdefault(name, place)  # depth 0 is the same for all engines
    layers, dim, weights, vectors = plans[0].compared_with
    name, reference = reference_id(plans[0]), graph_of(plans[0], layers, weights)
    if name not in found:
        return {name: Place(plans[0], reference, dim, vectors, only_reference=True), **found}
    return found


def _asked(plan: Plan) -> Iterable[tuple[str, Place]]:
    full = plan.compared_with[0]
    for layers in plan.layers:
        for align, weights in product(plan.alignments(layers, full), plan.weights):
            for dim, vectors in product(plan.dims, plan.vectors):
                graph = graph_of(plan, layers, weights, align, dim)
                yield graph.cell(dim, vectors), Place(plan, graph, dim, vectors)


def graph_of(
    plan: Plan, layers: int, weights: WeightPrecision, align: Align = "none", dim: int | None = None
) -> Graph:
    """Return the graph of a depth; of depth 0 at a dim, the others share theirs."""
    if layers == 0:
        return Graph(0, weights, align, dim)
    return Graph(layers, weights, align, engine=plan.engine)


def reference_id(plan: Plan) -> str:
    """Return the id of the cell that those of a target are compared with.

    Args:
        plan: the first of the target.
    """
    layers, dim, weights, vectors = plan.compared_with
    return graph_of(plan, layers, weights).cell(dim, vectors)


@dataclass(frozen=True)
class Pass:
    """One run of all texts through the graph of all depths, in one weight precision."""

    weights: WeightPrecision
    plan: Plan  # engine, device, and the union of the grids that are measured in these weights
    wanted: frozenset[str]  # ids of the cells that are kept
    references: frozenset[str]  # those of them that the cells of a target are compared with
    leads: bool  # in the reference's weights: those of other weights query what this one wrote
    crosses: bool  # queries of every depth meet documents of every depth
    own: bool = True  # of this shard; else it is there for what others are compared with

    @property
    def name(self) -> str:
        """What messages call it."""
        return pass_name(self.weights, self.plan.engine)


def pass_name(weights: WeightPrecision, engine: str) -> str:
    """Return what messages call a pass."""
    return weights if engine == DEFAULT_ENGINE else f"{weights} {engine}"


def passes_of(plans: Sequence[Plan]) -> tuple[Pass, ...]:
    """Return the passes that all plans need, those that others' queries depend on first."""
    plans = [replace(plan, align_texts=None) for plan in plans]
    sharing: dict[_Key, list[Plan]] = {}
    wanted: dict[_Key, set[str]] = {}
    references = {reference_id(target[0]) for target in by_target(plans)}
    for target in by_target(plans):
        for name, place in places_of(target).items():
            key = _key(place.plan, place.graph.weights)
            grid = _with_reference(place.plan) if name in references else place.plan
            sharing.setdefault(key, []).append(grid)
            wanted.setdefault(key, set()).add(name)
    first = _key(plans[0], plans[0].compared_with[2])
    found = []
    for key, grids in sharing.items():
        plan = _union(list(dict.fromkeys(grids)), key[0])
        leads = key[0] == plan.compared_with[2]
        kept = frozenset(wanted[key])
        found.append(Pass(key[0], plan, kept, kept & references, leads, key == first))
    return tuple(sorted(found, key=lambda each: not each.leads))


def by_target(plans: Sequence[Plan]) -> list[list[Plan]]:
    """Return the plans of each target, in the given order."""
    found: dict[str, list[Plan]] = {}
    for plan in plans:
        found.setdefault(plan.target, []).append(plan)
    return list(found.values())


def index_pass(one: Pass, passes: Iterable[Pass]) -> Pass | None:
    """Return the pass whose full depth wrote the index that the queries of another are put to."""
    for each in passes:
        same = _where(each.plan) == _where(one.plan)
        if same and each.leads and each != one and each.weights != one.weights:
            return each
    return None


def dealt(passes: Sequence[Pass], shard: tuple[int, int]) -> tuple[Pass, ...]:
    """Return the passes of one part of several: its share, and the reference.

    Args:
        passes: of the whole sweep.
        shard: (number, parts), the first being 1.

    Raises:
        UsageError: when there are more parts than passes.
    """
    number, parts = shard
    if parts > len(passes):
        names = ", ".join(each.name for each in passes)
        raise UsageError(
            f"there are {len(passes)} passes to deal out ({names}), too few for {parts} shards; "
            f"name at most {len(passes)}, as in --shard 1/{len(passes)}."
        )
    own = passes[number - 1 :: parts]
    queried = [index_pass(each, passes) for each in own]
    kept = []
    for each in passes:
        if each in own:
            kept.append(each)
        elif each.references or each in queried:
            full = replace(each.plan, layers=(each.plan.compared_with[0],), align=("none",))
            kept.append(replace(each, plan=full, wanted=each.references, crosses=False, own=False))
    return tuple(kept)


def _where(plan: Plan) -> tuple[Any, ...]:
    compilation = plan.compilation if ENGINES[plan.engine].on_gpu else None
    return plan.engine, plan.device.provider, compilation


def _key(plan: Plan, weights: WeightPrecision) -> _Key:
    return weights, plan.isa if weights == "int8" else "portable", *_where(plan)


def _with_reference(plan: Plan) -> Plan:
    """Return a grid that holds the reference, too."""
    layers, dim, _, vectors = plan.compared_with
    return replace(
        plan,
        layers=tuple(dict.fromkeys((*plan.layers, layers))),
        dims=tuple(dict.fromkeys((*plan.dims, dim))),
        vectors=tuple(dict.fromkeys((*plan.vectors, vectors))),
    )


def _union(grids: Sequence[Plan], weights: WeightPrecision) -> Plan:
    """Return one grid that holds several, in one weight precision."""

    def every(name: str) -> tuple[Any, ...]:
        return tuple(dict.fromkeys(value for grid in grids for value in getattr(grid, name)))

    return replace(
        grids[0],
        layers=tuple(sorted(every("layers"))),
        dims=tuple(sorted(every("dims"))),
        weights=(weights,),
        vectors=every("vectors"),
        align=every("align"),
        isa=grids[0].isa if weights == "int8" else "portable",
    )
