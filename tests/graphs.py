"""Small ONNX graphs written down as text, and what they compute."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import numpy_helper, parser, shape_inference

CONTRIB = "com.microsoft"


def parse(text: str, **constants: NDArray[np.generic]) -> ir.Model:
    """Return the model of ``name (inputs) => (outputs) { nodes }``, in opset 18.

    Constants too long to write down are given by name.
    """
    header = f'<ir_version: 8, opset_import: ["" : 18, "{CONTRIB}" : 1]>'
    proto = parser.parse_model(header + text)
    proto.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in constants.items())
    onnx.checker.check_model(proto)
    return ir.from_proto(shape_inference.infer_shapes(proto))


def run(model: ir.Model, **inputs: NDArray[np.generic]) -> NDArray[np.float32]:
    """Return the first output; 8-bit products are exact on every processor."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = ort.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, inputs)[0]  # type: ignore[no-any-return]


def operators(model: ir.Model) -> Counter[str]:
    """Return how many nodes of each type there are."""
    return Counter(node.op_type for node in model.graph)
