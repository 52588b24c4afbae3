"""Engines: what runs a graph. ``ENGINES`` is the only list of them; each has two modules.

``run.py`` is what a device needs:

* ``devices()``: the providers that this machine offers, as a device names them;
* ``require_device(device)``: what it would run on, refused where this machine does not have it;
* ``load(files, device, isa)``: the files of a graph, by name -> a session;
* ``run(session, input_ids, attention_mask)``: int64 (batch, sequence) -> the graph's outputs;
* ``describe(session)``: what the session really runs on, for a record.

``make.py`` is what a build needs:

* ``PRECISIONS``: the weights that the engine runs, and what each requires;
* ``fuse(graph)``: a plain graph, in place, in the operators that the engine runs fastest;
* ``quantize(graph, weights, calibration, isa)``: a float32 graph -> one of other weights;
* ``files(graph, compilation)``: a graph -> the engine's own files, by name;
* of engines for a GPU, ``require_compilation(compilation)``: what they would be built for, refused
  where that cannot be; and ``compiled(files, compilation)``: the files, once an engine was built
  of them.
"""

from __future__ import annotations

import importlib
import mmap
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Annotated, Literal, get_args

from m2dexport.errors import M2DError, MissingDevice, MissingExtra, UsageError
from m2dexport.precisions import WeightPrecision
from m2dexport.strict import Name, Within


@dataclass(frozen=True)
class Engine:
    """What must be known of an engine where it is not installed."""

    folder: str  # of its modules here
    package: str  # the Python package that it is
    files: tuple[str, ...]  # of a graph: the one that names the others first
    #: Of that file: ONNX, OpenVINO's intermediate representation, or a table of token vectors.
    format: Literal["onnx", "ir", "table"]
    provider: str  # that runs it unless a device says otherwise
    weights: WeightPrecision = "fp32"  # unless others are asked for
    #: The provider that computes the same on any machine, to check graphs on where the device is
    #: missing; None: nothing does, or graphs are made on the device alone.
    oracle: str | None = None
    may_hold: tuple[str, ...] = ()  # files that a graph may come with, too

    @property
    def on_gpu(self) -> bool:
        """Whether it compiles a graph for a GPU, on which it then runs."""
        return self.provider == "CUDA"

    @property
    def encodes(self) -> bool:
        """Whether a graph puts out codes; else it puts out float vectors, which numpy encodes."""
        return self.format != "table"


ENGINES: Mapping[str, Engine] = {
    "onnx": Engine(
        folder="onnxruntime",
        package="onnxruntime",
        files=("model.onnx",),
        format="onnx",
        provider="CPUExecutionProvider",
        oracle="CPUExecutionProvider",
    ),
    "openvino": Engine("openvino", "openvino", ("model.xml", "model.bin"), "ir", "CPU"),
    "tensorrt": Engine(
        folder="tensorrt",
        package="tensorrt",
        files=("model.onnx", "engine.toml"),
        format="onnx",
        provider="CUDA",
        weights="fp16",
        may_hold=("model.engine",),
    ),
    "tensorrt-rtx": Engine(
        folder="tensorrt_rtx",
        package="tensorrt_rtx_bindings",
        files=("model.onnx", "engine.toml"),
        format="onnx",
        provider="CUDA",
        weights="fp16",
        oracle="CPU",
        may_hold=("model.engine",),
    ),
    "static": Engine("numpy", "numpy", ("table.safetensors",), "table", "CPU"),
}
#: What is taken where nobody names an engine: for transformers, and for depth 0.
DEFAULT_ENGINE, STATIC_ENGINE = "onnx", "static"


#: How long threads spin where nobody says: as fast as without a limit, to one or two percent, and a
#: core is free again 0.2 ms after a request (docs/performance.md).
SPIN_US = 200
MOST_SPIN_US = 1_000_000


@dataclass(frozen=True)
class Device:
    """What a session is opened on: the same object from a target to the runtime."""

    provider: Name | None = None  # execution provider or OpenVINO device; None: the engine's CPU
    threads: int | None = None  # that run one batch; None: as many as this process may use
    #: Microseconds at most that an idle thread of onnxruntime waits for work in a loop, which is
    #: faster and burns its core; 0: it sleeps at once; None: ``SPIN_US``.
    spin_us: Annotated[int, Within(0, MOST_SPIN_US)] | None = None
    workers: int | None = None  # batches of a list that run at once; None: one
    cache: Path | None = None  # where an engine that compiles keeps what it made; None: nowhere

    def or_else(self, other: Device) -> Device:
        """Return this device, with what it leaves open (None) taken from another one."""
        taken = {name: value for name, value in vars(self).items() if value is not None}
        return replace(other, **taken)


