"""OpenVINO: make an IR of a graph, load it and run it."""

from __future__ import annotations

import re
import tempfile
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino.passes import ConstantFolding, Manager

from m2dexport.engines import threads_for
from m2dexport.errors import M2DError, UsageError
from m2dexport.precisions import Isa

CPU = "CPU"
_NO_REASON = re.compile(r" (from|at) src/|^FrontEnd API failed")
_GROUP = "DYNAMIC_QUANTIZATION_GROUP_SIZE"


@dataclass(frozen=True)
class Session:
    """A compiled model and, for each thread that runs it, a request of its own."""

    compiled: Any  # openvino.CompiledModel
    requests: threading.local = field(default_factory=threading.local)


def files_from_onnx(graph: bytes) -> tuple[bytes, bytes]:
    """Return the IR of an ONNX graph: the content of model.xml and of model.bin.

    The same graph and OpenVINO version make the same bytes. OpenVINO would quantize activations of
    its own accord where weights are 8 bits wide, which makes a text's vector depend on its batch;
    the IR tells every reader not to.

    Raises:
        M2DError: when OpenVINO does not know an operator of the graph.
    """
    try:
        model = ov.Core().read_model(graph)
    except Exception as error:  # openvino raises bare RuntimeErrors
        raise M2DError(f"OpenVINO cannot read the graph: {_reason(error)}") from error
    for number, node in enumerate(model.get_ordered_ops()):
        if node.get_friendly_name() == node.get_name():
            # A name of OpenVINO's own, numbered through the whole process.
            node.set_friendly_name(f"{node.get_type_name()}_{number}")
    model.set_rt_info(0, ["runtime_options", _GROUP])
    with tempfile.TemporaryDirectory(prefix="m2dexport-") as scratch:
        xml = Path(scratch) / "model.xml"
        ov.save_model(model, xml, compress_to_fp16=False)
        return xml.read_bytes(), xml.with_suffix(".bin").read_bytes()


def load(
    model: Path | bytes,
    weights: Path | bytes | None = None,
    *,
    threads: int | None = None,
    provider: str = CPU,
    isa: Isa = "portable",
) -> Session:
    """Load an IR.

    Args:
        model: model.xml, a file or its bytes.
        weights: model.bin likewise; None: the file beside model.xml.
        threads: inference threads; None takes all that this process may use.
        provider: the OpenVINO device that must run it.
        isa: "portable": there are no other IRs, since OpenVINO lacks exact kernels for them.

    Raises:
        UsageError: when there is no such device, or threads < 1, or for another isa.
        M2DError: when OpenVINO refuses the model or would compute in less than float32.
    """
    # OpenVINO computes in bfloat16 unasked where the CPU can.
    options = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": threads_for(threads),
        "PERFORMANCE_HINT": "LATENCY",
        _GROUP: 0,
    }
    if isa != "portable":
        raise UsageError(f"OpenVINO runs portable graphs alone, not isa={isa}; build it anew.")
    core = ov.Core()
    if provider not in core.available_devices:
        raise UsageError(
            f"{provider} is no OpenVINO device of this machine; it has "
            f"{', '.join(core.available_devices)}."
        )
    try:
        if isinstance(weights, bytes):
            loaded = core.read_model(model, ov.Tensor(np.frombuffer(weights, dtype=np.uint8)))
        else:
            loaded = core.read_model(model, weights or "")
        _widen_weights(loaded)
        compiled = core.compile_model(loaded, provider, options)
    except Exception as error:
        raise M2DError(f"OpenVINO cannot load the model: {_reason(error)}") from error
    precision = compiled.get_property("INFERENCE_PRECISION_HINT")
    if precision != ov.Type.f32:
        raise M2DError(f"{provider} computes in {precision.to_string()} where f32 was asked for.")
    return Session(compiled)


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
        raise M2DError(f"OpenVINO failed while running: {_reason(error)}") from error
    return list(outputs.to_tuple())


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


def _reason(error: Exception) -> str:
    """Return what OpenVINO says, without the places in its sources that it says it from."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = [line for line in lines if not _NO_REASON.search(line)]
    return " ".join((said or lines)[:3])
