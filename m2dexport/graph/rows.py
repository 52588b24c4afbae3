"""Which operators treat the rows of an axis one by one, and which of their inputs have these rows.

An axis is counted from the end, as broadcasting does: -2 is that of tokens in (batch, sequence,
width) values, whether or not a quantizer's own values have a known shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import onnx_ir as ir

_ELEMENTWISE_NAMES = """
Abs Add And BiasGelu Cast Ceil Clip Cos Div Elu Equal Erf Exp FastGelu Floor Gelu Greater
GreaterOrEqual HardSigmoid HardSwish Identity LeakyRelu Less LessOrEqual Log Max Min Mish Mul Neg
Not Or Pow QuickGelu Reciprocal Relu Round Selu Sigmoid Sign Sin Softplus Sqrt Sub Sum Swish Tanh
Where
"""
_PRODUCT_NAMES = "MatMul MatMulInteger MatMulIntegerToFloat MatMulNBits MultiHeadAttention"
_LAST_AXIS_NAMES = """
LayerNormalization LogSoftmax RMSNormalization SimplifiedLayerNormalization Softmax
"""
_REDUCTION_NAMES = "ReduceL2 ReduceMax ReduceMean ReduceMin ReduceSum"

#: Input -> its axis of the same rows.
Rows = Mapping[ir.Value, int]


def row_inputs(node: ir.Node, axis: int) -> Rows | None:
    """Return what a node needs for one row of its output: of which inputs only that row.

    It needs its other inputs whole.

    Args:
        node: any node.
        axis: the axis of rows in its output, -1 or less.

    Returns:
        Input -> its axis of the same rows; None: the node needs other rows as well, or is not known
        not to.
    """
    rule, x = _RULES.get(node.op_type), node.inputs[0] if node.inputs else None
    return None if rule is None or x is None else rule(node, x, axis)


def _elementwise(node: ir.Node, x: ir.Value, axis: int) -> Rows | None:
    """Return the inputs that have these rows; the others are the same for all of them."""
    rank = _rank(node.outputs[0])
    found = {}
    for value in node.inputs:
        shape = value.shape if value is not None else ()
        if value is None or (shape is not None and (len(shape) < -axis or shape[axis] == 1)):
            continue
        if value.producer() is None or (shape is not None and rank not in (None, len(shape))):
            return None
        found[value] = axis
    return found


def _quantized(node: ir.Node, x: ir.Value, axis: int) -> Rows | None:
    scale = node.inputs[1]
    one = scale is not None and scale.const_value is not None and scale.const_value.size == 1
    return {x: axis} if one else None


def _product(node: ir.Node, x: ir.Value, axis: int) -> Rows | None:
    """Return the first factor of a product, or the queries of attention."""
    return {x: -2} if axis == -2 and x not in node.inputs[1:] else None


def _along_last(node: ir.Node, x: ir.Value, axis: int) -> Rows | None:
    last = _from_end(node.attributes.get_int("axis", -1), x)
    return {x: axis} if axis < -1 and last == -1 else None


def _reduced(node: ir.Node, x: ir.Value, axis: int) -> Rows | None:
    over = _constants(node, 1) or node.attributes.get_ints("axes", [])
    axes = [_from_end(each, x) for each in over]
    kept = node.attributes.get_int("keepdims", 1)
    return {x: axis} if axes and kept and None not in axes and axis not in axes else None


def _split(node: ir.Node, x: ir.Value, axis: int) -> Rows | None:
    return (
        {x: axis} if _from_end(node.attributes.get_int("axis", 0), x) not in (axis, None) else None
    )


def _gathered(node: ir.Node, x: ir.Value, axis: int) -> Rows | None:
    picked = node.inputs[1]
    keeps_rank = picked is not None and len(picked.shape or ()) == 1
    return _split(node, x, axis) if keeps_rank else None


def _beside(node: ir.Node, x: ir.Value, axis: int) -> Rows | None:
    """Follow rows through what joins or picks along another axis, whose inputs all have them."""
    return _elementwise(node, x, axis) if _split(node, x, axis) else None


def _transposed(node: ir.Node, x: ir.Value, axis: int) -> Rows | None:
    order = node.attributes.get_ints("perm", ())
    return {x: order[axis + len(order)] - len(order)} if order else None


def _sliced(node: ir.Node, x: ir.Value, axis: int) -> Rows | None:
    axes = [_from_end(each, x) for each in _constants(node, 3)]
    return {x: axis} if axes and None not in axes and axis not in axes else None


def _squeezed(node: ir.Node, x: ir.Value, axis: int) -> Rows | None:
    rank, axes = _rank(x), _constants(node, 1)
    if rank is None or not axes:
        return None
    left = [place for place in range(rank) if place not in {each % rank for each in axes}]
    return {x: left[axis + len(left)] - rank}


def _unsqueezed(node: ir.Node, x: ir.Value, axis: int) -> Rows | None:
    rank, axes = _rank(x), _constants(node, 1)
    if rank is None or not axes:
        return None
    longer = rank + len(axes)
    old = [place for place in range(longer) if place not in {each % longer for each in axes}]
    return {x: old.index(axis + longer) - rank} if axis + longer in old else None


def _reshaped(node: ir.Node, x: ir.Value, axis: int) -> Rows | None:
    """Find the axis of the same size that has as many values to its right."""
    before, after = list(x.shape or ()), list(node.outputs[0].shape or ())
    for place, size in enumerate(before if after else ()):
        right = _count(before[place + 1 :])
        if size == after[axis] and right == _count(after[len(after) + axis + 1 :]):
            return {x: place - len(before)}
    return None


_RULES: Mapping[str, Callable[[ir.Node, ir.Value, int], Rows | None]] = {
    **dict.fromkeys(_ELEMENTWISE_NAMES.split(), _elementwise),
    **dict.fromkeys(_PRODUCT_NAMES.split(), _product),
    **dict.fromkeys(_LAST_AXIS_NAMES.split(), _along_last),
    **dict.fromkeys(_REDUCTION_NAMES.split(), _reduced),
    "Concat": _beside,
    "DequantizeLinear": _quantized,
    "Gather": _gathered,
    "GatherElements": _beside,
    "QuantizeLinear": _quantized,
    "Reshape": _reshaped,
    "Slice": _sliced,
    "Split": _split,
    "Squeeze": _squeezed,
    "Transpose": _transposed,
    "Unsqueeze": _unsqueezed,
}


def _count(sizes: Sequence[ir.SymbolicDim | int]) -> tuple[int, tuple[str, ...]]:
    """Return a number of values: the product of known sizes, and the names of the others."""
    known = [size for size in sizes if isinstance(size, int)]
    return math.prod(known), tuple(sorted(str(s) for s in sizes if not isinstance(s, int)))


def _from_end(axis: int, x: ir.Value) -> int | None:
    """Return an axis counted from the end, None where that is not known."""
    rank = _rank(x)
    if axis < 0:
        return axis
    return None if rank is None else axis - rank


def _rank(value: ir.Value) -> int | None:
    return None if value.shape is None else len(value.shape)


def _constants(node: ir.Node, place: int) -> list[int]:
    """Return the values of an input that is a constant, such as axes; none of any other."""
    value = node.inputs[place] if len(node.inputs) > place else None
    tensor = value.const_value if value is not None else None
    return [] if tensor is None else [int(each) for each in tensor.numpy().flat]
