"""profile.json: what it holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from m2dexport.errors import UsageError
from m2dexport.precisions import Align, Isa, VectorPrecision, WeightPrecision
from m2dexport.profile.bounds import (
    Count,
    Elapsed,
    Figure,
    Line,
    Name,
    Natural,
    Points,
    Positive,
    Shard,
)
from m2dexport.profile.intervals import Interval, Model, PositiveInterval, Replicates, score_from
from m2dexport.runtime.cells import unknown_cell
from m2dexport.vectors.resample import Score, mean_of

FORMAT = 6
MEAN = "mean"
#: The target of a profile that names none: this machine, with settings that are measured.
LOCAL = "local"

Flag = Literal[
    "reference",  # measured for comparison; the grid does not ask for it
    "untrained",
    "collapsed",
    "below_shallower",
    "below_static",
    "slower_than_fp32",
    "not_significant",
    "batch_dependent",
    "mixed_precision",
]


class MeasuredOn(Model):
    """What a graph was run on."""

    provider: Name = Field(description="execution provider, or OpenVINO device")
    threads: Natural = Field(description="that run one batch")
    spin_us: Natural = Field(description="microseconds at most that an idle thread waits in a loop")
    workers: Natural = Field(description="batches of a list that run at once")


class Machine(Model):
    """Where the figures were measured."""

    cpu: Line = Field(description="model name")
    flags: tuple[Line, ...] = Field(description="instruction sets that decide speed and exactness")
    cores: Natural = Field(description="that this process may use")
    memory_bytes: Natural
    os: Line
    python: Line
    governor: Line | None = Field(description="of the clock's frequency; null: unknown")
    virtualisation: Line | None = Field(description="null: none that is known")
    gpu: Line | None


class Noise(Model):
    """How quiet the machine was while latency was measured, and how that is known."""

    verdict: Literal["quiet", "noisy", "very noisy"]
    reasons: tuple[Line, ...] = Field(description="a sentence each")
    spread: Figure = Field(description="p95 over p50 of the reference cell")
    drift: Figure = Field(description="the reference cell's slowest quarter over its fastest")
    stolen: Figure | None = Field(description="share of time that the host took; null: unknown")
    busy: Figure | None = Field(description="cores that others kept busy; null: unknown")


class CheckpointInfo(Model):
    """Which checkpoint was profiled."""

    model: Line | None = Field(description="as the user named it; null: the one that ships")
    sha256: Name = Field(description="hash of the weights by content")
    model_sha256: Name = Field(
        description="hash of weights, config, tokenizer, pooling, head, prompts, maximum length"
    )
    model_type: Line
    layers: Natural
    dim: Count
    trained: tuple[tuple[Natural, Count], ...] | None = Field(description="null: unknown")
    pooling: Line | None = Field(description="as declared by the user; null: as stored")


class TaskInfo(Model):
    """One evaluation set."""

    name: Name
    kind: Literal["sts", "retrieval", "pair_classification", "clustering"]
    main_metric: Name
    texts: Natural
    sha256: Line

    @property
    def main(self) -> str:
        """The main metric as cells name it: "task/metric"."""
        return f"{self.name}/{self.main_metric}"


class Shape(Model):
    """The input of one timed run: every token is real, none is padding."""

    batch: Count
    sequence: Count


class Latency(Model):
    """Latency at one shape, tokenization not included."""

    batch: Count
    sequence: Count
    p50_ms: Positive
    p95_ms: Positive
    p99_ms: Positive | None = Field(description="null: fewer than 300 runs")
    p50_interval: PositiveInterval
    p95_interval: PositiveInterval
    runs: Count


class Tokenization(Model):
    """How long it takes to make the token ids of one shape from texts."""

    batch: Count
    sequence: Count
    p50_ms: Elapsed
    p95_ms: Elapsed


class SizeParts(Model):
    """What the bytes of a cell's files are, in bytes."""

    embeddings: Natural = Field(description="tables of token, position and type vectors")
    layers: Natural
    tokenizer: Natural
    other: Natural = Field(description="structure of the graph, map, codec, ranges")


