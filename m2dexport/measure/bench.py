"""A bundle measured where it runs: what it costs there, for people and for ``profile merge``."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m2dexport import __version__
from m2dexport.cores import threads_for, workers_for
from m2dexport.data import calibration_texts
from m2dexport.engines import SPIN_US, Device, engine_version
from m2dexport.errors import UsageError
from m2dexport.files import sha256_of
from m2dexport.measure.footprint import measure_encoder
from m2dexport.measure.latency import Conditions, LatencyPoint, Loaded, Run, time_shape
from m2dexport.measure.machine import Machine, read_machine
from m2dexport.measure.noise import Noise, moment, noise_of, usage_since
from m2dexport.measure.requests import Requests, Tokenization, requests_of, time_tokenization
from m2dexport.measure.size import SizeParts, size_parts
from m2dexport.runtime import artifact
from m2dexport.runtime.artifact import FULL_MODEL, RANGES, TOKENIZER, ArtifactSpec
from m2dexport.runtime.cells import open_cells
from m2dexport.runtime.encoder import Encoder
from m2dexport.runtime.loading import load
from m2dexport.strict import is_name, require_name
from m2dexport.vectors.codecs import bytes_per_vector

FORMAT, KIND = 1, "bench"
#: As a profile has them where its target names none.
SHAPES = ((1, 16), (1, 64), (16, 32))
#: Tokens of a shape, padding included: as many as a target may ask for.
MAX_TOKENS = 1 << 18
_SECONDS = 3.0  # of timing for each shape, where nothing else takes turns

Shape = tuple[int, int]


@dataclass(frozen=True)
class Bench:
    """What a bundle or an artifact costs on this machine."""

    name: str  # of the machine
    created: str  # UTC, ISO 8601
    path: Path
    sha256: str | None  # of the bundle; None: an artifact folder
    size_bytes: int  # of the bundle, or of all files of the folder
    spec: ArtifactSpec
    device: Mapping[str, Any]  # provider, threads, spin_us, workers
    parts: SizeParts
    machine: Machine
    versions: Mapping[str, str]
    asked: tuple[Shape, ...]
    shapes: tuple[Shape, ...]  # the same, within the maximum length
    latency: tuple[LatencyPoint, ...]
    tokenization: tuple[Tokenization, ...]
    load_ms: float  # from the file, with its checks, to an encoder that can run
    first_ms: float  # the first text after that
    peak_memory_bytes: int
    used_memory_bytes: int
    noise: Noise

    def as_json(self) -> dict[str, Any]:
        """Return the results as ``profile merge`` reads them (docs/profile.md)."""
        kept = ("load_ms", "first_ms", "peak_memory_bytes", "used_memory_bytes")
        return {
            "format": FORMAT,
            "kind": KIND,
            "name": self.name,
            "created": self.created,
            "bundle": {
                "path": str(self.path),
                "sha256": self.sha256,
                "size_bytes": self.size_bytes,
            },
            "cell": {**_identity(self.spec), **_sizes(self), "device": dict(self.device)},
            "machine": asdict(self.machine),
            "versions": dict(self.versions),
            "asked": _shapes(self.asked),
            "shapes": _shapes(self.shapes),
            "latency": [_latency(point) for point in self.latency],
            "tokenization": [asdict(each) for each in self.tokenization],
            "text_p50_ms": self.latency[0].text_p50_ms,
            **{field: getattr(self, field) for field in kept},
            "noise": asdict(self.noise),
        }


def bench(
    path: str | Path,
    device: Device = Device(),
    shapes: Sequence[Shape] = SHAPES,
    *,
    repeats: int | None = None,
    name: str | None = None,
    cell: str | None = None,
) -> Bench:
    """Measure a bundle (a .m2d archive) or an artifact folder on this machine.

    Args:
        path: the archive or the folder.
        device: what to run it on; the rest is as the artifact says.
        shapes: (texts, tokens), cut to the maximum length; the first is also timed from text.
        repeats: timed rounds of each shape; None: by the time that they take.
        name: of the machine; None: its host name.
        cell: id of a cell of the bundle; None: the default one.

    Raises:
        UsageError: when there is nothing there, no such cell, or a shape or name is impossible.
        M2DError: when the archive is damaged, or it does not run.
    """
    path, name = Path(path), _called(name)
    _require_shapes(shapes)
    encoder = load(path, device, cell)
    spec = encoder.spec
    cut = tuple(dict.fromkeys((batch, min(size, spec.max_length)) for batch, size in shapes))
    requests = [_requests(encoder, shape) for shape in cut]
    settings = _settings(encoder, device.or_else(spec.device))
    latency, noise = _timed(encoder, requests, settings, repeats)
    del encoder
    return Bench(
        name=name,
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        path=path,
        sha256=None if path.is_dir() else sha256_of(path),
        size_bytes=_size(path),
        spec=spec,
        device=settings,
        parts=_parts_of(path, spec, cell),
        machine=read_machine(),
        versions=_versions(spec.engine),
        asked=tuple(shapes),
        shapes=cut,
        latency=latency,
        tokenization=tuple(time_tokenization(each) for each in requests),
        **asdict(measure_encoder(path, spec.engine, device, cut, requests[0].texts[0][:1], cell)),
        noise=noise,
    )


def _called(name: str | None) -> str:
    """Return what this machine is called; its host name may be none that can be printed."""
    if name is not None:
        return require_name(name, "this machine")
    return platform.node() if is_name(platform.node()) else "device"


def _timed(
    encoder: Encoder, requests: Sequence[Requests], settings: Mapping[str, Any], repeats: int | None
) -> tuple[tuple[LatencyPoint, ...], Noise]:
    """Time the shapes of requests; the encoder is its own reference."""
    group = Loaded({"": _run_of(encoder)}, {}, settings["spin_us"] * 1e-6, "")
    conditions = Conditions(encoder.vocab_size, repeats, _SECONDS)
    start = moment()
    timed = [
        time_shape(group, each.shape, conditions, None if number else {"": each})
        for number, each in enumerate(requests)
    ]
    noise = noise_of(timed[0].reference_ms, [usage_since(start)], "the encoder")
    return tuple(each.points[""] for each in timed), noise


def _require_shapes(shapes: Sequence[Shape]) -> None:
    if not shapes:
        raise UsageError("no shape is given; name one such as 1x16, texts x tokens.")
    for batch, sequence in shapes:
        if batch < 1 or sequence < 1 or batch * sequence > MAX_TOKENS:
            raise UsageError(
                f"{batch}x{sequence} cannot be timed; a shape is texts x tokens, each 1 or more, "
                f"and {MAX_TOKENS} tokens at most."
            )


def _requests(encoder: Encoder, shape: Shape) -> Requests:
    return requests_of(encoder.tokenizer, calibration_texts(), encoder.default_prompt, shape)


def _run_of(encoder: Encoder) -> Run:
    """Return what runs a batch: one text at a time where its vectors depend on the batch."""
    if encoder.spec.batch_invariant:
        return encoder.run

    def one_by_one(ids: NDArray[np.int64], mask: NDArray[np.int64]) -> list[NDArray[Any]]:
        return [encoder.run(ids[row : row + 1], mask[row : row + 1]) for row in range(len(ids))]

    return one_by_one


def _parts_of(path: Path, spec: ArtifactSpec, cell: str | None) -> SizeParts:
    if path.is_dir():
        graph: Mapping[str, Path | bytes] = artifact.graph_files(path, spec.engine)
        others = {
            name: (path / name).stat().st_size
            for name in (TOKENIZER, RANGES)
            if (path / name).exists()
        }
    else:
        files = open_cells(path).files(cell)
        graph = {name: files[name] for name in files if name in artifact.GRAPH_FILES}
        others = {name: len(files[name]) for name in (TOKENIZER, RANGES) if name in files}
    return size_parts(spec.engine, graph, others[TOKENIZER], others.get(RANGES, 0))


def _size(path: Path) -> int:
    if path.is_dir():
        return sum(each.stat().st_size for each in path.iterdir() if each.is_file())
    return path.stat().st_size


def _settings(encoder: Encoder, device: Device) -> dict[str, Any]:
    """Return what it runs on, in the words of profile.json."""
    return {
        "provider": encoder.describe()["provider"],
        "threads": threads_for(device.threads),
        "spin_us": SPIN_US if device.spin_us is None else device.spin_us,
        "workers": workers_for(device.workers, device.threads),
    }


def _versions(engine: str) -> dict[str, str]:
    package, installed = engine_version(engine)
    others = {name: version(name) for name in ("numpy", "tokenizers")}
    return dict(sorted({"m2dexport": __version__, package: installed, **others}.items()))


def _identity(spec: ArtifactSpec) -> dict[str, Any]:
    """Return which cell a bundle is, in the words of profile.json."""
    named = ("layers", "dim", "weights", "vectors", "engine", "isa", "space_id")
    return {
        **{name: getattr(spec, name) for name in named},
        "align": "none" if artifact.full_layers(spec) is None else "full",
        "speaks": spec.speaks.space_id if spec.speaks else None,
        "checkpoint_sha256": spec.provenance.get("checkpoint"),
        "sub_model_sha256": spec.provenance.get("sub_model"),
        "full_model_sha256": spec.provenance.get(FULL_MODEL),
        "bytes_per_vector": bytes_per_vector(spec.dim, spec.vectors),
    }


def _sizes(found: Bench) -> dict[str, Any]:
    parts = asdict(found.parts)
    return {"size_bytes": sum(parts.values()), "size_parts": parts}


def _shapes(shapes: Sequence[Shape]) -> list[dict[str, int]]:
    return [{"batch": batch, "sequence": sequence} for batch, sequence in shapes]


def _latency(point: LatencyPoint) -> dict[str, Any]:
    """Return a point as profile.json has it."""
    named = ("batch", "sequence", "p50_ms", "p95_ms", "p99_ms", "runs")
    ranges = {"p50_interval": point.p50_range, "p95_interval": point.p95_range}
    return {
        **{name: getattr(point, name) for name in named},
        **{name: {"low": low, "high": high} for name, (low, high) in ranges.items()},
    }
