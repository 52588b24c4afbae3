"""OpenVINO: graphs made for it; what a build needs."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
import openvino as ov
from openvino import opset13 as ops

from m2dexport.engines import ENGINES, Compilation
from m2dexport.engines.onnxruntime.make import runner
from m2dexport.engines.openvino.run import GROUP_SIZE, reason_of
from m2dexport.errors import M2DError
from m2dexport.files import scratch_folder
from m2dexport.graph.vector import FLOATS, OUTPUT, STATES, serialize_graph
from m2dexport.precisions import Isa, WeightPrecision
from m2dexport.quantize.activations import CalibrationTokens
from m2dexport.quantize.half import store_half
from m2dexport.quantize.int8 import quantize_matmuls
from m2dexport.quantize.recipes import (
    HALF,
    Requirement,
    changeable,
    require_precision,
    with_tables,
)
from m2dexport.quantize.standard import narrow_matrices, standardize_int8

_OLDEST = "2026.4"

PRECISIONS: Mapping[WeightPrecision, Requirement] = {
    "fp32": Requirement(_OLDEST, floor=None),
    "fp16": Requirement(_OLDEST, 0.9999),
    "bf16": Requirement(_OLDEST, 0.9999),
    "int8": Requirement(_OLDEST, 0.98, calibrated=True, mixable=True, faithful=True),
    "int8-weight-only": Requirement(_OLDEST, 0.995, mixable=True),
    "int4-weight-only": Requirement(_OLDEST, 0.9, mixable=True),
}


def fuse(model: ir.Model) -> None:
    """Leave the graph as it is: OpenVINO fuses standard operators by itself."""


def quantize(
    model: ir.Model,
    weights: WeightPrecision,
    calibration: CalibrationTokens | None = None,
    isa: Isa = "portable",
) -> ir.Model:
    """Return a copy of a float32 graph of standard operators with its weights in another precision.

    int8 has the codes that ONNX Runtime's has; every other precision is stored narrow and computed
    with in float32. Arguments and errors are those of ``engines.onnxruntime.make.quantize``.
    """
    require_precision(weights, "openvino", PRECISIONS)
    model = changeable(model)
    if weights in HALF:
        store_half(model.graph, HALF[weights])
    elif weights == "int8":
        quantize_matmuls(model, calibration, runner, isa)
        standardize_int8(model)
    else:
        narrow_matrices(model.graph, weights)
    return with_tables(model, weights)


def files(model: ir.Model, compilation: Compilation = Compilation()) -> dict[str, bytes]:
    """Return the engine's files of a graph, by name: model.xml and model.bin."""
    return files_from_onnx(serialize_graph(model))


def files_from_onnx(graph: bytes) -> dict[str, bytes]:
    """Return the IR of an ONNX file: the content of model.xml and of model.bin.

    The same graph and OpenVINO version make the same bytes. OpenVINO would quantize activations of
    its own accord where weights are 8 bits wide, which makes a text's vector depend on its batch;
    the IR forbids it to every reader.

    Raises:
        M2DError: when OpenVINO does not know an operator of the graph.
    """
    try:
        model = ov.Core().read_model(graph)
    except Exception as error:  # openvino raises bare RuntimeErrors
        raise M2DError(f"OpenVINO cannot read the graph: {reason_of(error)}") from error
    return _saved(model)


def _saved(model: ov.Model) -> dict[str, bytes]:
    for number, node in enumerate(model.get_ordered_ops()):
        if node.get_friendly_name() == node.get_name():
            # A name of OpenVINO's own, numbered through the whole process.
            node.set_friendly_name(f"{node.get_type_name()}_{number}")
    model.set_rt_info(0, ["runtime_options", GROUP_SIZE])
    with scratch_folder() as scratch:
        paths = [scratch / name for name in ENGINES["openvino"].files]
        ov.save_model(model, paths[0], compress_to_fp16=False)
        return {path.name: path.read_bytes() for path in paths}


def with_states(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Return an IR that puts out float vectors as ``graph.vector.states_graph`` does.

    Args:
        files: the content of model.xml and of model.bin.
    """
    xml, weights = (files[name] for name in ENGINES["openvino"].files)
    core = ov.Core()
    model = core.read_model(xml, ov.Tensor(np.frombuffer(weights, dtype=np.uint8)))
    outputs = [value for node in model.get_ordered_ops() for value in node.outputs()]
    vector = next(
        (value for value in outputs if FLOATS in value.get_names()),
        model.outputs[0].get_node().input_value(0),
    )
    ids = next(value for value in model.inputs if "input_ids" in value.get_names())
    width = ops.constant(np.array([vector.get_partial_shape()[1].get_length()]))
    shape = ops.concat([ops.shape_of(ids.get_node()), width], 0)
    column = ops.unsqueeze(vector, ops.constant(np.array([1])))
    states = ops.broadcast(column, shape, broadcast_spec="BIDIRECTIONAL").output(0)
    for value, name in ((states, STATES), (vector, OUTPUT)):
        value.set_names({name})
    results = [ops.result(value) for value in (states, vector)]
    return _saved(ov.Model(results, model.get_parameters()))
