"""OpenVINO: load an IR and run it; what a device needs."""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino.passes import ConstantFolding, Manager

from m2dexport.cores import threads_for, workers_for
from m2dexport.engines import ENGINES, Device
from m2dexport.errors import M2DError, UnsafeContent, UsageError, one_line
from m2dexport.precisions import Isa

#: Values that share one scale where OpenVINO quantizes activations of its own accord; 0: never.
GROUP_SIZE = "DYNAMIC_QUANTIZATION_GROUP_SIZE"
_ENGINE = ENGINES["openvino"]
_NO_REASON = re.compile(r" (from|at) src/|^FrontEnd API failed")


@dataclass(frozen=True)
class Session:
    """A compiled model and, for each thread that runs it, a request of its own."""

    compiled: Any  # openvino.CompiledModel
    requests: threading.local = field(default_factory=threading.local)


def devices() -> tuple[str, ...]:
    """Return the OpenVINO devices of this machine."""
    return tuple(ov.Core().available_devices)


def require_device(device: Device) -> str:
    """Return the OpenVINO device of a device.

    Raises:
        UsageError: when this machine does not have it.
    """
    provider = device.provider or _ENGINE.provider
    known = devices()
    if provider not in known:
        raise UsageError(
            f"{provider} is not an OpenVINO device of this machine; it has {', '.join(known)}."
        )
    return provider


def load(files: Mapping[str, Path | bytes], device: Device, isa: Isa) -> Session:
    """Load an IR.

    Args:
        files: "model.xml" and "model.bin" -> a path or the content.
        device: what it must run on; its provider is an OpenVINO device such as "CPU".
        isa: "portable": there are no other IRs, since OpenVINO lacks exact kernels for them.

    Raises:
        UsageError: when there is no such device, or for fewer than one thread or worker, or
            another isa.
        UnsafeContent: when OpenVINO refuses the model.
        M2DError: when it would compute in less than float32.
    """
    if isa != "portable":
        raise UsageError(f"OpenVINO runs portable graphs only, not isa={isa}; build it again.")
    core, provider = ov.Core(), require_device(device)
    model, weights = (files[name] for name in _ENGINE.files)
    options = _options(device)
    try:
        if isinstance(weights, bytes):
            loaded = core.read_model(model, ov.Tensor(np.frombuffer(weights, dtype=np.uint8)))
        else:
            loaded = core.read_model(model, weights)
        _widen_weights(loaded)
        compiled = core.compile_model(loaded, provider, options)
    except Exception as error:
        raise UnsafeContent(f"OpenVINO cannot load the model: {reason_of(error)}") from error
    precision = compiled.get_property("INFERENCE_PRECISION_HINT")
    if precision != ov.Type.f32:
        raise M2DError(f"{provider} computes in {precision.to_string()} where f32 was asked for.")
    return Session(compiled)


def _options(device: Device) -> dict[str, Any]:
    threads = threads_for(device.threads)
    workers = workers_for(device.workers, device.threads)
    # OpenVINO computes in bfloat16, and quantizes activations in groups, unasked where the CPU can.
    options = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": threads * workers,  # of all streams
        "PERFORMANCE_HINT": "LATENCY",
        GROUP_SIZE: 0,
    }
    if workers > 1:
        options |= {"PERFORMANCE_HINT": "THROUGHPUT", "NUM_STREAMS": workers}
    return options if device.cache is None else {**options, "CACHE_DIR": str(device.cache)}


def run(
    session: Session, input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64]
) -> list[NDArray[Any]]:
    """Return the model's outputs for int64 (batch, sequence) inputs, in the model's order.

    Raises:
        M2DError: when OpenVINO fails while running.
    """
    request = getattr(session.requests, "of_thread", None)
    if request is None:
        request = session.requests.of_thread = session.compiled.create_infer_request()
    try:
        outputs = request.infer({"input_ids": input_ids, "attention_mask": attention_mask})
    except Exception as error:
        raise M2DError(f"OpenVINO failed while running: {reason_of(error)}") from error
    return list(outputs.to_tuple())


def describe(session: Session) -> dict[str, str]:
    """Return what a session runs on."""
    devices = ",".join(session.compiled.get_property("EXECUTION_DEVICES"))
    return {"engine": f"openvino {ov.__version__.partition('-')[0]}", "provider": devices}


def _widen_weights(model: Any) -> None:
    """Turn the narrow weights of float32 products into float32, once and not at every run.

    Embedding tables stay narrow: of those, a run widens only the rows that it looks up. So do the
    weights of products whose other factor is dequantized, too: those are computed in 8 bits.
    """
    fixed: set[str] = set()  # names of the nodes that no input reaches
    narrow = []
    for node in model.get_ordered_ops():
        sources = [value.get_node().get_name() for value in node.input_values()]
        if node.get_type_name() != "Parameter" and fixed.issuperset(sources):
            fixed.add(node.get_name())
        elif node.get_type_name() == "MatMul" and not _is_dequantized(node.input_value(0)):
            narrow += [value for value in node.input_values()[1:] if sources[1] in fixed]
    manager = Manager()
    manager.register_pass(ConstantFolding())
    manager.run_passes(ov.Model(narrow, []))


def _is_dequantized(value: Any) -> bool:
    """Say whether a value is ``(codes - zero) * scale`` of 8-bit codes."""
    for step in ("Multiply", "Subtract", "Convert"):
        if value.get_node().get_type_name() == step:
            value = value.get_node().input_value(0)
    return bool(value.get_element_type() == ov.Type.u8)


def reason_of(error: Exception) -> str:
    """Return what OpenVINO says, without the places in its sources that it says it from."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = [line for line in lines if not _NO_REASON.search(line)]
    return one_line(" ".join(said or lines))
