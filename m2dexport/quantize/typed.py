"""Explicit types: a graph that computes in 16 bits wherever that costs no accuracy.

Engines whose networks are strongly typed compute in the types that the graph has. Products, biases,
activations and residual sums are computed in 16 bits. In float32 stay

* norms, and the sums and powers that they are made of;
* softmax, and what is added to its input: the mask of padding must not become infinite, since
  ``0 * -inf`` is NaN;
* rotary positions, and whatever else multiplies by a value that was computed in float32;
* pooling and everything after it.

Masks are finite in either type: what hides a key is -30000.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass
from onnx_ir.tape import Tape

from m2dexport.graph.edit import SMALL, constant
from m2dexport.quantize.half import narrowed

#: The score of a hidden key; float16 ends at 65504, and scores are added to it.
_HIDDEN = np.float32(-30000)
_LOWEST = np.float32(-1e30)  # what masks are filled with lies below
#: Operators that only move values: their results have the type of what they move.
_MOVE_NAMES = """
Concat Expand Gather GatherElements GatherND Identity Pad Reshape Slice Split Squeeze Tile Transpose
Unsqueeze
"""
#: Operators of one value, and sums, which lose nothing that matters in 16 bits.
_POINTWISE_NAMES = """
Abs Add Clip Erf Gelu HardSigmoid Max Min Neg Relu Sigmoid Sum Tanh Where
"""
_MOVES, _POINTWISE = frozenset(_MOVE_NAMES.split()), frozenset(_POINTWISE_NAMES.split())
_BINARY = frozenset({"Mul", "Sub", "Div"})
_TOWARDS_SOFTMAX = frozenset({"Add", "Where", "Max", "Min"})


def hide_finitely(graph: ir.Graph) -> None:
    """Replace the lowest float32 number in masks by -30000, in place."""
    for value in list(graph.initializers.values()):
        tensor = value.const_value
        if tensor is None or tensor.dtype != ir.DataType.FLOAT or tensor.size >= SMALL:
            continue
        array = tensor.numpy()
        if (array < _LOWEST).any():
            finite = np.where(array < _LOWEST, _HIDDEN, array).astype(np.float32)
            value.const_value = ir.tensor(finite, name=value.name)


def compute_half(model: ir.Model, dtype: ir.DataType) -> None:
    """Compute in ``dtype``, FLOAT16 or BFLOAT16, where this module says so, in place.

    The graph's inputs and outputs keep their types.

    Raises:
        CheckpointError: when a weight is outside the range of ``dtype``.
    """
    ShapeInferencePass(check_type=False, strict_mode=False)(model)  # rewrites leave types open
    _Typing(model.graph, dtype).apply()


class _Typing:
    """The types of a graph's values while its nodes are visited in order."""

    def __init__(self, graph: ir.Graph, dtype: ir.DataType) -> None:
        self.graph = graph
        self.dtype = dtype
        self.half: set[ir.Value] = set()  # values that are of ``dtype``
        self.casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self.wide = _before_softmax(graph)

    def apply(self) -> None:
        for node in list(self.graph):
            if self._is_half(node):
                self._take(node, self.dtype)
                for output in node.outputs:
                    self.half.add(output)
                    output.type = ir.TensorType(self.dtype)
            elif any(value in self.half for value in node.inputs):
                self._take(node, ir.DataType.FLOAT)
        outputs = [self._cast(value, ir.DataType.FLOAT, None) for value in self.graph.outputs]
        self.graph.outputs[:] = outputs

    def _is_half(self, node: ir.Node) -> bool:
        """Say whether a node computes in 16 bits."""
        inputs = [value for value in node.inputs if value is not None]
        if node in self.wide or not inputs:
            return False
        if node.op_type == "MatMul":
            return len(inputs[0].shape or ()) > 2  # of tokens, not of pooled vectors
        if node.op_type == "Gather" and _is_table(inputs[0]):
            return True
        if node.op_type in _MOVES:
            return inputs[0] in self.half
        half = [value for value in inputs if value in self.half]
        wide = [v for v in inputs if _is_float(v) and v.const_value is None and v not in self.half]
        some = bool(half) and (node.op_type in _POINTWISE or (node.op_type in _BINARY and not wide))
        return some or node.op_type == "DequantizeLinear"

    def _take(self, node: ir.Node, dtype: ir.DataType) -> None:
        """Give a node its float inputs in one type."""
        for index, value in enumerate(node.inputs):
            if value is not None and (value in self.half or _is_float(value)):
                node.replace_input_with(index, self._cast(value, dtype, node))

    def _cast(self, value: ir.Value, dtype: ir.DataType, user: ir.Node | None) -> ir.Value:
        """Return a value in a type; what is made of it is made once, before the first user."""
        is_half = value in self.half
        if is_half == (dtype == self.dtype):
            return value
        if (value, dtype) not in self.casts:
            if value.const_value is not None:
                cast = self._constant(value)
            else:
                cast = self._node(value, dtype, user)
            self.casts[value, dtype] = cast
            if dtype == self.dtype:
                self.half.add(cast)
        return self.casts[value, dtype]

    def _node(self, value: ir.Value, dtype: ir.DataType, user: ir.Node | None) -> ir.Value:
        tape = Tape()
        cast = tape.op("Cast", [value], {"to": dtype})
        cast.shape, cast.type = value.shape, ir.TensorType(dtype)
        producer = value.producer()
        if producer is not None:
            self.graph.insert_after(producer, tape.nodes)
        else:
            assert user is not None
            self.graph.insert_before(user, tape.nodes)
        return cast

    def _constant(self, value: ir.Value) -> ir.Value:
        return constant(
            self.graph, f"{value.name}.{self.dtype.name.lower()}", narrowed(value, self.dtype)
        )


def _before_softmax(graph: ir.Graph) -> set[ir.Node]:
    """Return the nodes that add to, or choose among, the scores that a softmax sees."""
    found: set[ir.Node] = set()
    ends = [node.inputs[0] for node in graph if node.op_type == "Softmax"]
    while ends:
        value = ends.pop()
        node = value.producer() if value is not None else None
        if node is not None and node.op_type in _TOWARDS_SOFTMAX and node not in found:
            found.add(node)
            ends += node.inputs
    return found


def _is_float(value: ir.Value) -> bool:
    return value.dtype == ir.DataType.FLOAT


def _is_table(value: ir.Value) -> bool:
    tensor = value.const_value
    large = tensor is not None and tensor.size >= SMALL and len(value.shape or ()) == 2
    return large and _is_float(value)
