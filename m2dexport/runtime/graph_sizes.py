"""How large a graph's tensors are that no input reaches: an engine computes them when it loads.

A few bytes can ask for terabytes: ``Tile`` of ``Tile``, the sum of a row and a column, a ``Gather``
of one long row by many ids. So each such tensor is bounded from above by those that it is made
from, and refused when it may have more than 2^26 values and more than the largest of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from m2dexport.runtime.graph_content import Constant, GraphContent, Node, UnsafeGraph

_MOST_VALUES = 1 << 26  # of a tensor whose size constants set
_MOST_TOGETHER, _MOST_TIMES = 1 << 28, 64  # values, beside so many for each that is stored
_MOST_SIZES = 16  # values of a constant that may be a shape
_UNKNOWN = 1 << 62  # larger than any size

#: Operator -> which of its inputs set the size of what it makes.
_SIZING = {"Tile": (1,), "OneHot": (1,), "Range": (0, 1, 2)}
_ONNX_SIZING = {**_SIZING, "ConstantOfShape": (0,), "Expand": (1,), "Pad": (1,)}
_OPENVINO_SIZING = {**_SIZING, "Broadcast": (1,), "Pad": (1, 2)}
_ALIKE_NAMES = """
Abs Cast CastLike Ceil Ceiling Clamp Clip Convert ConvertLike Cos CumSum DequantizeLinear
DynamicQuantizeLinear Elu Erf Exp Floor Gelu Identity IsInf IsNaN LayerNormalization Log
LogSoftmax LogicalNot MVN Neg Negative NormalizeL2 Not QuantizeLinear RMSNormalization ReLU
Reciprocal Relu Round Sigmoid Sign Sin SoftMax Softmax Softplus Sqrt Swish Tan Tanh
"""
_FEWER_NAMES = """
ArgMax ArgMin Flatten ReduceL1 ReduceL2 ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd
ReduceSum ReduceSumSquare ScatterElements ScatterElementsUpdate ScatterND ScatterNDUpdate
ScatterUpdate Size Slice Split Squeeze StridedSlice TopK Transpose Trilu Unsqueeze VariadicSplit
"""
_BROADCAST_NAMES = """
Add And Div Divide Equal FakeQuantize FloorMod Greater GreaterEqual GreaterOrEqual Less LessEqual
LessOrEqual LogicalAnd LogicalOr LogicalXor Max Maximum Mean Min Minimum Mod Mul Multiply NotEqual
Or Pow Power Select Sub Subtract Sum Where Xor
"""
#: What makes a tensor of the shape of its first input, one of no more values, and one of the shape
#: to which its inputs are broadcast.
_ALIKE, _FEWER = frozenset(_ALIKE_NAMES.split()), frozenset(_FEWER_NAMES.split())
_BROADCAST = frozenset(_BROADCAST_NAMES.split())
_PRODUCTS = frozenset({"MatMul", "MatMulInteger", "MatMulIntegerToFloat", "MatMulNBits"})
#: What leaves the values of its first input as they are and repeats none of them.
_KEPT = frozenset({"Identity", "Reshape", "Slice", "Squeeze", "StridedSlice", "Unsqueeze"})


@dataclass(frozen=True)
class _Known:
    """What is known of a tensor that no input reaches."""

    count: int  # its values, at most
    shape: tuple[int, ...] | None  # its sizes, at most; None: unknown
    size: int  # the largest size that its values set
    values: tuple[int, ...] = ()  # of a stored shape


def require_sizes(content: GraphContent, graph_format: Literal["onnx", "ir"]) -> None:
    """Refuse tensors that constants, or what is computed from constants only, make huge.

    Args:
        content: of the graph.
        graph_format: in which it is stored, as ``ENGINES`` says; it decides what operators mean.

    Raises:
        UnsafeGraph: naming the operator that makes it; also when the nodes are not in the order in
            which they run.
    """
    sizing = _OPENVINO_SIZING if graph_format == "ir" else _ONNX_SIZING
    known = {name: _stored(constant) for name, constant in content.constants.items()}
    known[""] = _Known(1, (), 1)
    stored = together = sum(each.count for each in known.values())
    made, awaited = set(known), set[str]()
    for node in content.nodes:
        awaited.update(name for name in node.inputs if name not in made)
        outputs = {name for name in node.outputs if name}
        if not outputs.isdisjoint(awaited | made):
            raise UnsafeGraph("its nodes are not in the order in which they run")
        made |= outputs
        inputs = [known.get(name) for name in node.inputs]
        set_by = [inputs[at] for at in sizing.get(node.operator, ()) if at < len(inputs)]
        sized = math.prod(each.size for each in set_by if each)
        _require(sized, _MOST_VALUES, node)
        constant = [each for each in inputs if each]
        if len(constant) == len(inputs):
            found = _computed(node, constant, sized)
            _require(found.count, max(_MOST_VALUES, *(each.count for each in constant)), node)
            known.update(dict.fromkeys(outputs, found))
            together += found.count * len(outputs)
            _require(together, _MOST_TOGETHER + _MOST_TIMES * stored, node)


def _require(count: int, most: int, node: Node) -> None:
    if count > most:
        raise UnsafeGraph(f"constants make its {node.operator} larger than {most:,} values")


def _stored(constant: Constant) -> _Known:
    # An empty tensor counts by its other sizes, which a sum over none of its values has.
    count = _count(constant.shape)
    if 0 in constant.shape and count > _MOST_VALUES:
        raise UnsafeGraph("it has an empty constant of an impossible shape")
    values = constant.values()
    if values is None or values.size > _MOST_SIZES:
        return _Known(count, constant.shape, _UNKNOWN)
    # In Python's numbers, which do not overflow; the step of a Range counts as 1 / step.
    sizes = [abs(value) for value in values.tolist() if value]
    size = math.prod(max(size, 1 / size) for size in sizes)
    size = math.ceil(size) if size < _UNKNOWN else _UNKNOWN
    whole = values.dtype.kind in "iu"
    return _Known(count, constant.shape, size, tuple(values.tolist()) if whole else ())


def _computed(node: Node, inputs: list[_Known], sized: int) -> _Known:
    """Return what is known of the outputs of a node, none of whose inputs an input reaches.

    Args:
        node: any operator.
        inputs: what is known of each of its inputs.
        sized: the largest size that those of them set that set a size.
    """
    first, operator = inputs[0], node.operator.rpartition(".")[2]
    shape = None
    if operator in _ALIKE:
        count, shape = first.count, first.shape
    elif operator in _FEWER:
        count, shape = first.count, _shape_of_fewer(node, inputs)
    elif operator in _PRODUCTS | _BROADCAST:
        shape = _product(inputs, node) if operator in _PRODUCTS else _broadcast(inputs)
        count = math.prod(each.count for each in inputs) if shape is None else _count(shape)
    elif operator in ("Shape", "ShapeOf"):
        count = 8
    elif operator == "Concat":
        shape = _joined(inputs, node.axis)
        count = sum(each.count for each in inputs)
    elif operator == "Reshape":
        # A size of zero hides the others until a sum over none of its values shows them.
        shape = _reshaped(first, inputs[1].values)
        count = max(first.count, inputs[1].size)
    elif operator == "Gather":
        along = min((max(size, 1) for size in first.shape or (1,)), default=1)
        count = first.count // along * inputs[1].count
    elif operator == "Pad":
        count = first.count * sized << min(sum(each.count for each in inputs[1:3]), 64)
    elif operator in ("ConstantOfShape", "Range"):
        count = sized
    elif operator in ("Broadcast", "Expand", "Tile"):
        count = first.count * sized
    else:
        count = sized * math.prod(each.count for each in inputs)
    return _Known(min(count, _UNKNOWN), shape, _size(operator, inputs))


def _size(operator: str, inputs: list[_Known]) -> int:
    """Return the largest size that what an operator makes can set.

    Of most it is unknown: they cast -1 to a large number, multiply by an attribute, or repeat a
    value. Sizes that builds write are stored.
    """
    if operator in ("Shape", "ShapeOf"):
        return inputs[0].count
    if operator == "Concat":
        return min(math.prod(each.size for each in inputs), _UNKNOWN)
    return inputs[0].size if operator in _KEPT else _UNKNOWN


def _count(shape: tuple[int, ...]) -> int:
    return math.prod(max(size, 1) for size in shape)


def _reshaped(first: _Known, target: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return the shape that Reshape makes, or None where it follows from what is unknown."""
    if not target or 0 in target or (min(target) < 0 and first.shape is None):
        return None
    left = first.count // math.prod(size for size in target if size > 0)
    return tuple(size if size > 0 else left for size in target)


