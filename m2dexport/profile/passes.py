"""One pass per weight precision: the quality of its cells, and the graphs that are then timed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from m2dexport.build.source import Source
from m2dexport.checkpoint.open import Checkpoint
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
from m2dexport.measure.footprint import Footprint
from m2dexport.measure.latency import Candidate, LatencyPoint, write_candidate
from m2dexport.measure.size import size_parts
from m2dexport.precisions import VectorPrecision, WeightPrecision
from m2dexport.profile.cells import Graph, GraphFacts, reference_id
from m2dexport.profile.costs import Sample
from m2dexport.profile.crossing import Crossing, Side, side_of
from m2dexport.profile.floor import floor_of
from m2dexport.profile.maps import Maps
from m2dexport.profile.plan import Plan
from m2dexport.profile.schema import Flag, cell_id
from m2dexport.profile.settings import measured_on
from m2dexport.profile.surface import Corpus, Depth, View, compute_surface, qualities, views_of
from m2dexport.progress import OnProgress
from m2dexport.quantize.half import store_half
from m2dexport.quantize.recipes import HALF
from m2dexport.quantize.saturation import isa_of
from m2dexport.vectors.codecs import LEVELS, PER_BYTE
from m2dexport.vectors.resample import Score
from m2dexport.vectors.retrieval import RetrievalTask
from m2dexport.vectors.tasks import Task

_Models = Iterator[tuple[Graph, ir.Model]]


@dataclass(frozen=True)
class Sweep:
    """What is to be measured."""

    checkpoint: Checkpoint
    tasks: tuple[Task, ...]
    calibration: Sequence[str]  # texts that freeze ranges
    align_texts: Iterable[str]  # texts that maps are fitted on
    plan: Plan
    on_progress: OnProgress


class Passes:
    """Adds one weight precision after the other; then all of them are crossed."""

    def __init__(
        self, sweep: Sweep, source: Source, corpus: Corpus, maps: Maps, folder: Path
    ) -> None:
        self.quality: dict[str, dict[str, Score]] = {}  # cell id -> "task/metric" -> score
        self.graphs: dict[Graph, Candidate] = {}
        self.failures: dict[Graph, str] = {}
        self.samples: dict[str, Sample] = {}  # cell id -> the cell as it is built
        self._flags: dict[Graph, tuple[Flag, ...]] = {}
        self._sides: dict[WeightPrecision, Side] = {}
        self._sweep, self._source, self._corpus = sweep, source, corpus
        self._maps, self._folder = maps, folder
        self._full = sweep.checkpoint.layers

    def add(self, weights: WeightPrecision) -> None:
        """Measure the quality of a weight precision, and write its graphs.

        Raises:
            ParityError: when it is the reference's, and that fails.
        """
        sweep, plan, corpus = self._sweep, self._sweep.plan, self._corpus
        surface = compute_surface(self._source, weights, corpus, plan, sweep.on_progress)
        for layers, reason in surface.failures.items():
            self.failures[Graph(layers, weights)] = reason
            if "full" in plan.alignments(layers, self._full):
                self.failures[Graph(layers, weights, "full")] = reason
        require_reference(plan, self.failures)
        maps = self._maps.stored_in(weights)
        views = views_of(surface, maps, corpus, plan, self._full)
        self.quality |= qualities(views, weights, corpus, plan)
        for layers, depth in surface.depths.items():
            for graph, model in self._models(layers, weights, depth):
                self.graphs[graph] = self._written(graph, model)
                self._flags[graph] = _flags_of(depth)
        self.samples |= self._samples(weights, surface.depths)
        floors = list(self._floors(weights))
        self.quality |= qualities(floors, weights, corpus, plan)
        static = {view.dim: view.vectors for view in floors}
        self._sides[weights] = side_of(surface, static, maps, corpus, plan, self._full)

    def crossing(self) -> Crossing:
        """Return the precisions so far, to be crossed."""
        tasks = tuple(task for task in self._sweep.tasks if isinstance(task, RetrievalTask))
        return Crossing(self._sides, tasks, self._sweep.plan, self._full)

    def widest(self, layers: int) -> int:
        """Return the largest dim that has a map, which aligned graphs end in; 0 where none has."""
        return max((dim for depth, dim in self._maps.linear if depth == layers), default=0)

    def facts(
        self, graph: Graph, latency: tuple[LatencyPoint, ...], footprint: Footprint
    ) -> GraphFacts:
        """Return what all cells of a graph share."""
        candidate = self.graphs[graph]
        tokenizer = self._source if graph.layers > 0 else self._maps
        text = len(tokenizer.tokenizer_json.encode())
        return GraphFacts(
            latency=latency,
            footprint=footprint,
            size_bytes=candidate.size_bytes + text,
            size_parts=size_parts(candidate.engine, candidate.files, text),
            flags=self._flags[graph],
            engine=candidate.engine,
            device=measured_on(candidate),
        )

    def _models(self, layers: int, weights: WeightPrecision, depth: Depth) -> _Models:
        """Yield the graphs of a depth: a plain one, and one that ends in its widest map."""
        for align in self._sweep.plan.alignments(layers, self._full):
            graph = Graph(layers, weights, align)
            widest = self.widest(layers)
            if align == "none":
                yield graph, depth.graph
            elif widest:
                linear = self._maps.linear[layers, widest]
                model = vector_graph(aligned_graph(pooled_graph(depth.graph), linear), widest)
                if weights in HALF and not ENGINES[self._sweep.plan.engine].on_gpu:
                    # The map alone: all else is stored so already.
                    store_half(model.graph, HALF[weights])
                    RemoveUnusedNodesPass()(model)
                yield graph, model

    def _written(self, graph: Graph, model: ir.Model, prefix: str = "") -> Candidate:
        plan = self._sweep.plan
        name = f"{prefix}{graph.layers}-{graph.align}-{graph.weights}"
        files = engine_maker(plan.engine).files(model, plan.compilation)
        isa = isa_of(model.graph)
        return write_candidate(files, self._folder / name, plan.engine, plan.device, isa)

    def _samples(self, weights: WeightPrecision, depths: Mapping[int, Depth]) -> dict[str, Sample]:
        """Write the cell that has the most behind its pooled vector: the shortest, packed.

        That is of the shallowest depth, in the first weights, and of the deepest, in the last.
        """
        plan, found = self._sweep.plan, {}
        packed = [each for each in plan.vectors if each in PER_BYTE and each not in LEVELS]
        ends = {min(plan.depths): plan.weights[0], max(plan.depths): plan.weights[-1]}
        for layers in ends if ENGINES[plan.engine].encodes else ():
            vectors = (packed or ["float32"])[0]
            if ends[layers] != weights or layers not in depths or vectors not in plan.vectors:
                continue
            dim = min(plan.dims)
            model = vector_graph(pooled_graph(depths[layers].graph), dim)
            name = cell_id(layers, dim, weights, vectors, engine=plan.engine)
            graph, model = Graph(layers, weights), coded_graph(model, vectors, None)
            found[name] = Sample(graph, self._written(graph, model, "sample-"))
        return found

    def _floors(self, weights: WeightPrecision) -> Iterator[View]:
        """Yield depth 0 at every dim; write its tables."""
        floors = floor_of(self._maps, weights, self._corpus, self._source.prompt, self._folder)
        for dim, floor in floors:
            graph = Graph(0, weights, "full", dim)
            if isinstance(floor, M2DError):
                self.failures[graph] = str(floor)
                continue
            self.graphs[graph], self._flags[graph] = floor.candidate, ()
            yield floor.view


def added_bytes(graph: Graph, dim: int, vectors: VectorPrecision, width: int, widest: int) -> int:
    """Return the bytes that a dim and a codec add to the files of a graph.

    Args:
        graph: a plain one of the whole width, an aligned one of the widest map, or depth 0's at
            this dim.
        dim: the dim.
        vectors: the codec.
        width: values of the pooled vector.
        widest: the largest dim that has a map.
    """
    if graph.layers == 0:
        return ranges_bytes(dim) if vectors in LEVELS else 0
    if graph.align == "none":
        return tail_bytes(width, dim, vectors)
    value = 2 if graph.weights in HALF else 4
    return tail_bytes(dim, dim, vectors) - (widest - dim) * (width * value + 4)


def require_reference(plan: Plan, failures: Mapping[Graph, str]) -> None:
    """Refuse a sweep whose reference failed.

    Raises:
        ParityError: with the reason.
    """
    reason = failures.get(Graph(max(plan.layers), plan.weights[0]))
    if reason is not None:
        raise ParityError(f"the reference cell {reference_id(plan)} failed: {reason}")


def _flags_of(depth: Depth) -> tuple[Flag, ...]:
    flags: dict[Flag, bool] = {
        "batch_dependent": depth.batch_dependent,
        "mixed_precision": depth.mixed,
    }
    return tuple(flag for flag, holds in flags.items() if holds)
