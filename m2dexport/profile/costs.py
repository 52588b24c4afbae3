"""What the graphs of a target cost: settings, latency, tokenization, memory, and with what noise.

Every part is measured through ``Remember``, so that it is durable at once: the settings of a graph,
a group of graphs at a shape, the tokenization of a shape, a sample, the memory of a graph.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from typing import Any

from m2dexport.cores import usable_cores
from m2dexport.engines import Device, engine_version
from m2dexport.errors import M2DError
from m2dexport.files import sha256_of
from m2dexport.measure.footprint import Footprint, measure_footprint
from m2dexport.measure.latency import (
    Candidate,
    Conditions,
    LatencyPoint,
    Loaded,
    groups_of,
    load_group,
    time_shape,
)
from m2dexport.measure.noise import Noise, Usage, moment, noise_of, usage_since
from m2dexport.measure.quantiles import Ratio
from m2dexport.measure.requests import Requests, Tokenization, requests_of, time_tokenization
from m2dexport.processor import read_processor
from m2dexport.profile.grid import Graph, graph_of
from m2dexport.profile.parts import Remember
from m2dexport.profile.plan import Plan
from m2dexport.profile.schema import SharedLatency
from m2dexport.profile.settings import choose_settings
from m2dexport.progress import OnProgress
from m2dexport.runtime.tokenizer import load_tokenizer
from m2dexport.strict import sha256_of_json

Shape = tuple[int, int]


@dataclass(frozen=True)
class Texts:
    """What tokenization is timed on."""

    texts: Sequence[str]  # real ones, which are joined and cut to each shape
    prompt: str  # before each text
    tokenizer_json: str
    static_tokenizer_json: str  # of depth 0; empty where that is not measured


@dataclass(frozen=True)
class Sample:
    """A cell as it is built, to be timed beside the graph whose latency it is said to have."""

    graph: Graph
    candidate: Candidate


@dataclass(frozen=True)
class Costs:
    """What the graphs of a target cost."""

    graphs: Mapping[Graph, Candidate]  # on the devices that suit them
    latency: Mapping[Graph, tuple[LatencyPoint, ...]]  # a point per shape
    footprints: Mapping[Graph, Footprint]
    failures: Mapping[Graph, str]  # why a graph cannot be loaded or run
    tokenization: tuple[Tokenization, ...]  # a point per shape
    noise: Noise | None  # None: the reference cannot be loaded
    samples: tuple[SharedLatency, ...]
    seconds: Mapping[str, float]  # step -> how long it took


def measure_costs(
    graphs: Mapping[Graph, Candidate],
    samples: Mapping[str, Sample],
    texts: Texts,
    plan: Plan,
    vocab_size: int,
    remember: Remember,
    on_progress: OnProgress,
) -> Costs:
    """Measure what the graphs of a target cost on this machine.

    Args:
        graphs: as the plan's device leaves their settings open; the reference is among
            them.
        samples: cells by id, to check that they take as long as the graphs that they share.
        texts: what tokenization is timed on.
        plan: shapes, device and rounds.
        vocab_size: token ids are drawn below this.
        remember: measures a part, or has it.
        on_progress: called at every step.
    """
    work = _Work(plan, Conditions(vocab_size, plan.repeats), texts, remember, on_progress)
    seconds: dict[str, float] = {}
    with _timed(seconds, "settings"):
        graphs = work.with_settings(graphs)
    with _timed(seconds, "latency"):
        tokenization = tuple(work.tokenization(shape) for shape in plan.shapes)
        timed = work.latencies(graphs)
        loaded = {name: each for name, each in samples.items() if each.graph in timed.points}
        shared = tuple(work.sample(name, each, graphs) for name, each in loaded.items())
    with _timed(seconds, "memory"):
        footprints, broken = work.footprints(graphs, timed.failures)
    return Costs(
        graphs=graphs,
        latency=timed.points,
        footprints=footprints,
        failures={**timed.failures, **broken},
        tokenization=tokenization,
        noise=noise_of(timed.reference_ms, timed.usages) if timed.reference_ms else None,
        samples=tuple(each for each in shared if each is not None),
        seconds=seconds,
    )


@dataclass(frozen=True)
class _Timed:
    points: Mapping[Graph, tuple[LatencyPoint, ...]]
    failures: Mapping[Graph, str]
    reference_ms: Sequence[float]  # at the first shape, in order
    usages: Sequence[Usage]


@dataclass(frozen=True)
class _Work:
    """What all parts have in common."""

    plan: Plan
    conditions: Conditions
    texts: Texts
    remember: Remember
    on_progress: OnProgress

    def with_settings(self, graphs: Mapping[Graph, Candidate]) -> dict[Graph, Candidate]:
        """Return every graph on the device that suits it best.

        An aligned graph takes what suits its plain one, to which it adds a single product.
        """
        plain = {each: replace(each, align="none") if each.layers else each for each in graphs}
        best: dict[Graph, Device] = {}
        wanted = dict.fromkeys(plain.values())
        self.on_progress("settings", 0, len(wanted))
        for graph in wanted:
            best[graph] = self._settings(graphs[graph])
            self.on_progress("settings", len(best), len(wanted))
        return {graph: replace(graphs[graph], device=best[plain[graph]]) for graph in graphs}

    def tokenization(self, shape: Shape) -> Tokenization:
        """Time the tokenizer of the transformers."""
        inputs = {"texts": self._texts_sha256(), "shape": list(shape), "machine": _machine()}
        found = self.remember("tokenization", inputs, lambda: self._tokenized(shape))
        return Tokenization(**found)

    def latencies(self, graphs: Mapping[Graph, Candidate]) -> _Timed:
        """Time all graphs, in groups."""
        layers, _, weights, _ = self.plan.compared_with
        reference = graph_of(self.plan, layers, weights)
        groups = groups_of(graphs, reference if reference in graphs else None)
        total = len(self.plan.shapes) * sum(map(len, groups))
        points: dict[Graph, tuple[LatencyPoint, ...]] = {}
        failures: dict[Graph, str] = {}
        reference_ms: list[float] = []
        usages: list[Usage] = []
        done = 0
        for names in groups:
            group = {name: graphs[name] for name in names}
            load = cache(partial(load_group, group, reference))
            parts = []
            for shape in self.plan.shapes:
                progress = partial(self._advance, done, len(names), total)
                parts.append(self._part(group, shape, load, progress))
                done += len(names)
            del load
            for index, name in enumerate(names):
                reason = next(
                    (each["failed"][index] for each in parts if each["failed"][index]), None
                )
                if reason is not None:
                    failures[name] = reason
                elif name not in points:  # the reference is in every group
                    points[name] = tuple(_point(each["points"][index]) for each in parts)
            reference_ms += parts[0]["reference_ms"]
            usages += [Usage(**each["usage"]) for each in parts]
        return _Timed(points, failures, reference_ms, usages)

    def sample(
        self, name: str, sample: Sample, graphs: Mapping[Graph, Candidate]
    ) -> SharedLatency | None:
        """Time a cell beside the graph that it shares its latency with; None: it does not load."""
        shared = graphs[sample.graph]
        pair = {"own": replace(sample.candidate, device=shared.device), "shared": shared}
        inputs = {**self._inputs(pair), "shape": list(self.plan.shapes[0])}
        found = self.remember("sample", inputs, lambda: self._pair(pair))
        return None if found is None else SharedLatency(cell=name, **found)

    def footprints(
        self, graphs: Mapping[Graph, Candidate], failures: Mapping[Graph, str]
    ) -> tuple[dict[Graph, Footprint], dict[Graph, str]]:
        """Return what every graph that loads needs, and why others fail."""
        found: dict[Graph, Footprint] = {}
        broken: dict[Graph, str] = {}
        shapes = [list(shape) for shape in self.plan.shapes]
        for done, (name, graph) in enumerate(graphs.items(), start=1):
            if name not in failures:
                inputs = {**self._inputs({"": graph}), "shapes": shapes}
                stored = self.remember("memory", inputs, partial(self._footprint, graph))
                if "failed" in stored:
                    broken[name] = stored["failed"]
                else:
                    found[name] = Footprint(**stored)
            self.on_progress("memory", done, len(graphs))
        return found, broken

    def _settings(self, graph: Candidate) -> Device:
        plan = self.plan
        inputs = {
            **self._inputs({"": graph}),
            "optimize": plan.optimize,
            "shape": list(plan.shapes[0]),
        }
        stored = self.remember(
            "settings",
            inputs,
            lambda: _stored(
                choose_settings(
                    {"": graph}, plan.optimize, plan.shapes[0], self.conditions.vocab_size
                )[""]
            ),
        )
        return replace(graph.device, **stored)

    def _tokenized(self, shape: Shape) -> dict[str, Any]:
        return asdict(time_tokenization(self._requests(False, shape)))

    def _part(
        self,
        group: Mapping[Graph, Candidate],
        shape: Shape,
        load: Callable[[], Loaded[Graph]],
        progress: Callable[[float], None],
    ) -> Any:
        """Return a group at a shape, as it is remembered: lists in the order of the group."""
        first = shape == self.plan.shapes[0]
        inputs = {
            **self._inputs(group),
            "shape": list(shape),
            "texts": self._texts_sha256() if first else None,
        }

        def measure() -> dict[str, Any]:
            loaded = load()
            requests = None
            if first:
                static, other = (
                    cache(partial(self._requests, each, shape)) for each in (True, False)
                )
                requests = {name: (other if name.layers else static)() for name in loaded.runs}
            start = moment()
            timed = time_shape(loaded, shape, self.conditions, requests, progress)
            return {
                "points": [_or_none(timed.points.get(name)) for name in group],
                "failed": [str(loaded.failed[n]) if n in loaded.failed else None for n in group],
                "reference_ms": list(timed.reference_ms),
                "usage": asdict(usage_since(start)),
            }

        found = self.remember("latency", inputs, measure)
        progress(1)
        return found

    def _pair(self, pair: Mapping[str, Candidate]) -> dict[str, Any] | None:
        group = load_group(pair, "shared")
        if group.failed:
            return None
        points = time_shape(group, self.plan.shapes[0], self.conditions, {}).points
        ratio = points["own"].ratio
        assert ratio is not None  # the other is the reference
        return {
            "p50_ms": points["own"].p50_ms,
            "shared_p50_ms": points["shared"].p50_ms,
            "ratio_interval": {"low": ratio.low, "high": ratio.high},
        }

    def _footprint(self, graph: Candidate) -> dict[str, Any]:
        try:
            return asdict(measure_footprint(graph, self.plan.shapes, self.conditions))
        except M2DError as error:
            return {"failed": str(error)}

    def _requests(self, static: bool, shape: Shape) -> Requests:
        stored = self.texts.static_tokenizer_json if static else self.texts.tokenizer_json
        return requests_of(load_tokenizer(stored), self.texts.texts, self.texts.prompt, shape)

    def _texts_sha256(self) -> str:
        return sha256_of_json({**vars(self.texts), "texts": list(self.texts.texts)})

    def _inputs(self, candidates: Mapping[Any, Candidate]) -> dict[str, Any]:
        """Return what decides what graphs cost here."""
        return {
            "graphs": [_identity(each) for each in candidates.values()],
            "conditions": asdict(self.conditions),
            "machine": _machine(),
        }

    def _advance(self, before: int, graphs: int, total: int, share: float) -> None:
        self.on_progress("latency", before + int(share * graphs), total)


def _identity(candidate: Candidate) -> dict[str, Any]:
    files = {name: _sha256(path, path.stat().st_mtime_ns) for name, path in candidate.files.items()}
    return {
        "files": files,
        "engine": [candidate.engine, *engine_version(candidate.engine)],
        "isa": candidate.isa,
        "device": _stored(candidate.device),
    }


_sha256 = cache(lambda path, _changed: sha256_of(path))


def _stored(device: Device) -> dict[str, Any]:
    """Return a device as JSON; where it keeps what it made decides nothing."""
    return {name: value for name, value in vars(device).items() if name != "cache"}


def _machine() -> dict[str, Any]:
    processor = read_processor()
    return {"cpu": processor.model, "flags": list(processor.flags), "cores": usable_cores()}


def _or_none(point: LatencyPoint | None) -> dict[str, Any] | None:
    return None if point is None else asdict(point)


def _point(stored: Mapping[str, Any]) -> LatencyPoint:
    ratio = stored["ratio"]
    ranges = {name: tuple(stored[name]) for name in ("p50_range", "p95_range")}
    return LatencyPoint(**{**stored, **ranges, "ratio": None if ratio is None else Ratio(**ratio)})


@contextmanager
def _timed(seconds: dict[str, float], step: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[step] = time.perf_counter() - start
