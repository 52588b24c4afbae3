"""ONNX Runtime: load a graph and run it."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from m2dexport.engines import threads_for
from m2dexport.errors import M2DError, UsageError
from m2dexport.precisions import Isa

CPU = "CPUExecutionProvider"
_ERRORS_ONLY = 3
#: An ONNX file of one operator, y = MatMulInteger(a, b), since a device lacks the onnx package.
_PRODUCT = bytes.fromhex(
    "08083a440a180a01610a0162120179220d4d61744d756c496e7465676572120770726f647563745a090a"
    "016112040a0208025a090a016212040a02080362090a017912040a02080642040a001012"
)


def files_from_onnx(graph: bytes) -> tuple[bytes]:
    """Return the ONNX graph, which is all that this engine needs."""
    return (graph,)


def load(
    model: Path | bytes, *, threads: int | None = None, provider: str = CPU, isa: Isa = "vnni"
) -> ort.InferenceSession:
    """Load an ONNX graph.

    Args:
        model: a file or its bytes.
        threads: intra-op threads; None takes all that this process may use.
        provider: the execution provider that must run it; there is no silent fallback.
        isa: what the graph's 8-bit products need (``weights.saturation``): with "vnni",
            processors without VNNI use slower kernels, which are exact.

    Raises:
        UsageError: when the provider is not in this build of onnxruntime, or threads < 1.
        M2DError: when onnxruntime refuses the graph or the provider does not load.
    """
    if provider not in ort.get_available_providers():
        raise UsageError(
            f"{provider} is not in this onnxruntime; it has "
            f"{', '.join(ort.get_available_providers())}."
        )
    _disable_telemetry()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads_for(threads)
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = _ERRORS_ONLY
    # Spinning threads burn the cores that other processes on the device need.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if isa != "portable" and _saturates():
        options.add_session_config_entry("session.x64quantprecision", "1")
    try:
        session = ort.InferenceSession(
            model if isinstance(model, bytes) else str(model), options, providers=[provider]
        )
    except Exception as error:  # onnxruntime's exceptions share no base class of their own
        raise M2DError(f"onnxruntime cannot load the graph: {_first_line(error)}") from error
    if session.get_providers()[0] != provider:
        raise M2DError(f"{provider} did not load; onnxruntime fell back to the CPU.")
    return session


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
        raise M2DError(f"onnxruntime failed while running: {_first_line(error)}") from error
    return outputs


@cache
def _saturates() -> bool:
    """Measure whether 8-bit products saturate on this processor (onnxruntime issue 14642).

    The exact kernels take twice the time even where the fast ones are exact, too.
    """
    session = ort.InferenceSession(_PRODUCT, providers=[CPU])
    codes = np.full((4, 64), 255, dtype=np.uint8), np.full((64, 16), 127, dtype=np.int8)
    (product,) = session.run(None, dict(zip("ab", codes, strict=True)))
    return bool((product != 255 * 127 * 64).any())


def _disable_telemetry() -> None:
    """Keep onnxruntime's builds that report usage events (the Windows wheels) from doing so."""
    disable = getattr(ort, "disable_telemetry_events", None)
    if disable is not None:
        disable()


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
