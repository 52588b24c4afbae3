"""From the files of a graph to what runs it, for TensorRT and TensorRT-RTX alike."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m2dexport.engines import ENGINES, Device, engine_version, file_view
from m2dexport.engines.onnxruntime import run as onnxruntime
from m2dexport.engines.tensorrt.cuda import Gpu, gpu_count, require_gpu
from m2dexport.engines.tensorrt.library import (
    build_engine,
    import_library,
    is_portable,
    known_gpus,
    read_engine,
)
from m2dexport.engines.tensorrt.oracle import PROVIDER, open_oracle
from m2dexport.engines.tensorrt.recipe import EngineRecipe, recipe_from_toml
from m2dexport.engines.tensorrt.session import Session
from m2dexport.engines.tensorrt.store import TIMING, Key, keep, key_of, stored
from m2dexport.errors import M2DError, MissingDevice, UsageError
from m2dexport.precisions import Isa

GRAPH, RECIPE, ENGINE = "model.onnx", "engine.toml", "model.engine"
_PROVIDERS = re.compile(r"CUDA(?::([0-9]{1,3}))?")


def providers(engine: str) -> tuple[str, ...]:
    """Return the GPUs of this machine that an engine runs on, as a device names them, and the CPU.

    The CPU is for the oracle.
    """
    gpus = [f"CUDA:{index}" for index in range(gpu_count())]
    return (*(gpu for gpu in gpus if _is_known(gpu, engine)), PROVIDER)


def require_provider(engine: str, device: Device) -> str:
    """Return the provider of a device: "CUDA", "CUDA:1", or "CPU" for the oracle.

    Raises:
        UsageError: when there is no such provider, or this machine has no such GPU, or one that the
            library makes no engines for.
        MissingExtra: when cuda-bindings is not installed.
    """
    provider = device.provider or ENGINES[engine].provider
    if provider != PROVIDER:
        _require_known_gpu(provider, engine)
    elif device.cache is not None:
        raise UsageError("on the CPU nothing is compiled that a cache could keep; leave it out.")
    return provider


def load_session(
    engine: str, files: Mapping[str, Path | bytes], device: Device, isa: Isa
) -> Session | onnxruntime.Session:
    """Return what runs a graph.

    An engine is built for the GPU at hand, unless the files or the device's cache have one.

    Args:
        engine: "tensorrt" or "tensorrt-rtx".
        files: "model.onnx" and "engine.toml", and "model.engine" where one was built already.
        device: its provider is a GPU ("CUDA") or the CPU, on which onnxruntime runs the graph; its
            cache is where engines are kept.
        isa: plays no part.

    Raises:
        UsageError: when there is no such provider.
        M2DError: when the graph, the recipe or the engine is refused.
    """
    provider = require_provider(engine, device)
    content = {name: bytes(file_view(file)) for name, file in files.items()}
    recipe = recipe_from_toml(content[RECIPE], RECIPE)
    if recipe.library != engine:
        raise M2DError(f"{RECIPE} is for {recipe.library}, not for {engine}; build it again.")
    _require_own_engine(recipe, content)
    if provider == PROVIDER:
        return open_oracle(content[GRAPH], recipe, device)
    gpu = _require_known_gpu(provider, engine)
    version = engine_version(engine)[1]
    key = key_of(content[GRAPH], content[RECIPE], (engine, version), gpu)
    built = _built_for(recipe, content, version, gpu)
    if built is None:
        built = _kept_or_built(recipe, content[GRAPH], key, gpu, device.cache)
    jit = stored(device.cache, key, "jit") if device.cache else None
    session = Session(read_engine(built, recipe), recipe, gpu, jit)
    _warm_up(session)
    compiled = session.compiled() if device.cache else None
    if device.cache and compiled and compiled != jit:
        keep(device.cache, key, "jit", compiled)
    return session


def run_session(
    session: Session | onnxruntime.Session,
    input_ids: NDArray[np.int64],
    attention_mask: NDArray[np.int64],
) -> list[NDArray[Any]]:
    """Return the graph's outputs for int64 (batch, sequence) inputs, in the graph's order.

    Raises:
        M2DError: when the texts are longer than the engine takes, or the GPU fails.
    """
    if isinstance(session, Session):
        return session.run(input_ids, attention_mask)
    return onnxruntime.run(session, input_ids, attention_mask)


def describe_session(session: Session | onnxruntime.Session) -> dict[str, str]:
    """Return what a session runs on: the engine with its version, and the GPU or CPU."""
    if isinstance(session, Session):
        library, gpu = session.recipe.library, session.gpu
        return {
            "engine": f"{library} {engine_version(library)[1]}",
            "provider": f"{gpu.name} ({gpu.capability})",
        }
    return {**onnxruntime.describe(session), "provider": PROVIDER}


def _is_known(provider: str, engine: str) -> bool:
    try:
        _require_known_gpu(provider, engine)
    except MissingDevice:
        return False
    return True


def _require_known_gpu(provider: str, engine: str) -> Gpu:
    gpu = require_gpu(_gpu_number(provider, engine), engine)
    if is_portable(engine):
        known = known_gpus(import_library(engine))
        if gpu.capability not in known:
            raise MissingDevice(
                f"{engine} {engine_version(engine)[1]} makes no engines for {gpu.name} (compute "
                f"capability {gpu.capability}), only for {', '.join(known)}; use another engine."
            )
    return gpu


def _gpu_number(provider: str, engine: str) -> int:
    match = _PROVIDERS.fullmatch(provider)
    if match is None:
        raise UsageError(
            f"{engine} runs on CUDA, on CUDA:1 where there are several GPUs, or on {PROVIDER} by "
            f"onnxruntime, not on {provider}."
        )
    return int(match[1] or 0)


def _require_own_engine(recipe: EngineRecipe, content: Mapping[str, bytes]) -> None:
    """Refuse an engine file that is not the one that the recipe describes."""
    built, engine = recipe.built, content.get(ENGINE)
    if (built is None) != (engine is None):
        raise M2DError(f"{RECIPE} and {ENGINE} do not go together; build it again.")
    if built is None or engine is None:
        return
    if hashlib.sha256(engine).hexdigest() != built.engine_sha256:
        raise M2DError(f"{ENGINE} is damaged, or not the one that {RECIPE} describes.")
    if hashlib.sha256(content[GRAPH]).hexdigest() != built.graph_sha256:
        raise M2DError(f"{ENGINE} was built from another graph than {GRAPH}; build it again.")


def _built_for(
    recipe: EngineRecipe, content: Mapping[str, bytes], version: str, gpu: Gpu
) -> bytes | None:
    """Return the engine that came with the graph, if this library and GPU run it."""
    if recipe.built is None:
        return None
    wrong = None
    if recipe.built.version != version:
        wrong = f"was made by {recipe.library} {recipe.built.version}, and {version} is installed"
    elif gpu.capability not in recipe.gpus:
        wrong = f"was made for {', '.join(recipe.gpus)}, and {gpu.name} has {gpu.capability}"
    if wrong is None:
        return content[ENGINE]
    warnings.warn(f"{ENGINE} {wrong}; another engine is built from {GRAPH}.", stacklevel=2)
    return None


def _kept_or_built(
    recipe: EngineRecipe, graph: bytes, key: Key, gpu: Gpu, cache: Path | None
) -> bytes:
    kept = stored(cache, key, "engine") if cache else None
    if kept is not None:
        return kept
    portable = is_portable(recipe.library)
    where = f", and kept in {cache}" if cache else ""
    warnings.warn(f"an engine is built for {gpu.name}{where}; this takes seconds.", stacklevel=2)
    timing = cache / TIMING if cache and not portable else None
    engine = build_engine(graph, recipe, [gpu.capability] if portable else [], timing)
    if cache:
        keep(cache, key, "engine", engine)
    return engine


def _warm_up(session: Session) -> None:
    """Run the shapes that the engine is made for, so that no request waits for a compiler."""
    for profile in session.recipe.profiles:
        ids = np.zeros(profile.best, dtype=np.int64)
        for output in session.run(ids, np.ones_like(ids)):
            if output.dtype.kind == "f" and not np.isfinite(output).all():
                raise M2DError(
                    f"{session.recipe.library} computes NaN or infinite values on "
                    f"{session.gpu.name}; build with --weights bf16 or fp32."
                )
