"""One pass: the quality of its cells, and the graphs that are then timed, as files of a folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import product
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from m2dexport.build.source import Source
from m2dexport.cores import at_once, side_by_side
from m2dexport.engines import ENGINES, engine_maker
from m2dexport.errors import M2DError, ParityError
from m2dexport.graph.vector import (
    aligned_graph,
    coded_graph,
    pooled_graph,
    ranges_bytes,
    tail_bytes,
    vector_graph,
)
from m2dexport.measure.latency import Candidate, write_candidate
from m2dexport.precisions import VectorPrecision
from m2dexport.profile.costs import Sample
from m2dexport.profile.crossing import Index, Side, as_queries, cross_depth, side_of
from m2dexport.profile.floor import Floor, floor_of, token_ids
from m2dexport.profile.found import (
    INDEX,
    RANKINGS,
    TOKENIZER,
    Found,
    Rankings,
    write_found,
    write_rankings,
)
from m2dexport.profile.grid import Graph, Pass, graph_of
from m2dexport.profile.maps import Maps
from m2dexport.profile.plan import Plan
from m2dexport.profile.schema import Flag
from m2dexport.profile.surface import Corpus, Depth, Surface, compute_surface
from m2dexport.profile.views import Spot, qualities, rankings_of, scoring_threads, views_of
from m2dexport.progress import OnProgress
from m2dexport.quantize.half import store_half
from m2dexport.quantize.recipes import HALF
from m2dexport.quantize.saturation import isa_of
from m2dexport.vectors.codecs import LEVELS, PER_BYTE

_COPIES = 3  # of a graph's constants, in memory while they are written


@dataclass(frozen=True)
class Basis:
    """What all passes of a sweep work on."""

    sources: Mapping[str, Source]  # by engine
    corpus: Corpus
    maps: Maps

    @cached_property
    def token_ids(self) -> list[list[int]]:
        """The ids of the corpus at depth 0, whose tokenizer is not the transformer's."""
        return token_ids(self.maps, self.corpus.texts)


@dataclass(frozen=True)
class Beside:
    """What a pass needs to know of the others."""

    wanted: frozenset[str]  # ids of all cells of the sweep
    index: Index | None  # what the full depth wrote in the reference's weights, in another pass
    rankings: Rankings | None  # of the reference cell; None: this is its pass


def measure_pass(
    basis: Basis, one: Pass, beside: Beside, folder: Path, on_progress: OnProgress
) -> None:
    """Measure the quality of one weight precision, and write that and its graphs into a folder.

    Args:
        basis: what is measured.
        one: the pass.
        beside: what is known of others.
        folder: an empty one; ``read_found`` reads it.
        on_progress: called as texts, and then views of them, are done.

    Raises:
        ParityError: when the reference cell fails, with the reason.
    """
    source, plan, corpus = basis.sources[one.plan.engine], one.plan, basis.corpus
    full = plan.compared_with[0]
    maps = basis.maps.stored_in(one.weights)
    bytes_of_a_depth = len(corpus.ids) * source.checkpoint.dim * np.dtype(np.float32).itemsize
    with scoring_threads(plan.device.threads, bytes_of_a_depth) as threads:
        # Other steps do not keep all cores busy: depth 0 fills the gaps.
        static = threads.submit(_floors, basis, one, maps, folder)
        surface = compute_surface(source, one.weights, corpus, plan, on_progress, folder)
        failures = _failures(one, surface)
        _require_reference(one, failures)
        views = list(views_of(surface, maps, corpus, plan, full))
        graphs: dict[Graph, Candidate] = {}
        for graph, floor in static.result():
            if isinstance(floor, M2DError):
                failures[graph] = str(floor)
            else:
                graphs[graph] = floor.candidate
                views.append(floor.view)
        on_view = partial(on_progress, f"scoring {one.name}")
        on_view(0, len(views))
        rankings = beside.rankings
        if rankings is None:
            rankings = rankings_of(surface, corpus, full)
            write_rankings(rankings, folder / RANKINGS)
        quality = qualities(views, _scored(one), corpus, rankings, threads, on_view)
        side = side_of(views, corpus, one, full)
        indexes = _indexes(side, corpus, beside, folder)
        queries = as_queries(side, indexes, beside.wanted, threads)
        crossed = cross_depth(side, threads) if one.crosses else ()
    graphs = _graphs(one, maps, surface, folder, on_progress) | graphs
    samples = dict(_samples(one, surface, folder))
    flags = {graph: _flags_of(surface.depths.get(graph.layers)) for graph in graphs}
    (folder / TOKENIZER).write_text(source.tokenizer_json, encoding="utf-8")
    found = (quality, queries, crossed, graphs, flags, samples, failures, folder / TOKENIZER)
    write_found(Found(*found), folder)


