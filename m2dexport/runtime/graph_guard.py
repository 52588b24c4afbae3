"""What a graph may hold: examined before any engine sees it, since bundles come from elsewhere.

An engine runs whatever a graph says: it reads other files as "external data", loops 2^62 times,
or fills memory with one constant of a huge shape. So a graph is refused that

* holds anything but nodes, constants and shapes (``onnx_content``, ``openvino_content``);
* uses an operator that is not listed here. The list has what builds write, and the standard's
  operators that compute one tensor from others without a loop, a file, a state or a random number,
  since the code of a custom checkpoint may export them. A list of what is forbidden would have to
  be extended with every release of an engine;
* makes a tensor of a size that constants set, beyond 2^26 values (``graph_sizes``).

This does not bound what a graph computes from its inputs: one may still be slow or large for long
texts. Get bundles from where you trust.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from m2dexport.engines import ENGINES, file_view
from m2dexport.errors import UnsafeContent, one_line
from m2dexport.runtime.graph_content import Constant, GraphContent, Node, UnsafeGraph
from m2dexport.runtime.graph_sizes import require_sizes
from m2dexport.runtime.onnx_content import onnx_content
from m2dexport.runtime.openvino_content import openvino_content
from m2dexport.strict import shown

_ONNX_NAMES = """
Abs Add And ArgMax ArgMin Attention BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Cast
CastLike Ceil Clip Concat ConstantOfShape Cos CumSum DequantizeLinear Div DynamicQuantizeLinear
Einsum Elu Equal Erf Exp Expand EyeLike Flatten Floor Gather GatherElements GatherND Gelu Gemm
Greater GreaterOrEqual HardSigmoid HardSwish Identity InstanceNormalization IsInf IsNaN
LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax MatMul MatMulInteger Max Mean Min
Mish Mod Mul Neg Not OneHot Or PRelu Pad Pow QuantizeLinear RMSNormalization Range Reciprocal
ReduceL1 ReduceL2 ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum
ReduceSumSquare Relu Reshape RotaryEmbedding Round ScatterElements ScatterND Selu Shape Sigmoid
Sign Sin Size Slice Softmax Softplus Softsign Split Sqrt Squeeze Sub Sum Swish Tan Tanh Tile
TopK Transpose Trilu Unsqueeze Where Xor
com.microsoft.Gelu com.microsoft.MatMulIntegerToFloat com.microsoft.MatMulNBits
com.microsoft.MultiHeadAttention
"""
_OPENVINO_NAMES = """
Abs Add Broadcast Ceiling Clamp Concat Convert ConvertLike Cos CumSum Divide Einsum Elu Equal
Erf Exp FakeQuantize Floor FloorMod Gather GatherElements GatherND Gelu Greater GreaterEqual
HSwish HardSigmoid IsInf IsNaN Less LessEqual Log LogSoftmax LogicalAnd LogicalNot LogicalOr
LogicalXor MVN MatMul Maximum Minimum Mish Mod Multiply Negative NormalizeL2 NotEqual OneHot Pad
Power PReLU Range ReLU ReduceL1 ReduceL2 ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum
Reshape Round ScaledDotProductAttention ScatterElementsUpdate ScatterNDUpdate ScatterUpdate
Select Selu ShapeOf Sigmoid Sign Sin Slice SoftMax SoftPlus Split Sqrt Squeeze StridedSlice
Subtract Swish Tan Tanh Tile TopK Transpose Unsqueeze VariadicSplit
"""
_ONNX, _OPENVINO = frozenset(_ONNX_NAMES.split()), frozenset(_OPENVINO_NAMES.split())
_LEAST_INPUTS = {"Gather": 2, "MatMul": 2, "Range": 3, "Reshape": 2}
_CONVERTS = frozenset({"Cast", "Convert", "DequantizeLinear"})
_SAME = {"Cast", "Convert", "Identity", "Reshape", "Squeeze", "Unsqueeze"}
_IDS = "input_ids"


def examine_graph(engine: str, files: Sequence[Path | bytes | bytearray]) -> GraphContent:
    """Return what a graph holds, when it holds nothing that must not be run.

    Args:
        engine: a key of ``ENGINES``.
        files: the files that it names, or their content, in that order; of ONNX, the first alone
            is looked at.

    Raises:
        UnsafeContent: naming what the graph holds.
    """
    stored = ENGINES[engine]
    name = stored.files[0]
    if stored.format == "table":  # which is data alone; whoever loads it checks its form
        return _table_content(file_view(files[0]), name)
    try:
        views = [file_view(file) for file in files]
        if stored.format == "ir":
            content = openvino_content(*views)
            _require_operators(content, _OPENVINO)
        else:
            content = onnx_content(views[0])
            _require_operators(content, _ONNX)
        require_sizes(content, stored.format)
    except UnsafeGraph as error:
        raise UnsafeContent(f"{name} cannot be read or run: {one_line(error)}.") from error
    return content


def table_rows(content: GraphContent) -> int | None:
    """Return the number of rows of the token table, None when it is not found."""
    ids, rows = {_IDS}, []
    tables = {name: table.shape[0] for name, table in content.constants.items() if table.shape}
    for node in content.nodes:
        if node.operator in _SAME and node.inputs[0] in ids:
            ids.update(node.outputs)
        elif node.operator in _CONVERTS and node.inputs[0] in tables:
            tables.update(dict.fromkeys(node.outputs, tables[node.inputs[0]]))
        elif node.operator == "Gather" and node.inputs[1] in ids and node.inputs[0] in tables:
            rows.append(tables[node.inputs[0]])
    return min(rows, default=None)


def ranges_of(content: GraphContent) -> dict[str, NDArray[Any]]:
    """Return a copy of the ranges that ``graph.vector`` put into a graph, by their names there."""
    found = {}
    for name in ("range_low", "range_step"):
        values = content.constants[name].values() if name in content.constants else None
        if values is not None:
            found[name] = values.copy()
    return found


def _table_content(view: memoryview, name: str) -> GraphContent:
    """Return a static model's table in the form of a graph's content."""
    from m2dexport.engines.numpy.table import read_table

    arrays = read_table(view, name)
    constants = {
        key: Constant(array.shape, array.dtype, array.data) for key, array in arrays.items()
    }
    return GraphContent((Node("Gather", (next(iter(arrays)), _IDS), ("rows",)),), constants)


def _require_operators(content: GraphContent, known: frozenset[str]) -> None:
    for node in content.nodes:
        if node.operator not in known:
            raise UnsafeGraph(f"it uses the operator {shown(node.operator)}, which is not allowed")
        if len(node.inputs) < _LEAST_INPUTS.get(node.operator, 1):
            raise UnsafeGraph(f"its operator {node.operator} lacks an input")
