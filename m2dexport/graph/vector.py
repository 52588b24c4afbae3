"""The embedding graph: keep one depth, cut to a dim, normalise, encode the vector."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import ClearMetadataAndDocStringPass, RemoveUnusedNodesPass
from onnx_ir.tape import Tape

from m2dexport.checkpoint.alignment import LinearMap
from m2dexport.graph.edit import producer
from m2dexport.precisions import BitOrder, VectorPrecision
from m2dexport.vectors.codecs import (
    LEVELS,
    NORM_EPSILON,
    PER_BYTE,
    SYMMETRIC_LEVELS,
    Ranges,
    code_dtype,
    code_width,
    require_ranges,
)

OUTPUT = "sentence_embedding"
#: The weight of the map that ends an aligned graph; it stays in float32 beside integer weights.
MAP = "alignment.weight"
_ALIGNED = "aligned_embedding"
#: What a graph that puts out codes calls the vectors that it makes them of.
FLOATS = "float_embedding"
#: The output that holds a text's vector at each of its tokens, under the name that readers know.
STATES = "last_hidden_state"


def depth_output(depth: int) -> str:
    """Return the name of the graph output that holds the pooled vectors of one depth."""
    return f"depth_{depth}"


def depth_graph(all_depths: ir.Model, *depths: int) -> ir.Model:
    """Return a copy of an all-depths graph that computes only these depths, in its order."""
    model = all_depths.clone()
    names = {depth_output(depth) for depth in depths}
    kept = [value for value in model.graph.outputs if value.name in names]
    model.graph.outputs[:] = kept
    RemoveUnusedNodesPass()(model)
    return model


def vector_graph(model: ir.Model, dim: int) -> ir.Model:
    """Return a copy of a one-depth graph that outputs its leading ``dim``, L2-normalised.

    The output becomes float32 (batch, dim), named ``sentence_embedding``: cut first, then
    normalised, with the epsilon of ``torch.nn.functional.normalize``.
    """
    model = model.clone()
    tape = _Tape(model.graph)
    vector = model.graph.outputs[0]
    if vector.shape is None or vector.shape[1] != dim:
        vector = _cut(tape, vector, dim)
    vector = _normalized(tape, vector, "vector")
    return _with_output(model, vector, ir.DataType.FLOAT, dim)


def aligned_graph(model: ir.Model, linear: LinearMap) -> ir.Model:
    """Return a copy of a one-depth graph that normalises its output and maps it.

    The output becomes float32 (batch, dim of the map), not normalised.
    """
    model = model.clone()
    tape = _Tape(model.graph)
    vector = _normalized(tape, model.graph.outputs[0], "pooled")
    weight, bias = tape.constant(MAP, linear.weight), tape.constant("alignment.bias", linear.bias)
    mapped = tape.op("Gemm", [vector, weight, bias], {"transB": 1})
    return _with_output(model, mapped, ir.DataType.FLOAT, len(linear.bias), _ALIGNED)


def pooled_graph(model: ir.Model) -> ir.Model:
    """Return a copy of a ``vector_graph`` that puts out the pooled vector.

    It is neither normalised, cut nor aligned.
    """
    model = model.clone()
    divide = model.graph.outputs[0].producer()
    assert divide is not None
    pooled = divide.inputs[0]
    cut = producer(pooled, "Slice")  # that of ``_cut``, or a sub-model's own
    if cut is not None and cut.inputs[0] is not None and len(cut.inputs[0].shape or ()) == 2:
        pooled = cut.inputs[0]
    mapped = producer(pooled, "Gemm")
    if mapped is not None and pooled is not None and pooled.name == _ALIGNED:
        norm = producer(mapped.inputs[0], "Div")
        assert norm is not None
        pooled = norm.inputs[0]
    assert pooled is not None
    model.graph.outputs[:] = [pooled]
    RemoveUnusedNodesPass()(model)
    return model


def full_width(model: ir.Model) -> ir.Model:
    """Return a copy of a ``vector_graph`` that normalises the pooled vector, as wide as it is."""
    pooled = pooled_graph(model)
    shape = pooled.graph.outputs[0].shape
    if shape is None:
        return model.clone()
    return vector_graph(pooled, int(shape[1]))  # type: ignore[arg-type]


def coded_graph(
    model: ir.Model,
    vectors: VectorPrecision,
    ranges: Ranges | None,
    bit_order: BitOrder = "big",
) -> ir.Model:
    """Return a copy of a ``vector_graph`` that outputs encoded vectors.

    Args:
        model: a graph with one float32 (batch, dim) output, normalised.
        vectors: the precision; the codes, their type and width are those of
            ``codecs.encode_vectors``, bit for bit.
        ranges: the frozen ranges of int8 and int4 vectors.
        bit_order: where the first dim of a packed byte goes.

    Raises:
        UsageError: if int8 or int4 vectors come without ranges, or with ranges of another dim.
    """
    model = model.clone()
    vector = model.graph.outputs[0]
    dim = vector.shape[1] if vector.shape is not None else None
    assert isinstance(dim, int)
    if vectors == "float32":
        return model
    vector.name = FLOATS
    tape = _Tape(model.graph)
    if vectors in LEVELS:
        codes = _levels(tape, vector, vectors, require_ranges(vectors, ranges, dim))
    elif vectors == "int8-symmetric":
        codes = _symmetric(tape, vector)
    else:
        bits = tape.op("Greater", [vector, tape.constant("sign_threshold", np.float32(0))])
        codes = tape.op("Cast", [bits], {"to": ir.DataType.FLOAT})
    if vectors in PER_BYTE:
        places = _place_values(dim, PER_BYTE[vectors], bit_order)
        codes = tape.op("MatMul", [codes, tape.constant("place_values", places)])
    if vectors in ("int8", "binary"):  # from 0..255 to -128..127
        codes = tape.op("Sub", [codes, tape.constant("code_zero", np.float32(128))])
    dtype = ir.DataType.from_numpy(code_dtype(vectors))
    codes = tape.op("Cast", [codes], {"to": dtype})
    return _with_output(model, codes, dtype, code_width(dim, vectors))


def states_graph(model: ir.Model) -> ir.Model:
    """Return a copy of a graph that puts out float vectors, also in the shape of token states.

    Programs that pool token states themselves look for ``last_hidden_state``, (batch, sequence,
    dim). Here it holds a text's finished vector at every token, so that whichever way they pool,
    they get that vector: cut, mapped and of length 1. The second output is the vector itself.

    Args:
        model: a graph with one output, vectors or codes.
    """
    model = model.clone()
    vector = next(
        (value for node in model.graph for value in node.outputs if value.name == FLOATS),
        model.graph.outputs[0],
    )
    model.graph.outputs[:] = [vector]
    RemoveUnusedNodesPass()(model)
    assert vector.shape is not None
    dim = int(vector.shape[1])  # type: ignore[arg-type]
    tape = _Tape(model.graph)
    ids = next(value for value in model.graph.inputs if value.name == "input_ids")
    width = tape.constant("state_width", np.array([dim]))
    shape = tape.op("Concat", [tape.op("Shape", [ids]), width], {"axis": 0})
    column = tape.op("Unsqueeze", [vector, tape.constant("token_axis", np.array([1]))])
    states = tape.op("Expand", [column, shape])
    _with_output(model, vector, ir.DataType.FLOAT, dim)
    states.name, states.type = STATES, ir.TensorType(ir.DataType.FLOAT)
    states.shape = ir.Shape(["batch", "sequence", dim])
    model.graph.outputs.insert(0, states)
    return model


def serialize_graph(model: ir.Model) -> bytes:
    """Return the ONNX file's bytes, without the exporter's metadata, which varies between runs."""
    model = model.clone()
    ClearMetadataAndDocStringPass()(model)
    model.graph.name = "m2dexport"
    for value in model.graph.inputs:
        value.shape = ir.Shape(["batch", "sequence"])
    return ir.to_proto(model).SerializeToString(deterministic=True)  # type: ignore[no-any-return]


def tail_bytes(width: int, dim: int, vectors: VectorPrecision) -> int:
    """Return the bytes that cutting to ``dim`` and encoding add to a graph that does neither.

    They do not depend on the rest of the graph, so they are counted on a graph without the rest.
    For int8 and int4, the ranges file counts as well.
    """
    pooled = ir.Value(
        name="pooled", shape=ir.Shape(["batch", width]), type=ir.TensorType(ir.DataType.FLOAT)
    )
    graph = ir.Graph([pooled], [pooled], nodes=[], opset_imports={"": 18}, name="tail")
    model = ir.Model(graph, ir_version=8)
    ranges = None
    if vectors in LEVELS:
        ranges = _ranges_like(dim)
    tail = ir.to_proto(coded_graph(vector_graph(model, dim), vectors, ranges))
    plain = ir.to_proto(vector_graph(model, width))
    files = ranges_bytes(dim) if ranges else 0
    return len(tail.SerializeToString()) - len(plain.SerializeToString()) + files


def ranges_bytes(dim: int) -> int:
    """Return the bytes of the ranges file of int8 and int4 vectors."""
    return len(_ranges_like(dim).to_json())


def _ranges_like(dim: int) -> Ranges:
    return Ranges(np.full(dim, -0.123456789, np.float32), np.full(dim, 0.123456789, np.float32))


def _cut(tape: _Tape, vector: ir.Value, dim: int) -> ir.Value:
    bounds = {"cut_start": 0, "cut_end": dim, "cut_axis": 1}
    return tape.op(
        "Slice", [vector, *(tape.constant(name, np.array([v])) for name, v in bounds.items())]
    )


def _normalized(tape: _Tape, vector: ir.Value, name: str) -> ir.Value:
    axis = tape.constant(f"{name}_axis", np.array([-1]))
    norm = tape.op("ReduceL2", [vector, axis], {"keepdims": 1})
    floor = tape.constant("epsilon" if name == "vector" else f"{name}_epsilon", NORM_EPSILON)
    return tape.op("Div", [vector, tape.op("Max", [norm, floor])])


def _with_output(
    model: ir.Model, value: ir.Value, dtype: ir.DataType, width: int, name: str = OUTPUT
) -> ir.Model:
    value.name = name
    value.type = ir.TensorType(dtype)
    value.shape = ir.Shape(["batch", width])
    model.graph.outputs[:] = [value]
    return model


def _levels(tape: _Tape, vector: ir.Value, precision: VectorPrecision, ranges: Ranges) -> ir.Value:
    """Return each value's level within its range, as float; the operators mirror ``codecs``."""
    offset = tape.op("Sub", [vector, tape.constant("range_low", ranges.low)])
    step = tape.constant("range_step", ranges.step(precision))
    levels = tape.op("Floor", [tape.op("Div", [offset, step])])
    return _clip(tape, levels, 0, LEVELS[precision])