def _indexes(side: Side, corpus: Corpus, beside: Beside, folder: Path) -> list[Index]:
    """Return what the full depth wrote, here and in the reference's weights; keep it for others."""
    own = side.index(corpus.calibration)
    if side.one.leads and own is not None:
        own.write(folder / INDEX)
    return [each for each in (own, beside.index) if each is not None]


def _graphs(
    one: Pass, maps: Maps, surface: Surface, folder: Path, on_progress: OnProgress
) -> dict[Graph, Candidate]:
    """Write the graphs of the transformer's depths."""
    step, found = f"writing {one.name}", {}
    on_progress(step, 0, 1)  # how many there are is not known yet
    models = {
        graph: model
        for layers, depth in surface.depths.items()
        for graph, model in _models(one, maps, layers, depth)
    }

    def written(graph: Graph) -> Candidate:
        return _written(graph, models[graph], one.plan, folder)

    largest = max((_bytes_of(model) for model in models.values()), default=0)
    candidates = side_by_side(written, models, at_once(_COPIES * largest))
    on_progress(step, 0, len(models))
    for graph, candidate in zip(models, candidates, strict=True):
        found[graph] = candidate
        on_progress(step, len(found), len(models))
    return found


def _bytes_of(model: ir.Model) -> int:
    """Return the bytes of a graph's constants."""
    tensors = (value.const_value for value in model.graph.initializers.values())
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def _scored(one: Pass) -> dict[Spot, str]:
    """Return where the cells of a pass are among its views -> their ids."""
    plan, full = one.plan, one.plan.compared_with[0]
    found: dict[Spot, str] = {}
    for layers in plan.layers:
        for align in plan.alignments(layers, full):
            for dim, vectors in product(plan.dims, plan.vectors):
                name = graph_of(plan, layers, one.weights, align, dim).cell(dim, vectors)
                if name in one.wanted:
                    found[layers, align, dim, vectors] = name
    return found


def _wanted_graphs(one: Pass) -> set[Graph]:
    """Return the graphs that the cells of a pass run."""
    return {
        graph_of(one.plan, layers, one.weights, align, dim)
        for layers, align, dim, _ in _scored(one)
    }


def _failures(one: Pass, surface: Surface) -> dict[Graph, str]:
    graphs = sorted(_wanted_graphs(one), key=lambda graph: (graph.layers, graph.align == "full"))
    return {
        graph: surface.failures[graph.layers]
        for graph in graphs
        if graph.layers in surface.failures
    }


def _require_reference(one: Pass, failures: Mapping[Graph, str]) -> None:
    """Refuse a sweep whose reference failed: there is nothing to compare with."""
    layers, _, weights, _ = one.plan.compared_with
    reason = failures.get(graph_of(one.plan, layers, weights))
    if one.references and reason is not None:
        raise ParityError(f"the reference cell {min(one.references)} failed: {reason}")