def _shape_of_fewer(node: Node, inputs: list[_Known]) -> tuple[int, ...] | None:
    if node.operator == "Unsqueeze" and len(inputs) > 1:
        return _unsqueezed(inputs[0], inputs[1].values)
    keeps = node.operator.startswith("Reduce") and node.keeps_rank
    return inputs[0].shape if keeps else None


def _unsqueezed(first: _Known, axes: tuple[int, ...]) -> tuple[int, ...] | None:
    rank = len(first.shape or ()) + len(axes)
    if first.shape is None or not axes or any(not -rank <= axis < rank for axis in axes):
        return None
    sizes, added = iter(first.shape), {axis % rank for axis in axes}
    return tuple(1 if axis in added else next(sizes, 1) for axis in range(rank))


def _product(inputs: list[_Known], node: Node) -> tuple[int, ...] | None:
    """Return the shape of a matrix product, or None where that of a factor is unknown."""
    first, second = inputs[0].shape, inputs[:2][-1].shape
    if first is None or second is None or min(len(first), len(second)) < 2:
        return None
    if node.operator.endswith("NBits"):  # whose second factor has a packed row for each column
        return (*first[:-1], second[0])
    transposed = node.transposed
    rows, columns = first[-1 if transposed[0] else -2], second[-2 if transposed[1] else -1]
    return (*_aligned([first[:-2], second[:-2]]), rows, columns)


def _joined(inputs: list[_Known], axis: int | None) -> tuple[int, ...] | None:
    """Return the shape of tensors put together along an axis, or None where that is unknown."""
    shapes = [each.shape for each in inputs if each.shape is not None]
    if axis is None or len(shapes) < len(inputs) or not -len(shapes[0]) <= axis < len(shapes[0]):
        return None
    sizes = list(shapes[0])
    sizes[axis] = sum(shape[axis] for shape in shapes if len(shape) == len(sizes))
    return tuple(sizes)


def _broadcast(inputs: list[_Known]) -> tuple[int, ...] | None:
    """Return the shape to which tensors are broadcast, or None where that of one is unknown."""
    shapes = [each.shape for each in inputs if each.shape is not None]
    if len(shapes) < len(inputs):
        return None
    return _aligned(shapes)


def _aligned(shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    rank = max(map(len, shapes))
    aligned = [(1,) * (rank - len(shape)) + shape for shape in shapes]
    return tuple(map(max, zip(*aligned, strict=True)))