def _symmetric(tape: _Tape, vector: ir.Value) -> ir.Value:
    scale = tape.constant("code_scale", np.float32(SYMMETRIC_LEVELS))
    rounded = tape.op("Round", [tape.op("Mul", [vector, scale])])  # halves to even, as rint does
    return _clip(tape, rounded, -SYMMETRIC_LEVELS, SYMMETRIC_LEVELS)


def _clip(tape: _Tape, value: ir.Value, low: int, high: int) -> ir.Value:
    bounds = {"code_low": low, "code_high": high}
    return tape.op(
        "Clip", [value, *(tape.constant(name, np.float32(v)) for name, v in bounds.items())]
    )


def _place_values(dim: int, per_byte: int, bit_order: BitOrder) -> NDArray[np.float32]:
    """Return each dim's place value in each byte: a product with this matrix packs a row."""
    index = np.arange(dim)
    place = index % per_byte
    if bit_order == "big":
        place = per_byte - 1 - place
    values = np.zeros((dim, -(-dim // per_byte)), dtype=np.float32)
    values[index, index // per_byte] = 2.0 ** (place * (8 // per_byte))
    return values


class _Tape(Tape):
    """A tape at the end of a graph that also registers its constants there."""

    def constant(self, name: str, array: NDArray[Any]) -> ir.Value:
        return self.initializer(ir.tensor(np.asarray(array), name=name))
