"""The TensorRT library, of either name: from a graph to an engine, and from its bytes to an engine.

Both libraries have the same functions. TensorRT-RTX makes portable engines, for GPUs that need not
be there; TensorRT makes one for the GPU at hand.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from m2dexport.engines import ENGINES, engine_version
from m2dexport.engines.tensorrt.recipe import EngineRecipe
from m2dexport.errors import M2DError, UsageError, one_line
from m2dexport.files import keep_file

#: What TensorRT says of a mistake of its own making, after the mistake itself.
_ECHO = re.compile(r"checkMacros\.cpp|--- (Begin|End) node|^Node name:|While parsing node")
_PLACE = re.compile(
    r"\s*In \w+ at /\S+|\[\w+\.cpp:\d+: \w+\]\s*|\w+\.cpp:\d+:\s*|"
    r"I\w+::\w+: Error Code \d+: [\w ]+ \(|ERROR: |In function \w+:\s*|\[\d+\] "
)
_RTX = "tensorrt-rtx"
#: Of the GPUs that TensorRT-RTX knows, the one that multiplies in float16 only.
_TURING = "7.5"


def import_library(engine: str) -> Any:
    """Return the Python module of an engine's library."""
    return importlib.import_module(ENGINES[engine].package)


def is_portable(engine: str) -> bool:
    """Say whether a library makes engines for GPUs that need not be there."""
    return engine == _RTX


def known_gpus(trt: Any) -> list[str]:
    """Return the compute capabilities that portable engines can be made for, such as "8.9"."""
    names = [name for name in trt.ComputeCapability.__members__ if name.startswith("SM")]
    return [f"{name[2:-1]}.{name[-1]}" for name in sorted(names, key=lambda name: int(name[2:]))]


def require_gpus(engine: str, gpus: Sequence[str]) -> None:
    """Refuse GPUs that a library makes no engines for.

    Raises:
        UsageError: naming those that there are.
    """
    if not gpus:
        return
    if not is_portable(engine):
        raise UsageError(
            f"{engine} makes engines for the GPU of this machine alone; leave --gpu out, or take "
            f"--engine {_RTX}."
        )
    known = known_gpus(import_library(engine))
    for gpu in gpus:
        if gpu not in known:
            raise UsageError(
                f"{engine} {engine_version(engine)[1]} makes no engines for the compute capability "
                f"{gpu!r}; choose from {', '.join(known)}, or take --engine tensorrt on that GPU."
            )


def gpus_for(engine: str, gpus: Sequence[str]) -> list[str]:
    """Return the compute capabilities to build for: those asked for, in order, or all."""
    if not is_portable(engine):
        return []
    known = known_gpus(import_library(engine))
    return [gpu for gpu in known if gpu in gpus] if gpus else known


def build_anywhere(graph: bytes, recipe: EngineRecipe) -> tuple[bytes, list[str]]:
    """Return an engine for all of a recipe's GPUs that the graph allows, and those GPUs.

    Turing, 7.5, is left out where the graph needs what it lacks: it multiplies in float16 only.

    Raises:
        M2DError: when the library refuses the graph.
    """
    others = [gpu for gpu in recipe.gpus if gpu != _TURING]
    if recipe.computes == "float16" or not others:
        try:
            return build_engine(graph, recipe, recipe.gpus), recipe.gpus
        except M2DError:
            if others in ([], recipe.gpus):
                raise
    return build_engine(graph, recipe, others), others


def build_engine(
    graph: bytes, recipe: EngineRecipe, gpus: Sequence[str], timing: Path | None = None
) -> bytes:
    """Return an engine of an ONNX graph.

    Args:
        graph: the ONNX file.
        recipe: the library, the profiles, and what else the engine must run on.
        gpus: the compute capabilities of a portable engine; none: that of the GPU at hand.
        timing: where TensorRT keeps what it has timed, to be faster next time; None: nowhere.

    Raises:
        M2DError: when the library refuses the graph, with what it says.
    """
    trt = import_library(recipe.library)
    log = _log_of(trt)
    builder = trt.Builder(log)
    network = builder.create_network(_strongly_typed(trt))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(graph):
        raise _refusal(recipe, "cannot read the graph", log)
    config = builder.create_builder_config()
    for each in recipe.profiles:
        profile = builder.create_optimization_profile()
        for index in range(network.num_inputs):
            name = network.get_input(index).name
            profile.set_shape(name, each.least, each.best, each.most)
        config.add_optimization_profile(profile)
    _configure(trt, config, recipe, gpus)
    if timing is not None:
        config.set_timing_cache(config.create_timing_cache(_content(timing)), True)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise _refusal(recipe, "cannot build the graph", log)
    if timing is not None:
        keep_file(timing, bytes(config.get_timing_cache().serialize()))
    return bytes(engine)


def read_engine(content: bytes, recipe: EngineRecipe) -> Any:
    """Return the ICudaEngine of an engine's bytes, on the current GPU.

    Raises:
        M2DError: when it is damaged, or of another version or GPU, or the GPU has too little
            memory or too old a driver.
    """
    engine = recipe.library
    trt = import_library(engine)
    log = _log_of(trt)
    runtime = trt.Runtime(log)
    if "version" in recipe.compatible:  # which brings code; such engines are built here alone
        runtime.engine_host_code_allowed = True
    found = runtime.deserialize_cuda_engine(content)
    if found is None:
        raise M2DError(
            f"{engine} {engine_version(engine)[1]} cannot load the engine: "
            f"{_validity(runtime, content) or log.reason()}."
        )
    return found


def _validity(runtime: Any, content: bytes) -> str | None:
    """Return what TensorRT-RTX says is wrong with an engine, in our words, where it does."""
    if not hasattr(runtime, "get_engine_validity"):
        return None
    diagnostics = int(runtime.get_engine_validity(content)[1])
    said = {
        1: "it was made by another version",
        2: "it was made for other GPUs than this one",
        4: "the GPU's driver is too old for it; update the driver",
        8: "CUDA's runtime is too old for it",
        16: "the GPU has too little memory for it",
        32: "it is damaged",
    }
    return next((words for bit, words in said.items() if diagnostics & bit), None)


def _configure(trt: Any, config: Any, recipe: EngineRecipe, gpus: Sequence[str]) -> None:
    if gpus:
        config.num_compute_capabilities = len(gpus)
        for index, gpu in enumerate(gpus):
            capability = getattr(trt.ComputeCapability, f"SM{gpu.replace('.', '')}")
            config.set_compute_capability(capability, index)
    config.clear_flag(trt.BuilderFlag.TF32)  # which multiplies float32 with 10 bits of precision
    if "hardware" in recipe.compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if "version" in recipe.compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)


def _strongly_typed(trt: Any) -> int:
    """Return the flags of a network that computes in the types that the graph has."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _content(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


def _refusal(recipe: EngineRecipe, what: str, log: Any) -> M2DError:
    version = engine_version(recipe.library)[1]
    return M2DError(f"{recipe.library} {version} {what}: {log.reason()}.")


def _log_of(trt: Any) -> Any:
    """Return a logger that keeps what the library says of errors, and prints nothing."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)

        def reason(self) -> str:
            """Return the first error that says what is wrong, as part of a sentence."""
            said = [text for text in self.errors if not _ECHO.search(text)] or self.errors
            return one_line(_PLACE.sub("", said[0]) if said else "it gives no reason").rstrip(".)")

    return Log()