def _models(one: Pass, maps: Maps, layers: int, depth: Depth) -> Iterator[tuple[Graph, ir.Model]]:
    """Yield the graphs of a depth: a plain one, and one that ends in its widest map."""
    plan, graphs = one.plan, _wanted_graphs(one)
    for align in plan.alignments(layers, plan.compared_with[0]):
        graph = graph_of(plan, layers, one.weights, align)
        most = widest(maps, layers)
        if graph not in graphs:
            continue
        if align == "none":
            yield graph, depth.graph
        elif most:
            linear = maps.linear[layers, most]
            model = vector_graph(aligned_graph(pooled_graph(depth.graph), linear), most)
            if one.weights in HALF and not ENGINES[plan.engine].on_gpu:
                # The map alone: all else is stored so already.
                store_half(model.graph, HALF[one.weights])
                RemoveUnusedNodesPass()(model)
            yield graph, model


def _written(
    graph: Graph, model: ir.Model, plan: Plan, folder: Path, prefix: str = ""
) -> Candidate:
    name = f"{prefix}{graph.layers}-{graph.align}-{graph.weights}"
    files = engine_maker(plan.engine).files(model, plan.compilation)
    isa = isa_of(model.graph)
    return write_candidate(files, folder / name, plan.engine, plan.device, isa)


def _samples(one: Pass, surface: Surface, folder: Path) -> Iterator[tuple[str, Sample]]:
    """Write the cell that has the most behind its pooled vector: the shortest, packed.

    That is of the shallowest depth, in the reference's weights, and of the deepest, in others.
    """
    plan, names = one.plan, _scored(one)
    packed = [each for each in plan.vectors if each in PER_BYTE and each not in LEVELS]
    layers = (min if one.leads else max)(plan.depths)
    dim, vectors = min(plan.dims), (packed or ["float32"])[0]
    name = names.get((layers, "none", dim, vectors))
    if name is None or layers not in surface.depths or not ENGINES[plan.engine].encodes:
        return
    pooled = vector_graph(pooled_graph(surface.depths[layers].graph), dim)
    graph, model = graph_of(plan, layers, one.weights), coded_graph(pooled, vectors, None)
    yield name, Sample(graph, _written(graph, model, plan, folder, "sample-"))


def _floors(
    basis: Basis, one: Pass, maps: Maps, folder: Path
) -> list[tuple[Graph, Floor | M2DError]]:
    """Return depth 0 at every dim, where it is asked for; write its tables."""
    if 0 not in one.plan.layers:
        return []
    prompt = basis.sources[one.plan.engine].prompt
    return [
        (graph_of(one.plan, 0, one.weights, "full", dim), floor)
        for dim, floor in floor_of(maps, one.weights, basis.token_ids, prompt, folder)
    ]


def widest(maps: Maps, layers: int) -> int:
    """Return the largest dim that has a map, which aligned graphs end in; 0 where none has."""
    return max((dim for depth, dim in maps.linear if depth == layers), default=0)


def added_bytes(graph: Graph, dim: int, vectors: VectorPrecision, width: int, most: int) -> int:
    """Return the bytes that a dim and a codec add to the files of a graph.

    Args:
        graph: a plain one of the whole width, an aligned one of the widest map, or depth 0's at
            this dim.
        dim: the dim.
        vectors: the codec.
        width: values of the pooled vector.
        most: the largest dim that has a map.
    """
    if graph.layers == 0:
        return ranges_bytes(dim) if vectors in LEVELS else 0
    if graph.align == "none":
        return tail_bytes(width, dim, vectors)
    value = 2 if graph.weights in HALF else 4
    return tail_bytes(dim, dim, vectors) - (most - dim) * (width * value + 4)


def _flags_of(depth: Depth | None) -> tuple[Flag, ...]:
    """Return the flags of a depth of the transformer; none of depth 0."""
    if depth is None:
        return ()
    flags: dict[Flag, bool] = {
        "batch_dependent": depth.batch_dependent,
        "mixed_precision": depth.mixed,
    }
    return tuple(flag for flag, holds in flags.items() if holds)
