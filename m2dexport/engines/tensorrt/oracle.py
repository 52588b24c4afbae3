"""The numeric oracle: onnxruntime runs the same graph on the CPU, where there is no GPU.

On a CPU it has next to nothing in 16 bits: it computes in float32 by itself, and leaves out the
rounding in between, so that an overflow would not show. So a graph of 16 bits is run with every
value rounded to them and computed with in float32, which takes the onnx-ir package.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from m2dexport.engines import Device
from m2dexport.engines.onnxruntime.run import Session, session_options
from m2dexport.engines.tensorrt.recipe import EngineRecipe
from m2dexport.errors import M2DError, MissingExtra, one_line

if TYPE_CHECKING:
    import onnx_ir as ir

PROVIDER = "CPU"


def open_oracle(graph: bytes, recipe: EngineRecipe, device: Device) -> Session:
    """Return an onnxruntime session of a graph.

    Raises:
        M2DError: when onnxruntime refuses it.
        MissingExtra: when it computes in 16 bits and onnx-ir is not installed.
    """
    if recipe.computes != "float32":
        graph = _widened(graph)
    options = session_options(device, "portable")
    # Its 8-bit products saturate on processors without VNNI; a GPU's do not.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    try:
        return Session(graph, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no base class of their own
        raise M2DError(f"onnxruntime cannot load the graph: {one_line(error)}") from error


def _widened(graph: bytes) -> bytes:
    """Return a graph that computes in float32, and rounds, what another computes in 16 bits."""
    try:
        import onnx
        import onnx_ir as ir
    except ModuleNotFoundError as error:
        raise MissingExtra(
            "Running a graph of 16 bits without a GPU", str(error.name), "export"
        ) from error
    model = ir.from_proto(onnx.load_from_string(graph))
    for node in list(model.graph):
        if node.op_type not in ("Cast", "DequantizeLinear"):  # which round what they make
            _round_around(model.graph, node)
    content: bytes = ir.to_proto(model).SerializeToString()
    return content


def _round_around(graph: ir.Graph, node: ir.Node) -> None:
    """Give a node float32 in the place of 16 bits, and round what it makes of that."""
    import onnx_ir as ir

    narrow, wide = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16), ir.DataType.FLOAT
    for index, value in enumerate(node.inputs):
        if value is not None and value.dtype in narrow:
            cast = ir.node("Cast", [value], {"to": wide})
            graph.insert_before(node, cast)
            node.replace_input_with(index, cast.outputs[0])
    for output in node.outputs:
        if output.dtype not in narrow:
            continue
        users = list(output.uses())
        cast = ir.node("Cast", [output], {"to": output.dtype})
        cast.outputs[0].type, output.type = output.type, ir.TensorType(wide)
        graph.insert_after(node, cast)
        for use in users:
            use.node.replace_input_with(use.idx, cast.outputs[0])
