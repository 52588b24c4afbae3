"""The pooled vector of a graph that puts out codes: what its codec is given.

A graph's files are changed so that they put it out, too, without the packages that made them: a
device may bundle. ``graph.vector`` names the value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from m2dexport.engines import ENGINES, Device, engine_runner
from m2dexport.runtime.artifact import ArtifactSpec

#: From int64 (batch, sequence) ids and mask to float32 (batch, dim), normalised.
Run = Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[Any]]

_NAME = "float_embedding"
#: A TypeProto: tensor_type { elem_type: FLOAT }.
_FLOAT = b"\x0a\x02\x08\x01"
_NAME_FIELD, _TYPE_FIELD, _GRAPH_FIELD, _OUTPUT_FIELD = 1, 2, 7, 12


def pooled_run(spec: ArtifactSpec, files: Mapping[str, bytes], device: Device) -> Run | None:
    """Return what runs a graph up to its codec.

    Args:
        spec: of the artifact, whose vectors are codes.
        files: of its graph, which was examined.
        device: what to run it on.

    Returns:
        None where the graph does not name the vector: build made none such.
    """
    engine, runner = ENGINES[spec.engine], engine_runner(spec.engine)
    graph = {name: files[name] for name in engine.files}
    first = engine.files[0]
    if engine.encodes:
        put_out = _ir_with_pooled if engine.format == "ir" else _onnx_with_pooled
        changed = put_out(graph[first])
        if changed is None:
            return None
        graph[first] = changed
    session = runner.load(graph, device, spec.isa)

    def run(input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64]) -> NDArray[Any]:
        pooled: NDArray[Any] = runner.run(session, input_ids, attention_mask)[-1]
        return pooled

    return run


def _onnx_with_pooled(model: bytes) -> bytes | None:
    """Return an ONNX file with one more output: readers merge what is appended to a message."""
    name = _NAME.encode()
    if name not in model:
        return None
    value = _field(_NAME_FIELD, name) + _field(_TYPE_FIELD, _FLOAT)
    return model + _field(_GRAPH_FIELD, _field(_OUTPUT_FIELD, value))


def _field(number: int, content: bytes) -> bytes:
    """Return a field of a protobuf message, which holds fewer than 128 bytes."""
    return bytes([number << 3 | 2, len(content)]) + content


def _ir_with_pooled(xml: bytes) -> bytes | None:
    """Return an OpenVINO IR with one more result."""
    root = ElementTree.fromstring(xml)
    layers, edges = root.find("layers"), root.find("edges")
    assert layers is not None and edges is not None
    port = f"./output/port[@names='{_NAME}']"
    source = next((layer for layer in layers if layer.find(port) is not None), None)
    if source is None:
        return None
    number, output = str(len(layers)), source.find(port)
    assert output is not None
    result = {"id": number, "name": "pooled", "type": "Result", "version": "opset1"}
    inputs = ElementTree.SubElement(ElementTree.SubElement(layers, "layer", result), "input")
    inputs.append(ElementTree.Element("port", {"id": "0", "precision": "FP32"}))
    inputs[0].extend(output)
    edge = {"from-layer": source.get("id", ""), "from-port": output.get("id", "")}
    ElementTree.SubElement(edges, "edge", {**edge, "to-layer": number, "to-port": "0"})
    return ElementTree.tostring(root)