class Cell(Model):
    """One point of the profile: what a (layers, dim, weights, vectors, engine) gives and costs."""

    id: str
    target: Name = Field(description="name of the target that it was measured for")
    layers: Natural = Field(description="0: the static model, a table of token vectors")
    dim: Count
    align: Align = Field(description="full: ends in a map into the full depth's space")
    weights: WeightPrecision
    vectors: VectorPrecision
    engine: Name
    device: MeasuredOn
    isa: Isa = Field(description="processors that int8 weights are made for")
    quality: Mapping[str, Points] = Field(description='"task/metric" -> points, 0 to 100')
    intervals: Mapping[str, Interval] = Field(description='"task/metric" -> its interval')
    replicates: Mapping[str, Replicates] = Field(description="of the tasks' main metrics")
    as_query: Mapping[str, Mapping[str, Points]] = Field(
        description="index cell -> quality of this cell's queries on what that cell wrote"
    )
    query_replicates: Mapping[str, Mapping[str, Replicates]] = Field(
        description="index cell -> those of the retrieval tasks' main metrics"
    )
    mean_quality: Points = Field(description="unweighted mean of the tasks' main metrics, points")
    mean_interval: Interval
    retention: Figure | None = Field(
        description="mean_quality over that of the reference cell; null: that one has none"
    )
    loss: Points = Field(description="points of mean_quality below the reference cell")
    loss_interval: Interval = Field(description="of the loss, from paired replicates")
    latency: tuple[Latency, ...] = Field(min_length=1)
    p50_ms: Positive = Field(description="at the target's first shape")
    p95_ms: Positive = Field(description="at the target's first shape")
    p99_ms: Positive | None = Field(description="at the target's first shape; null: too few runs")
    text_p50_ms: Positive | None = Field(description="p50_ms with tokenization; null: not measured")
    ratio: Positive = Field(description="p50_ms over that of the target's reference cell")
    ratio_interval: PositiveInterval = Field(description="from rounds in which both ran")
    load_ms: Elapsed = Field(description="from file to a session that can run")
    first_ms: Elapsed = Field(description="the first run after that, at the target's first shape")
    size_bytes: Count = Field(description="graph, tokenizer and ranges")
    size_parts: SizeParts
    peak_memory_bytes: Natural = Field(description="of a process of its own, at the largest shape")
    used_memory_bytes: Natural = Field(description="its peak after 1,000 requests of mixed shapes")
    bytes_per_vector: Count
    flags: tuple[Flag, ...]
    on_frontier: bool = Field(description="no cell of the frontier beats it")


class Recommended(Model):
    """The ids of the cells of a target that are worth shipping first."""

    best: str = Field(description="the highest quality, at the lowest cost within its noise")
    balanced: str
    smallest: str
    within_budget: str | None = Field(description="the best within the budget; null: none fits")


class SharedLatency(Model):
    """A cell that was timed by itself, since cells of one graph share their latency."""

    cell: Line = Field(description="id")
    p50_ms: Positive
    shared_p50_ms: Positive = Field(description="of what it shares it with, timed beside it")
    ratio_interval: PositiveInterval = Field(description="of the first over the second, paired")


class TargetInfo(Model):
    """Where cells were measured, and what is to be had there."""

    name: Name
    description: Line
    engines: tuple[Name, ...] = Field(min_length=1)
    machine: Machine
    noise: Noise | None = Field(description="null: latency was not measured here")
    shapes: tuple[Shape, ...] = Field(
        min_length=1, description="that were timed; limits mean the first"
    )
    asked: tuple[Shape, ...] = Field(description="the same, before the maximum length cut them")
    tokenization: tuple[Tokenization, ...]
    budget: Mapping[str, Figure | Line] = Field(description="limits by key, and their metric")
    reference: str = Field(description="id of the deepest, widest, unquantized cell")
    recommended: Recommended
    samples: tuple[SharedLatency, ...]


class Failure(Model):
    """Cells that could not be measured, since their graph does not pass its checks."""

    target: Name | None = Field(None, description="null: written before it was recorded")
    engine: Line
    layers: Natural
    align: Align
    weights: WeightPrecision
    reason: Line
    cells: tuple[Line, ...] = Field(description="ids")


class CrossDepth(Model):
    """Queries of one depth against documents of another: the first weights, float32 vectors."""

    dim: Count
    queries: Name = Field(description='depth, as in "1" or "1-aligned"')
    documents: Name = Field(description="likewise")
    quality: Mapping[str, Points] = Field(description='"task/metric" -> points, 0 to 100')


class AlignedWith(Model):
    """What the maps of aligned cells were fitted on."""

    texts: Natural
    sha256: Name


