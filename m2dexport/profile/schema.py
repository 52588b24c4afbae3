"""profile.json: what it holds, read and written, and its JSON Schema."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from m2dexport.data import read_utf8
from m2dexport.errors import UsageError
from m2dexport.files import atomic_file
from m2dexport.precisions import Align, Isa, VectorPrecision, WeightPrecision
from m2dexport.strict import parse_json

FORMAT = 4
MEAN = "mean"
_DIGITS = 6

Flag = Literal[
    "untrained",
    "slower_than_fp32",
    "below_shallower",
    "below_static",
    "batch_dependent",
    "mixed_precision",
]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class MeasuredOn(_Model):
    """What a graph was run on."""

    provider: str = Field(description="execution provider, or OpenVINO device")
    threads: int = Field(description="that run one batch")
    spin_us: int = Field(description="microseconds at most that an idle thread waits in a loop")
    workers: int = Field(description="batches of a list that run at once")


class Machine(_Model):
    """Where the figures were measured."""

    cpu: str = Field(description="model name")
    flags: tuple[str, ...] = Field(description="instruction sets that decide speed and exactness")
    cores: int
    memory_bytes: int
    os: str
    python: str


class CheckpointInfo(_Model):
    """Which checkpoint was profiled."""

    model: str | None = Field(description="as the user named it; null: the one that ships")
    sha256: str = Field(description="hash of the weights by content")
    model_type: str
    layers: int
    dim: int
    trained: tuple[tuple[int, int], ...] | None = Field(description="null: unknown")
    pooling: str | None = Field(description="as declared by the user; null: as stored")


class TaskInfo(_Model):
    """One evaluation set."""

    name: str
    kind: Literal["sts", "retrieval"]
    main_metric: str
    texts: int
    sha256: str


class Shape(_Model):
    """The input of one timed run: every token is real, none is padding."""

    batch: int
    sequence: int


class Latency(_Model):
    """Latency at one shape, tokenization not included."""

    batch: int
    sequence: int
    p50_ms: float
    p95_ms: float
    runs: int


class Cell(_Model):
    """One point of the profile: what a (layers, dim, weights, vectors) gives and costs."""

    id: str
    layers: int = Field(description="0: the static model, a table of token vectors")
    dim: int
    align: Align = Field(description="full: ends in a map into the full depth's space")
    weights: WeightPrecision
    vectors: VectorPrecision
    engine: str
    device: MeasuredOn
    isa: Isa = Field(description="processors that int8 weights are made for")
    quality: Mapping[str, float] = Field(description='"task/metric" -> points, 0 to 100')
    as_query: Mapping[str, Mapping[str, float]] = Field(
        description="index cell -> quality of this cell's queries on what that cell wrote"
    )
    mean_quality: float = Field(description="unweighted mean of the tasks' main metrics, points")
    retention: float | None = Field(
        description="mean_quality over that of the reference cell; null: that one has none"
    )
    latency: tuple[Latency, ...]
    p50_ms: float = Field(description="at latency_shape")
    p95_ms: float = Field(description="at latency_shape")
    load_ms: float = Field(description="from file to a session that can run")
    size_bytes: int = Field(description="graph, tokenizer and ranges")
    peak_memory_bytes: int = Field(description="of a process of its own, at the largest shape")
    used_memory_bytes: int = Field(description="its peak after 1,000 requests of mixed shapes")
    bytes_per_vector: int
    flags: tuple[Flag, ...]
    on_frontier: bool = Field(description="no cell is better in one respect and worse in none")


class Failure(_Model):
    """Cells that could not be measured, since their graph does not pass its checks."""

    layers: int
    align: Align
    weights: WeightPrecision
    reason: str
    cells: tuple[str, ...] = Field(description="ids")


class CrossDepth(_Model):
    """Queries of one depth against documents of another: the first weights, float32 vectors."""

    dim: int
    queries: str = Field(description='depth, as in "1" or "1-aligned"')
    documents: str = Field(description="likewise")
    quality: Mapping[str, float] = Field(description='"task/metric" -> points, 0 to 100')


class AlignedWith(_Model):
    """What the maps of aligned cells were fitted on."""

    texts: int
    sha256: str


class Profile(_Model):
    """profile.json."""

    format: int
    created: str = Field(description="UTC, ISO 8601")
    tools: Mapping[str, str] = Field(description="name -> version")
    machine: Machine
    checkpoint: CheckpointInfo
    tasks: tuple[TaskInfo, ...]
    calibration_sha256: str
    aligned_with: AlignedWith | None = Field(description="null: no cell is aligned")
    reference: str = Field(description="id of the deepest, widest, unquantized cell")
    latency_shape: Shape
    seconds: Mapping[str, float] = Field(description="step -> seconds it took")
    cells: tuple[Cell, ...]
    cross_depth: tuple[CrossDepth, ...]
    failures: tuple[Failure, ...]

    @property
    def threads(self) -> int:
        """The most threads that one batch of the reference's engine was run by."""
        engine = self.cell(self.reference).engine
        return max(cell.device.threads for cell in self.cells if cell.engine == engine)

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
        retrieval = [task for task in self.tasks if task.kind == "retrieval"]
        if not retrieval:
            raise UsageError(
                "the profile holds no retrieval, so no queries were measured; profile with --eval "
                "of a BEIR folder."
            )
        found = index.quality if cell.id == index.id else cell.as_query.get(index.id)
        if found is None:
            return None
        metrics = [f"{task.name}/{task.main_metric}" for task in retrieval]
        metrics = metrics if name == MEAN else [name]
        if any(metric not in found for metric in metrics):
            raise UsageError(
                f"the profile has no metric {name!r} of queries; it has: "
                f"{', '.join([MEAN, *sorted(found)])}."
            )
        return float(sum(found[metric] for metric in metrics) / len(metrics))

    def cell(self, cell_id: str) -> Cell:
        """Return the cell of an id.

        Raises:
            UsageError: when the profile has no such cell.
        """
        for cell in self.cells:
            if cell.id == cell_id:
                return cell
        for failure in self.failures:
            if cell_id in failure.cells:
                raise UsageError(f"the cell {cell_id} failed when measured: {failure.reason}")
        raise UsageError(
            f"the profile has no cell {cell_id!r}; ids look like {self.cells[0].id}, and select "
            "names one."
        )