#: What else than its own GPU and version a TensorRT engine can be made to run on: other GPUs from
#: Ampere on, and later versions. TensorRT-RTX engines are portable as they are.
Compatible = Literal["hardware", "version"]
COMPATIBLE: tuple[Compatible, ...] = get_args(Compatible)


@dataclass(frozen=True)
class Compilation:
    """What an engine for a GPU is made for; the others have no use for it."""

    gpus: tuple[str, ...] = ()  # compute capabilities such as "8.9"; none: all that are known
    shapes: tuple[tuple[int, int], ...] = ()  # (texts, tokens) that it must be fast at
    max_length: int = 512  # tokens of a text at most
    compatible: tuple[Compatible, ...] = ()
    keep_engine: bool = False  # beside the graph; else it is built where it runs


def engine_of(name: str) -> Engine:
    """Return what is known of an engine.

    Raises:
        UsageError: when there is no such engine.
    """
    if name not in ENGINES:
        raise UsageError(f"the engine {name!r} is unknown; choose from {', '.join(ENGINES)}.")
    return ENGINES[name]


def engine_runner(name: str) -> ModuleType:
    """Return the module that runs an engine's graphs.

    Raises:
        UsageError: when there is no such engine.
        MissingExtra: when its package is not installed.
    """
    return _module(name, "run")


def engine_maker(name: str) -> ModuleType:
    """Return the module that makes an engine's graphs.

    Raises:
        UsageError: when there is no such engine.
        MissingExtra: when its package is not installed.
    """
    return _module(name, "make")


def _module(name: str, part: str) -> ModuleType:
    engine = engine_of(name)
    try:
        return importlib.import_module(f"{__name__}.{engine.folder}.{part}")
    except ModuleNotFoundError as error:
        if error.name != engine.package:
            raise
        extra = engine.folder.replace("_", "-")
        raise MissingExtra(f"The engine {name}", engine.package, extra) from error


@dataclass(frozen=True)
class Here:
    """What graphs for a device run on, on this machine."""

    device: Device
    lacks: str | None = None  # why that is the engine's oracle, and not the device


def here(name: str, device: Device, *, elsewhere: bool = False) -> Here:
    """Return what graphs for a device run on here: that device, or the engine's oracle.

    Args:
        name: of the engine.
        device: what the graphs are for.
        elsewhere: whether a device that names its provider may be another machine's; else who
            names one gets that or an error.

    Raises:
        UsageError: when this machine lacks the device, and the engine has no oracle.
        MissingExtra: when the engine is not installed.
    """
    oracle, runner = engine_of(name).oracle, engine_runner(name)
    try:
        runner.require_device(device)
    except (MissingDevice, MissingExtra) as error:
        if oracle is None or (device.provider is not None and not elsewhere):
            raise
        return Here(replace(device, provider=oracle, cache=None), str(error))
    return Here(device)


def file_view(file: Path | bytes | bytearray) -> memoryview:
    """Return the content of a graph's file; one that is a path is mapped into memory."""
    if not isinstance(file, Path):
        return memoryview(file)
    if file.stat().st_size == 0:  # which cannot be mapped
        return memoryview(b"")
    with file.open("rb") as stream:
        return memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))


def engine_version(name: str) -> tuple[str, str]:
    """Return the package of an engine and the version that is installed, such as "1.32.0"."""
    engine_runner(name)  # which sets what onnxruntime reads while it is imported
    package = engine_of(name).package
    return package, str(importlib.import_module(package).__version__).partition("-")[0]


def require_version(name: str, oldest: str) -> None:
    """Refuse a graph that the installed engine is too old for.

    Args:
        name: a key of ``ENGINES``.
        oldest: the version that knows every operator of the graph, such as "1.22".

    Raises:
        M2DError: when the installed version is older.
    """
    package, installed = engine_version(name)
    if is_older(installed, oldest):
        raise M2DError(
            f"the graph needs {package} {oldest} or newer and {installed} is installed; "
            f"upgrade {package}, or build with other weights, such as int8."
        )


def is_older(installed: str, oldest: str) -> bool:
    """Say whether a version, such as "2.13.0+cpu", is older than another, such as "2.8"."""
    needed = [int(part) for part in oldest.split(".")]
    release = re.match(r"[\d.]*", installed)
    found = [int(part) for part in release[0].split(".") if part] if release else []
    return found[: len(needed)] < needed
