"""The embedding graph: keep one depth, cut to a dim, normalise, encode the vector."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import ClearMetadataAndDocStringPass, RemoveUnusedNodesPass
from onnx_ir.tape import Tape

from m2dexport.codecs import Ranges, VectorPrecision
from m2dexport.errors import UsageError

OUTPUT = "sentence_embedding"
_EPSILON = np.float32(1e-12)  # of torch.nn.functional.normalize
_ZERO = np.float32(128)


def depth_output(depth: int) -> str:
    """Return the name of the graph output that holds the pooled vectors of one depth."""
    return f"depth_{depth}"


def depth_graph(all_depths: ir.Model, depth: int) -> ir.Model:
    """Return a copy of an all-depths graph that computes one depth and nothing above it."""
    model = all_depths.clone()
    kept = [value for value in model.graph.outputs if value.name == depth_output(depth)]
    model.graph.outputs[:] = kept
    RemoveUnusedNodesPass()(model)
    return model


def vector_graph(model: ir.Model, dim: int) -> ir.Model:
    """Return a copy of a one-depth graph that puts out its leading ``dim``, L2-normalised.

    The output becomes float32 (batch, dim), named ``sentence_embedding``: cut first, then
    normalised, with the epsilon of ``torch.nn.functional.normalize``.
    """
    model = model.clone()
    tape = _Tape(model.graph)
    vector = model.graph.outputs[0]
    if vector.shape is None or vector.shape[1] != dim:
        vector = _cut(tape, vector, dim)
    axis = tape.constant("vector_axis", np.array([-1]))
    norm = tape.op("ReduceL2", [vector, axis], {"keepdims": 1})
    vector = tape.op("Div", [vector, tape.op("Max", [norm, tape.constant("epsilon", _EPSILON)])])
    return _with_output(model, vector, ir.DataType.FLOAT, dim)


def coded_graph(model: ir.Model, vectors: VectorPrecision, ranges: Ranges | None) -> ir.Model:
    """Return a copy of a ``vector_graph`` that puts out encoded vectors.

    Args:
        model: a graph with one float32 (batch, dim) output, normalised.
        vectors: float32 (batch, dim), int8 (batch, dim) or ubinary (batch, ceil(dim / 8)); the
            codes are those of ``codecs.encode_vectors``, bit for bit.
        ranges: the frozen ranges of int8 vectors.

    Raises:
        UsageError: when int8 vectors come without ranges.
    """
    model = model.clone()
    vector = model.graph.outputs[0]
    dim = vector.shape[1] if vector.shape is not None else None
    assert isinstance(dim, int)
    if vectors == "float32":
        return model
    vector.name = "float_embedding"
    tape = _Tape(model.graph)
    if vectors == "ubinary":
        codes = _ubinary(tape, vector, dim)
        return _with_output(model, codes, ir.DataType.UINT8, -(-dim // 8))
    if ranges is None:
        raise UsageError("int8 vectors need ranges, measured on calibration texts.")
    return _with_output(model, _int8(tape, vector, ranges), ir.DataType.INT8, dim)


def serialize_graph(model: ir.Model) -> bytes:
    """Return the ONNX file's bytes, without the exporter's notes, whose content varies."""
    model = model.clone()
    ClearMetadataAndDocStringPass()(model)
    model.graph.name = "m2dexport"
    for value in model.graph.inputs:
        value.shape = ir.Shape(["batch", "sequence"])
    return ir.to_proto(model).SerializeToString(deterministic=True)  # type: ignore[no-any-return]


def tail_bytes(width: int, dim: int, vectors: VectorPrecision) -> int:
    """Return the bytes that cutting to ``dim`` and encoding add to a graph that does neither.

    They do not depend on what is below, so they are counted on a graph that holds nothing else.
    int8 counts the ranges file, too.
    """
    pooled = ir.Value(
        name="pooled", shape=ir.Shape(["batch", width]), type=ir.TensorType(ir.DataType.FLOAT)
    )
    graph = ir.Graph([pooled], [pooled], nodes=[], opset_imports={"": 18}, name="tail")
    model = ir.Model(graph, ir_version=8)
    ranges = None
    if vectors == "int8":
        ranges = Ranges(
            np.full(dim, -0.123456789, np.float32), np.full(dim, 0.123456789, np.float32)
        )
    tail = ir.to_proto(coded_graph(vector_graph(model, dim), vectors, ranges))
    plain = ir.to_proto(vector_graph(model, width))
    files = len(ranges.to_json()) if ranges else 0
    return len(tail.SerializeToString()) - len(plain.SerializeToString()) + files


def _cut(tape: _Tape, vector: ir.Value, dim: int) -> ir.Value:
    bounds = {"cut_start": 0, "cut_end": dim, "cut_axis": 1}
    return tape.op(
        "Slice", [vector, *(tape.constant(name, np.array([v])) for name, v in bounds.items())]
    )


def _with_output(model: ir.Model, value: ir.Value, dtype: ir.DataType, width: int) -> ir.Model:
    value.name = OUTPUT
    value.type = ir.TensorType(dtype)
    value.shape = ir.Shape(["batch", width])
    model.graph.outputs[:] = [value]
    return model


def _int8(tape: _Tape, vector: ir.Value, ranges: Ranges) -> ir.Value:
    """Mirror ``codecs.encode_vectors`` for int8, operator by operator."""
    offset = tape.op("Sub", [vector, tape.constant("range_low", ranges.low)])
    steps = tape.op("Floor", [tape.op("Div", [offset, tape.constant("range_step", ranges.step)])])
    low, high = (
        tape.constant("code_low", np.float32(0)),
        tape.constant("code_high", np.float32(255)),
    )
    code = tape.op("Sub", [tape.op("Clip", [steps, low, high]), tape.constant("code_zero", _ZERO)])
    return tape.op("Cast", [code], {"to": ir.DataType.INT8})


def _ubinary(tape: _Tape, vector: ir.Value, dim: int) -> ir.Value:
    """Pack signs as ``numpy.packbits`` does, first dim in the highest bit: bits @ powers of two."""
    bits = tape.op("Greater", [vector, tape.constant("sign_threshold", np.float32(0))])
    index = np.arange(dim)
    powers = np.zeros((dim, -(-dim // 8)), dtype=np.float32)
    powers[index, index // 8] = 2.0 ** (7 - index % 8)
    floats = tape.op("Cast", [bits], {"to": ir.DataType.FLOAT})
    packed = tape.op("MatMul", [floats, tape.constant("bit_powers", powers)])
    return tape.op("Cast", [packed], {"to": ir.DataType.UINT8})


class _Tape(Tape):
    """A tape at the end of a graph that also registers its constants there."""

    def constant(self, name: str, array: NDArray[Any]) -> ir.Value:
        return self.initializer(ir.tensor(np.asarray(array), name=name))