def cell_id(layers: int, dim: int, weights: str, vectors: str, align: str = "none") -> str:
    """Return the id of a cell: "6x128-int8-ubinary" is 6 layers, 128 dims, weights, vectors.

    An aligned one is "2x128-aligned-int8-ubinary".
    """
    return f"{layers}x{dim}-{'aligned-' if align == 'full' else ''}{weights}-{vectors}"


def depth_name(layers: int, align: str) -> str:
    """Return how ``CrossDepth`` calls a depth."""
    return f"{layers}-aligned" if align == "full" else str(layers)


def write_profile(profile: Profile, path: str | Path, *, force: bool = False) -> None:
    """Write profile.json: sorted keys and floats of six digits, whole or not at all.

    Raises:
        UsageError: when ``path`` exists and ``force`` does not say that it is to be replaced.
    """
    text = json.dumps(_rounded(profile.model_dump(mode="json")), indent=2, sort_keys=True)
    with atomic_file(Path(path), force=force) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def read_profile(path: str | Path) -> Profile:
    """Read profile.json.

    Raises:
        UsageError: when it is missing, no profile, or of a later format.
    """
    path = Path(path)
    stored = parse_json(read_utf8(path), path)
    number = stored.get("format") if isinstance(stored, dict) else None
    if number != FORMAT:
        raise UsageError(f"{path} has format {number}; this version reads format {FORMAT}.")
    try:
        profile = Profile.model_validate(stored)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UsageError(f"{path} is not a profile: {where}: {first['msg']}.") from error
    if not profile.cells:
        raise UsageError(f"{path} holds no cells.")
    return profile


def profile_schema() -> dict[str, Any]:
    """Return the JSON Schema of profile.json, which ships as data/profile.schema.json."""
    schema = Profile.model_json_schema(mode="serialization")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _rounded(value: Any) -> Any:
    """Round floats to six significant digits: more would be noise, and diffs would show it."""
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return value
