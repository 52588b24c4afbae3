"""What a graph may hold: examined before any engine sees it, since bundles come from elsewhere.

An engine runs whatever a graph says: it reads other files as "external data", loops 2^62 times,
or fills memory with one constant of a huge shape. So a graph is refused that

* holds anything but nodes, constants and shapes (``onnx_content``, ``openvino_content``);
* uses an operator that is not listed here. The list has what builds write, and the standard's
  operators that compute one tensor from others without a loop, a file, a state or a random number,
  since the code of a custom checkpoint may export them. A list of what is forbidden would have to
  be extended with every release of an engine;
* makes a tensor of a size that constants set, beyond 2^26 values.

This does not bound what a graph computes from its inputs: one may still be slow or large for long
texts. Get bundles from where you trust.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from m2dexport.engines import ENGINES
from m2dexport.errors import M2DError, one_line
from m2dexport.runtime.graph_content import Constant, GraphContent, UnsafeGraph
from m2dexport.runtime.onnx_content import onnx_content
from m2dexport.runtime.openvino_content import openvino_content
from m2dexport.strict import shown

_MOST_VALUES = 1 << 26  # of a tensor whose size constants set
_MOST_SIZES = 16  # values of a constant that may be a shape

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
#: Operator -> which of its inputs set the size of what it makes.
_SIZING = {"Tile": (1,), "OneHot": (1,), "Range": (0, 1, 2)}
_ONNX_SIZING = {**_SIZING, "ConstantOfShape": (0,), "Expand": (1,), "Pad": (1,)}
_OPENVINO_SIZING = {**_SIZING, "Broadcast": (1,), "Pad": (1, 2)}
_LEAST_INPUTS = {"Gather": 2, "Range": 3}
_CONVERTS = frozenset({"Cast", "Convert"})
_SAME = _CONVERTS | {"Identity", "Reshape", "Squeeze", "Unsqueeze"}
_IDS = "input_ids"


def examine_graph(engine: str, files: Sequence[Path | bytes]) -> GraphContent:
    """Return what a graph holds, when it holds nothing that must not be run.

    Args:
        engine: a key of ``ENGINES``.
        files: the files that it names, or their content, in that order.

    Raises:
        M2DError: naming what the graph holds.
    """
    name = ENGINES[engine].files[0]
    try:
        views = [_view(file) for file in files]
        if engine == "openvino":
            content = openvino_content(*views)
            _require_operators(content, _OPENVINO)
            _require_sizes(content, _OPENVINO_SIZING)
        else:
            content = onnx_content(*views)
            _require_operators(content, _ONNX)
            _require_sizes(content, _ONNX_SIZING)
    except UnsafeGraph as error:
        raise M2DError(f"{name} cannot be read or run: {one_line(error)}.") from error
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


def _view(file: Path | bytes) -> memoryview:
    if isinstance(file, bytes):
        return memoryview(file)
    if file.stat().st_size == 0:  # which cannot be mapped
        return memoryview(b"")
    with file.open("rb") as stream:
        return memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))


def _require_operators(content: GraphContent, known: frozenset[str]) -> None:
    for node in content.nodes:
        if node.operator not in known:
            raise UnsafeGraph(f"it uses the operator {shown(node.operator)}, which is not allowed")
        if len(node.inputs) < _LEAST_INPUTS.get(node.operator, 1):
            raise UnsafeGraph(f"its operator {node.operator} lacks an input")


def _require_sizes(content: GraphContent, sizing: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse tensors that constants, or what is computed from constants only, make huge."""
    # Of each value that no input of the graph reaches: how large a size it can set.
    reach = {name: _reach(constant) for name, constant in content.constants.items()} | {"": 1}
    for node in content.nodes:
        for position in sizing.get(node.operator, ()):
            name = node.inputs[position] if position < len(node.inputs) else ""
            if reach.get(name, 1) > _MOST_VALUES:
                raise UnsafeGraph(
                    f"constants make its {node.operator} larger than {_MOST_VALUES:,} values"
                )
        if all(name in reach for name in node.inputs):
            made = math.prod(reach[name] for name in node.inputs)
            reach.update(dict.fromkeys(node.outputs, min(made, _MOST_VALUES + 1)))


def _reach(constant: Constant) -> int:
    """Return the largest number of values that a constant gives a tensor, as its shape or by it."""
    count, values = math.prod(constant.shape), constant.values()
    if values is None or count > _MOST_SIZES:
        return count
    # In Python's numbers, which do not overflow; the step of a Range counts as 1 / step.
    sizes = [abs(value) for value in values.tolist() if value]
    size = math.prod(max(size, 1 / size) for size in sizes)
    return max(count, math.ceil(size)) if size <= _MOST_VALUES else _MOST_VALUES + 1
