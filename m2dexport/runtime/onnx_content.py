"""An ONNX file, read without the onnx package, which a device need not have.

Only what m2dexport writes is read: a field that it never writes, such as a subgraph, a function or
external data, is refused by name. So is whatever two readers could understand differently, such as
a field that is there twice. Time and memory are bounded by the size of the file, and weights are
not copied.

Field numbers are those of onnx/onnx.proto (onnx 1.17 to 1.20; they never change); the encoding is
that of https://protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from m2dexport.runtime.graph_content import (
    Constant,
    GraphContent,
    Node,
    UnsafeGraph,
    require_size,
)
from m2dexport.strict import shown

_MOST_BYTES = 1 << 24  # of everything but the values of constants
_MOST_NAME = 1024  # bytes of a name

_TEXTS = frozenset({"name", "domain", "producer_name", "producer_version"})
_DATA = ("raw_data", "float_data", "int32_data", "int64_data")
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

#: Message -> number of a field that m2dexport writes, or could -> name; a star: may be repeated.
_FIELDS: Mapping[str, Mapping[int, str]] = {
    "ModelProto": {
        1: "ir_version",
        2: "producer_name",
        3: "producer_version",
        4: "domain",
        5: "model_version",
        6: "doc_string",
        7: "graph",
        8: "opset_import*",
        14: "metadata_props*",
    },
    "GraphProto": {
        1: "node*",
        2: "name",
        5: "initializer*",
        10: "doc_string",
        11: "input*",
        12: "output*",
        13: "value_info*",
        16: "metadata_props*",
    },
    "NodeProto": {
        1: "input*",
        2: "output*",
        3: "name",
        4: "op_type",
        5: "attribute*",
        6: "doc_string",
        7: "domain",
        9: "metadata_props*",
    },
    "AttributeProto": {
        1: "name",
        2: "f",
        3: "i",
        4: "s",
        5: "t",
        7: "floats*",
        8: "ints*",
        9: "strings*",
        13: "doc_string",
        20: "type",
    },
    "ValueInfoProto": {1: "name", 2: "type", 3: "doc_string", 4: "metadata_props*"},
    "TensorProto": {
        1: "dims*",
        2: "data_type",
        4: "float_data*",
        5: "int32_data*",
        7: "int64_data*",
        8: "name",
        9: "raw_data",
        12: "doc_string",
        16: "metadata_props*",
    },
}
#: Those that it never writes, for the message.
_REFUSED: Mapping[str, Mapping[int, str]] = {
    "ModelProto": {20: "training_info", 25: "functions", 26: "configuration"},
    "GraphProto": {14: "quantization_annotation", 15: "sparse_initializer"},
    "ValueInfoProto": {},
    "NodeProto": {8: "overload", 10: "device_configurations"},
    "AttributeProto": {
        6: "a subgraph (g)",
        10: "tensors",
        11: "subgraphs (graphs)",
        14: "tp",
        15: "type_protos",
        21: "ref_attr_name",
        22: "sparse_tensor",
        23: "sparse_tensors",
    },
    "TensorProto": {
        3: "segment",
        6: "string_data",
        10: "double_data",
        11: "uint64_data",
        13: "external_data",
        14: "data_location",
    },
}
#: TensorProto.DataType -> bits of a value, and its type in numpy.
_TYPES: Mapping[int, tuple[int, str | None]] = {
    1: (32, "<f4"),
    2: (8, "u1"),
    3: (8, "i1"),
    4: (16, "<u2"),
    5: (16, "<i2"),
    6: (32, "<i4"),
    7: (64, "<i8"),
    9: (8, "?"),
    10: (16, "<f2"),
    11: (64, "<f8"),
    12: (32, "<u4"),
    13: (64, "<u8"),
    16: (16, None),  # bfloat16
    21: (4, None),  # uint4
    22: (4, None),  # int4
}

_Value = int | memoryview
_Message = dict[str, list[_Value]]


def onnx_content(file: memoryview) -> GraphContent:
    """Return the nodes and constants of an ONNX file.

    Raises:
        UnsafeGraph: when it is malformed, or holds what m2dexport never writes.
    """
    graph = _message(_one(_message(file, "ModelProto"), "graph"), "GraphProto")
    stored = [_message(each, "TensorProto") for each in _each(graph, "initializer")]
    values = sum(len(raw) for tensor in stored for raw in _each(tensor, "raw_data"))
    if len(file) - values > _MOST_BYTES:
        raise UnsafeGraph(f"it holds over {_MOST_BYTES:,} bytes beside its constants")
    constants: dict[str, Constant] = {}
    for tensor in stored:
        name = _text(tensor, "name")
        if name in constants:
            raise UnsafeGraph(f"the constant {shown(name)} is there twice")
        constants[name] = _constant(tensor, name)
    for each in ("input", "output", "value_info"):
        for value in _each(graph, each):
            _message(value, "ValueInfoProto")
    return GraphContent(tuple(_node(each) for each in _each(graph, "node")), constants)


def _node(data: memoryview) -> Node:
    message = _message(data, "NodeProto")
    numbers = {}
    for attribute in _each(message, "attribute"):
        content = _message(attribute, "AttributeProto")
        for tensor in _each(content, "t"):
            _constant(_message(tensor, "TensorProto"), "of an attribute")
        (number,) = content.get("i", [None])
        if isinstance(number, int):
            numbers[_text(content, "name")] = number - (1 << 64 if number >> 63 else 0)
    operator, domain = _text(message, "op_type"), _text(message, "domain")
    return Node(
        operator if domain in ("", "ai.onnx") else f"{domain}.{operator}",
        tuple(_decoded(each) for each in _each(message, "input")),
        tuple(_decoded(each) for each in _each(message, "output")),
        numbers.get("axis"),
        numbers.get("keepdims", 1) == 1,
    )


def _constant(tensor: _Message, name: str) -> Constant:
    shape = _numbers(tensor, "dims")
    (kind,) = tensor.get("data_type", [0])
    if not isinstance(kind, int) or kind not in _TYPES:
        raise UnsafeGraph(f"the constant {shown(name)} has the data type {shown(kind)}")
    bits, dtype = _TYPES[kind]
    stored = [field for field in _DATA if field in tensor]
    if len(stored) > 1:
        raise UnsafeGraph(f"the constant {shown(name)} has its values twice")
    data = _data(tensor, stored[0], bits) if stored else memoryview(b"")
    require_size(tuple(shape), bits, len(data), name)
    return Constant(tuple(shape), np.dtype(dtype) if dtype else None, data)


def _data(tensor: _Message, field: str, bits: int) -> memoryview:
    """Return the values of a tensor as raw_data would hold them."""
    if field == "raw_data":
        return _one(tensor, field)
    if field == "float_data":
        return memoryview(b"".join(_each(tensor, field)))
    width = max(1, bits // 8)
    mask = (1 << 8 * width) - 1
    numbers = _numbers(tensor, field)
    return memoryview(b"".join((number & mask).to_bytes(width, "little") for number in numbers))


def _numbers(message: _Message, name: str) -> list[int]:
    """Return repeated numbers, which are stored one after another or packed."""
    numbers: list[int] = []
    for value in message.get(name, ()):
        numbers += [value] if isinstance(value, int) else _varints(value)
    return numbers


def _message(data: memoryview, kind: str) -> _Message:
    """Return the fields of a message by name, with their values in order."""
    known, found = _FIELDS[kind], _Message()
    for number, value in _fields(data):
        name = known.get(number)
        if name is None:
            refused = _REFUSED[kind].get(number, f"field {number}")
            raise UnsafeGraph(f"it holds {refused} of {kind}, which m2dexport never writes")
        if name[-1] == "*":
            found.setdefault(name[:-1], []).append(value)
            continue
        if name in found:
            raise UnsafeGraph(f"{name} of {kind} is there twice")
        found[name] = [value]
        if name in _TEXTS and isinstance(value, memoryview):
            _decoded(value)
    return found


def _fields(data: memoryview) -> Iterator[tuple[int, _Value]]:
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, wire = tag >> 3, tag & 7
        if wire == _VARINT:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire == _BYTES:
            size, at = _varint(data, at)
        elif wire in (_FIXED32, _FIXED64):
            size = 4 if wire == _FIXED32 else 8
        else:
            raise UnsafeGraph("it is not an ONNX file, or damaged")
        if size > len(data) - at:
            raise UnsafeGraph("it is not an ONNX file, or its end is missing")
        yield number, data[at : at + size]
        at += size


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """Return the number that begins at ``at``, and where the next thing begins."""
    value = shift = 0
    while at < len(data) and shift < 64:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
    raise UnsafeGraph("it is not an ONNX file, or damaged")


def _varints(data: memoryview) -> list[int]:
    values, at = [], 0
    while at < len(data):
        value, at = _varint(data, at)
        values.append(value)
    return values


def _each(message: _Message, name: str) -> Iterator[memoryview]:
    for value in message.get(name, ()):
        if not isinstance(value, memoryview):
            raise UnsafeGraph(f"{name} is malformed")
        yield value


def _one(message: _Message, name: str) -> memoryview:
    for value in _each(message, name):
        return value
    raise UnsafeGraph(f"it has no {name}")


def _text(message: _Message, name: str) -> str:
    for value in _each(message, name):
        return _decoded(value)
    return ""


def _decoded(value: memoryview) -> str:
    if len(value) > _MOST_NAME:
        raise UnsafeGraph(f"it holds a name of {len(value):,} bytes")
    try:
        return str(value, "utf-8")
    except UnicodeDecodeError as error:
        raise UnsafeGraph("it holds a name that is not UTF-8") from error
