"""An OpenVINO IR, read without openvino: model.xml, and the constants in model.bin.

The format is described in
https://docs.openvino.ai/2026/documentation/openvino-ir-format.html.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from xml.etree import ElementTree

import numpy as np

from m2dexport.runtime.graph_content import (
    Constant,
    GraphContent,
    Node,
    UnsafeGraph,
    require_size,
)
from m2dexport.strict import shown

_MOST_BYTES = 1 << 26  # of model.xml
#: Element type -> bits of a value, and its type in numpy.
_TYPES: Mapping[str, tuple[int, str | None]] = {
    "f32": (32, "<f4"),
    "f64": (64, "<f8"),
    "f16": (16, "<f2"),
    "bf16": (16, None),
    "i64": (64, "<i8"),
    "i32": (32, "<i4"),
    "i16": (16, "<i2"),
    "i8": (8, "i1"),
    "u64": (64, "<u8"),
    "u32": (32, "<u4"),
    "u16": (16, "<u2"),
    "u8": (8, "u1"),
    "u4": (4, None),
    "i4": (4, None),
    "boolean": (8, "?"),
}


def openvino_content(xml: memoryview, weights: memoryview) -> GraphContent:
    """Return the nodes and constants of an IR; a value is named after its layer.

    Raises:
        UnsafeGraph: when it is malformed, declares entities, or a constant lies outside model.bin.
    """
    if len(xml) > _MOST_BYTES:
        raise UnsafeGraph(f"it has more than {_MOST_BYTES:,} bytes")
    text = bytes(xml)
    encoding = re.match(rb"""<\?xml[^>]*encoding\s*=\s*["']([^"']*)""", text)
    if b"\0" in text or (encoding and encoding[1].lower() != b"utf-8"):
        raise UnsafeGraph("it is not UTF-8")
    if b"<!" in text.replace(b"<!--", b""):
        raise UnsafeGraph("it declares a document type or entities")
    try:
        root = ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise UnsafeGraph(f"it is not XML: {error}") from error
    layers = root.findall("./layers/layer")
    if len(layers) != len(list(root.iter("layer"))):
        raise UnsafeGraph("it holds a subgraph")
    names = _names(layers)
    inputs: dict[str, list[tuple[int, str]]] = {}
    for edge in root.findall("./edges/edge"):
        source = names.get(edge.get("from-layer", ""), "")
        port = _number(edge.get("to-port"))
        inputs.setdefault(edge.get("to-layer", ""), []).append((port, source))
    constants, nodes = {}, []
    for layer, (number, name) in zip(layers, names.items(), strict=True):
        kind = layer.get("type", "")
        if kind == "Const":
            constants[name] = _constant(layer, weights)
        elif kind not in ("Parameter", "Result"):
            sources = tuple(source for _, source in sorted(inputs.get(number, ())))
            nodes.append(_node(layer, sources, name))
    return GraphContent(tuple(nodes), constants)


def _names(layers: Sequence[ElementTree.Element]) -> dict[str, str]:
    """Return the name of each layer by its id, in order; a second one of a name gets its id."""
    names: dict[str, str] = {}
    taken: set[str] = set()
    for layer in layers:
        number, name = layer.get("id", ""), layer.get("name", "")
        if number in names:
            raise UnsafeGraph(f"two of its layers have the id {shown(number)}")
        names[number] = f"{name}#{number}" if name in taken else name
        taken.add(name)
    return names


def _constant(layer: ElementTree.Element, weights: memoryview) -> Constant:
    name = layer.get("name", "")
    data = layer.find("data")
    kind = None if data is None else data.get("element_type")
    if data is None or kind is None or kind not in _TYPES:
        raise UnsafeGraph(f"the constant {shown(name)} has the type {shown(kind)}")
    offset, size = _number(data.get("offset")), _number(data.get("size"))
    shape = tuple(_number(part) for part in data.get("shape", "").split(",") if part.strip())
    if offset + size > len(weights):
        raise UnsafeGraph(f"the constant {shown(name)} lies outside model.bin")
    bits, dtype = _TYPES[kind]
    require_size(shape, bits, size, name)
    return Constant(shape, np.dtype(dtype) if dtype else None, weights[offset : offset + size])


def _node(layer: ElementTree.Element, inputs: tuple[str, ...], name: str) -> Node:
    data = layer.find("data")
    found = {} if data is None else data.attrib
    axis = found.get("axis", "")
    # As OpenVINO reads a boolean: in any case, and as a number.
    keeps, first, second = (
        found.get(key, "").strip().lower() in ("true", "1")
        for key in ("keep_dims", "transpose_a", "transpose_b")
    )
    return Node(
        layer.get("type", ""),
        inputs,
        (name,),
        int(axis) if re.fullmatch(r"-?\d{1,15}", axis, re.ASCII) else None,
        keeps,
        (first, second),
    )


def _number(text: str | None) -> int:
    if text is None or not re.fullmatch(r"\s*\d{1,15}\s*", text, re.ASCII):
        raise UnsafeGraph(f"it holds {shown(text)} where a whole number is needed")
    return int(text)