class Profile(Model):
    """profile.json."""

    format: int
    created: Name = Field(description="UTC, ISO 8601")
    tools: Mapping[Line, Line] = Field(description="name -> version")
    checkpoint: CheckpointInfo
    tasks: tuple[TaskInfo, ...] = Field(min_length=1)
    replicates: Count = Field(description="bootstrap resamples behind every interval of quality")
    calibration_sha256: Line
    aligned_with: AlignedWith | None = Field(description="null: no cell is aligned")
    decided_by: Name = Field(
        description="hash of all that decides the figures apart from the machine: weights, "
        "tokenizer, prompts, pooling, evaluation data, texts, grid, tools; the same in all shards"
    )
    shard: Shard | None = Field(description='"2/3": the second of three parts; null: the whole')
    seconds: Mapping[str, Elapsed] = Field(description="step -> seconds, of the last run alone")
    targets: tuple[TargetInfo, ...] = Field(min_length=1)
    cells: tuple[Cell, ...]
    cross_depth: tuple[CrossDepth, ...]
    failures: tuple[Failure, ...]

    @property
    def mains(self) -> list[str]:
        """The main metric of each task, as "task/metric"."""
        return [task.main for task in self.tasks]

    @property
    def query_mains(self) -> list[str]:
        """Those of retrieval, by which queries to another's index are judged."""
        return [task.main for task in self.tasks if task.kind == "retrieval"]

    def target(self, name: str | None = None) -> TargetInfo:
        """Return a target by name; without one, the first.

        Raises:
            UsageError: when the profile has no such target.
        """
        for target in self.targets:
            if name in (None, target.name):
                return target
        known = ", ".join(target.name for target in self.targets)
        raise UsageError(f"the profile has no target {name}; it has: {known}.")

    def of_target(self, name: str | None = None) -> tuple[Cell, ...]:
        """Return the cells of a target; without a name, of the first."""
        wanted = self.target(name).name
        return tuple(cell for cell in self.cells if cell.target == wanted)

    def threads(self, target: str | None = None) -> int:
        """Return the most threads that one batch of a target's engine was run by."""
        engine = self.target(target).engines[0]
        cells = self.of_target(target)
        return max(cell.device.threads for cell in cells if cell.engine == engine)

    def reference_cell(self, target: str | None = None) -> Cell:
        """Return the reference cell of a target: the deepest, widest, unquantized one."""
        return self.cell(self.target(target).reference, target)

    def metric(self, cell: Cell, name: str) -> float:
        """Return a cell's points in one metric, or their mean.

        Raises:
            UsageError: when the profile has no such metric.
        """
        if name == MEAN:
            return cell.mean_quality
        if name not in cell.quality:
            known = ", ".join([MEAN, *sorted(cell.quality)])
            raise UsageError(f"the profile has no metric {name!r}; it has: {known}.")
        return cell.quality[name]

    def query_metric(self, cell: Cell, index: Cell, name: str) -> float | None:
        """Return a cell's points in one metric, or their mean, as a query encoder of an index.

        Args:
            cell: whose queries are put to the index.
            index: the cell that wrote it.
            name: a metric, or "mean": of the main metrics of retrieval tasks.

        Returns:
            None where it was not measured.

        Raises:
            UsageError: when the profile has no such metric of queries.
        """
        if not self.query_mains:
            raise UsageError(
                "the profile holds no retrieval, so no queries were measured; profile with --eval "
                "of a BEIR folder."
            )
        found = index.quality if cell.id == index.id else cell.as_query.get(index.id)
        if found is None:
            return None
        metrics = self.query_mains if name == MEAN else [name]
        if any(metric not in found for metric in metrics):
            raise UsageError(
                f"the profile has no metric {name!r} of queries; it has: "
                f"{', '.join([MEAN, *sorted(found)])}."
            )
        return float(sum(found[metric] for metric in metrics) / len(metrics))

    def score(self, cell: Cell, name: str = MEAN, index: Cell | None = None) -> Score | None:
        """Return a main metric of a cell, or the mean of all, with its replicates.

        Args:
            cell: the cell.
            name: a metric, or "mean": of the tasks' main metrics; with an index, of retrieval.
            index: the cell whose documents are queried; None: the cell's own.

        Returns:
            None where the metric has no replicates.
        """
        found, points = cell.replicates, cell.quality
        if index is not None and cell.id != index.id:
            found = cell.query_replicates.get(index.id, {})
            points = cell.as_query.get(index.id, {})
        mains = self.mains if index is None else self.query_mains
        names = mains if name == MEAN else [name]
        if not names or any(each not in found for each in names):
            return None
        return mean_of([score_from(points[each], found[each]) for each in names])

    def failure_of(self, cell_id: str, target: str) -> str | None:
        """Return why a cell of a target could not be measured; None where that is not said."""
        found = (each for each in self.failures if each.target in (None, target))
        return next((each.reason for each in found if cell_id in each.cells), None)

    def cell(self, cell_id: str, target: str | None = None) -> Cell:
        """Return the cell of an id, of a target or of the first.

        Raises:
            UsageError: when the profile has no such cell.
        """
        cells = self.of_target(target)
        for cell in cells:
            if cell.id == cell_id:
                return cell
        if (reason := self.failure_of(cell_id, cells[0].target)) is not None:
            raise UsageError(f"the cell {cell_id} failed when measured: {reason}")
        raise unknown_cell("the profile", cell_id, (cell.id for cell in cells))
