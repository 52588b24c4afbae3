"""ONNX Runtime: load a graph and run it; what a device needs."""

from __future__ import annotations

import ctypes
import io
from collections.abc import Mapping
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from m2dexport.cores import threads_for
from m2dexport.engines import ENGINES, SPIN_US, Device
from m2dexport.errors import M2DError, MissingDevice, UnsafeContent, UsageError, one_line
from m2dexport.precisions import Isa

#: What runs a graph.
Session = ort.InferenceSession

_ENGINE = ENGINES["onnx"]
_ERRORS_ONLY = 3
_CUDA = "CUDAExecutionProvider"
_ON_CUDA = (_CUDA, "TensorrtExecutionProvider")
#: The release whose CUDA provider can be told to leave TF32; before, it always uses it.
_KNOWS_TF32 = (1, 18)
_PROVIDERS = Path(ort.__file__).parent / "capi"  # the libraries of the execution providers
#: The release that knows session.intra_op.spin_duration_us; before, a thread that spins does so
#: for as long as its processor takes for 2**20 pauses, so there it sleeps.
_BOUNDED_SPIN = (1, 26)
#: An ONNX file of one operator, y = MatMulInteger(a, b), since a device lacks the onnx package.
_PRODUCT = bytes.fromhex(
    "08083a440a180a01610a0162120179220d4d61744d756c496e7465676572120770726f647563745a090a"
    "016112040a0208025a090a016212040a02080362090a017912040a02080642040a001012"
)


def devices() -> tuple[str, ...]:
    """Return the execution providers of this build of onnxruntime."""
    return tuple(ort.get_available_providers())


def require_device(device: Device) -> str:
    """Return the execution provider of a device.

    Raises:
        UsageError: when it is not in this build of onnxruntime, or the device has a cache.
    """
    provider = device.provider or _ENGINE.provider
    if provider not in devices():
        kind = MissingDevice if provider in ort.get_all_providers() else UsageError
        raise kind(f"{provider} is not in this onnxruntime; it has {', '.join(devices())}.")
    if device.cache is not None:
        raise UsageError("onnxruntime compiles nothing that a cache could keep; leave it out.")
    return provider


def load(files: Mapping[str, Path | bytes], device: Device, isa: Isa) -> ort.InferenceSession:
    """Load an ONNX graph.

    Args:
        files: "model.onnx" -> a path or the content.
        device: what it must run on; there is no fallback to another provider, here or in a run.
        isa: what the graph's 8-bit products need (``quantize.saturation``): with "vnni",
            processors without VNNI use slower kernels, which are exact.

    Raises:
        UsageError: when the provider is not in this build of onnxruntime, or the device has a
            cache, fewer than one thread or less than no time to spin.
        UnsafeContent: when onnxruntime refuses the graph.
        M2DError: when the provider does not load.
    """
    provider = require_device(device)
    (model,) = (files[name] for name in _ENGINE.files)
    _find_cuda(provider)
    options = session_options(device, isa)
    try:
        session = ort.InferenceSession(
            model if isinstance(model, bytes) else str(model),
            options,
            providers=[provider],
            provider_options=[_provider_options(provider)],
            enable_fallback=0,
        )
    except Exception as error:  # onnxruntime's exceptions share no base class of their own
        if missing := _loader_text(provider):
            raise M2DError(f"{provider} did not load: {missing}.") from error
        raise UnsafeContent(f"onnxruntime cannot load the graph: {one_line(error)}") from error
    if session.get_providers()[0] != provider:
        reason = _loader_text(provider) or "onnxruntime does not say why; check its driver"
        raise M2DError(f"{provider} did not load: {reason}.")
    session.disable_fallback()  # to the CPU, should a run fail; releases before 1.32 need this
    session._model_bytes = None  # which only that would need
    return session


def _provider_options(provider: str) -> dict[str, str]:
    """Return what a provider is told; CUDA's would multiply float32 with 10 bits of precision."""
    if provider == _CUDA and _version() >= _KNOWS_TF32:
        return {"use_tf32": "0"}
    return {}


def _find_cuda(provider: str) -> None:
    """Load CUDA's libraries from where pip installs them, which a provider's library does not."""
    if provider in _ON_CUDA and hasattr(ort, "preload_dlls"):  # since 1.21
        with redirect_stdout(
            io.StringIO()
        ):  # it prints what it does not find; loading says so, too
            ort.preload_dlls()


def _loader_text(provider: str) -> str | None:
    """Return why the system cannot load a provider's library, which onnxruntime keeps to itself.

    Returns:
        None when it can, or the provider has no library of its own.
    """
    name = provider.removesuffix("ExecutionProvider").lower()
    for library in sorted(_PROVIDERS.glob(f"*onnxruntime_providers_{name}.*")):
        try:
            ctypes.CDLL(str(library))
        except OSError as error:
            return one_line(error).rstrip(".")
    return None


def session_options(device: Device, isa: Isa) -> ort.SessionOptions:
    """Return the options of a session on a device; arguments and errors are those of ``load``."""
    _disable_telemetry()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads_for(device.threads)
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = _ERRORS_ONLY
    # A pattern is kept for every shape that comes by: no faster, and memory grows with them.
    options.enable_mem_pattern = False
    spin_us = _spin_us(device)
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spin_us > 0)))
    if spin_us > 0:
        options.add_session_config_entry("session.intra_op.spin_duration_us", str(spin_us))
    if isa != "portable" and _saturates():
        options.add_session_config_entry("session.x64quantprecision", "1")
    return options


def run(
    session: ort.InferenceSession, input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64]
) -> list[NDArray[Any]]:
    """Return the graph's outputs for int64 (batch, sequence) inputs, in the graph's order.

    Raises:
        M2DError: when onnxruntime fails while running.
    """
    try:
        outputs: list[NDArray[Any]] = session.run(
            None, {"input_ids": input_ids, "attention_mask": attention_mask}
        )
    except Exception as error:
        raise M2DError(f"onnxruntime failed while running: {one_line(error)}") from error
    return outputs


def describe(session: ort.InferenceSession) -> dict[str, str]:
    """Return what a session runs on: the engine with its version, and the execution provider."""
    return {"engine": f"onnxruntime {ort.__version__}", "provider": session.get_providers()[0]}


def _spin_us(device: Device) -> int:
    """Return how long idle threads spin, in microseconds.

    Raises:
        UsageError: when that is less than 0.
    """
    wanted = SPIN_US if device.spin_us is None else device.spin_us
    if wanted < 0:
        raise UsageError(f"threads cannot spin for {wanted} microseconds; ask for 0 or more.")
    return wanted if _version() >= _BOUNDED_SPIN else 0


def _version() -> tuple[int, ...]:
    return tuple(int(part) for part in ort.__version__.split(".")[:2])


@cache
def _saturates() -> bool:
    """Measure whether 8-bit products saturate on this processor (onnxruntime issue 14642).

    The exact kernels take twice the time even where the fast ones are exact, too.
    """
    session = ort.InferenceSession(_PRODUCT, providers=[_ENGINE.provider])
    codes = np.full((4, 64), 255, dtype=np.uint8), np.full((64, 16), 127, dtype=np.int8)
    (product,) = session.run(None, dict(zip("ab", codes, strict=True)))
    return bool((product != 255 * 127 * 64).any())


def _disable_telemetry() -> None:
    """Keep onnxruntime's builds that report usage events (the Windows wheels) from doing so."""
    disable = getattr(ort, "disable_telemetry_events", None)
    if disable is not None:
        disable()
