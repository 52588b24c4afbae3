"""Graph guard: what a graph may hold, and that no engine sees another one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper
from tiny_artifact import GRAPH, VOCABULARY, relisted, tiny_artifact, tiny_graph, tiny_ranges

from m2dexport.errors import M2DError
from m2dexport.runtime import onnx_content
from m2dexport.runtime.graph_guard import examine_graph, ranges_of, table_rows
from m2dexport.runtime.loading import load

SOUND = tiny_graph(12, "int8", tiny_ranges(12))
XML = """<?xml version="1.0"?>
<net name="m2dexport" version="11"><layers>
<layer id="0" name="input_ids" type="Parameter"><data shape="?,?" element_type="i64"/></layer>
<layer id="1" name="table" type="Const">
<data element_type="f32" shape="4,2" offset="0" size="32"/></layer>
<layer id="2" name="axis" type="Const">
<data element_type="i64" shape="" offset="32" size="8"/></layer>
<layer id="3" name="states" type="Gather"><data batch_dims="0"/></layer>
</layers><edges>
<edge from-layer="1" from-port="0" to-layer="3" to-port="0"/>
<edge from-layer="0" from-port="0" to-layer="3" to-port="1"/>
<edge from-layer="2" from-port="0" to-layer="3" to-port="2"/>
</edges></net>"""
BIN = bytes(40)


def refused(content: bytes) -> str:
    with pytest.raises(M2DError, match=r"model\.onnx cannot be read or run: ") as caught:
        examine_graph("onnx", [content])
    message = str(caught.value)
    assert len(message) < 300
    assert "\n" not in message
    return message


def test_a_sound_graph_gives_its_table_and_its_ranges(tmp_path: Path) -> None:
    (tmp_path / GRAPH).write_bytes(SOUND)
    for file in (SOUND, tmp_path / GRAPH):
        content = examine_graph("onnx", [file])
        assert table_rows(content) == len(VOCABULARY)
        found = ranges_of(content)
        np.testing.assert_array_equal(found["range_low"], tiny_ranges(12).low)
        np.testing.assert_array_equal(found["range_step"], tiny_ranges(12).step("int8"))


def test_field_numbers_are_those_of_onnx() -> None:
    for tables in (onnx_content._FIELDS, onnx_content._REFUSED):
        for message, known in tables.items():
            fields = getattr(onnx, message).DESCRIPTOR.fields_by_number
            for number, name in known.items():
                if number in fields:  # an older onnx lacks the latest
                    assert fields[number].name in name
                    assert name.endswith("*") == (
                        tables is onnx_content._FIELDS and repeated(fields[number])
                    )
    for number, (bits, dtype) in onnx_content._TYPES.items():
        expected = helper.tensor_dtype_to_np_dtype(number)
        assert dtype is None or np.dtype(dtype) == expected
        assert bits in (4, 8 * expected.itemsize)


def repeated(field: object) -> bool:
    # The second way is that of protobuf before 5.
    return field.is_repeated if hasattr(field, "is_repeated") else field.label == 3  # type: ignore[attr-defined]


def test_values_are_read_however_they_are_stored() -> None:
    stored = {
        "f": helper.make_tensor("f", TensorProto.FLOAT, [3], [0.5, -1, 7]),
        "i": helper.make_tensor("i", TensorProto.INT64, [3], [1, -1, 2**62]),
        "b": helper.make_tensor("b", TensorProto.INT8, [2, 2], [1, -1, 127, -128]),
        "h": helper.make_tensor("h", TensorProto.FLOAT16, [2], [0.5, -2]),
        "r": numpy_helper.from_array(np.arange(6, dtype=np.int32).reshape(2, 3), "r"),
    }
    graph = onnx.load_from_string(SOUND)
    graph.graph.initializer.extend(stored.values())
    content = examine_graph("onnx", [graph.SerializeToString()])
    for name, tensor in stored.items():
        expected = numpy_helper.to_array(tensor)
        found = content.constants[name]
        np.testing.assert_array_equal(found.values().reshape(found.shape), expected)  # type: ignore[union-attr]


def external(graph: ModelProto) -> None:
    tensor = graph.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")


def loop(graph: ModelProto) -> None:
    count = numpy_helper.from_array(np.array(2**62), "trips")
    go = numpy_helper.from_array(np.array(True), "go")
    same = helper.make_node("Identity", ["go_in"], ["go_out"])
    body = helper.make_graph(
        [same],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go_in", TensorProto.BOOL, []),
        ],
        [helper.make_tensor_value_info("go_out", TensorProto.BOOL, [])],
    )
    graph.graph.initializer.extend([count, go])
    graph.graph.node.insert(0, helper.make_node("Loop", ["trips", "go"], [], body=body))


def function(graph: ModelProto) -> None:
    node = helper.make_node("Identity", ["x"], ["y"])
    graph.functions.append(helper.make_function("d", "f", ["x"], ["y"], [node], []))


def sparse(graph: ModelProto) -> None:
    graph.graph.sparse_initializer.add().dims.append(2**40)


def huge(graph: ModelProto) -> None:
    graph.graph.initializer.append(numpy_helper.from_array(np.array([1_200_000_000]), "shape"))
    graph.graph.node.insert(0, helper.make_node("ConstantOfShape", ["shape"], ["zeros"]))


def expanded(graph: ModelProto) -> None:
    for name, value in (("shape", [30_000, 40_000]), ("one", [1])):
        graph.graph.initializer.append(numpy_helper.from_array(np.array(value), name))
    graph.graph.node.insert(0, helper.make_node("Expand", ["one", "shape"], ["many"]))


def computed(graph: ModelProto) -> None:
    for name, value in (("some", [30_000]), ("one", [1])):
        graph.graph.initializer.append(numpy_helper.from_array(np.array(value), name))
    graph.graph.node.insert(0, helper.make_node("Mul", ["some", "some"], ["shape"]))
    graph.graph.node.insert(1, helper.make_node("Expand", ["one", "shape"], ["many"]))


def constants(graph: ModelProto, nodes: str, **values: Any) -> None:
    """Put nodes, written as ``Tile many = one shape``, in front of a graph."""
    for name, value in values.items():
        graph.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    for number, node in enumerate(nodes.split("; ")):
        operator, made, _, *inputs = node.split()
        attributes = {"equation": "i,j->ij"} if operator == "Einsum" else {}
        graph.graph.node.insert(number, helper.make_node(operator, inputs, [made], **attributes))


LONG = np.zeros(1 << 18, np.float32)
ROW, COLUMN = LONG.reshape(1, -1), LONG.reshape(-1, 1)
IDS = np.zeros(1 << 18, np.int64)
#: Nodes that ask for more than a graph may have, and the constants that they are made from.
LARGE: list[tuple[str, dict[str, Any]]] = [
    ("Tile some = one n; Tile many = some n", {"one": [1.0], "n": [1 << 18]}),
    ("Add many = row column", {"row": ROW, "column": COLUMN}),
    ("Cast same = row; Where many = same column column", {"row": ROW, "column": COLUMN}),
    ("MatMul many = column row", {"row": ROW, "column": COLUMN}),
    ("Einsum many = long long", {"long": LONG}),
    ("Gather many = row ids", {"row": ROW, "ids": IDS}),
    ("OneHot many = ids depth values", {"ids": IDS, "depth": 1 << 18, "values": [0, 1]}),
    ("Gather n = sizes ids; ConstantOfShape many = n", {"sizes": [1 << 9], "ids": [0] * 4}),
    ("ConstantOfShape n = one; ConstantOfShape many = n", {"one": [1]}),
    ("Add n = one one; Add m = n n; ConstantOfShape many = m", {"one": [1]}),
    ("Reshape none = empty n; ReduceSum many = none axis",
     {"empty": np.zeros(0), "n": [0, 1 << 40], "axis": [0]}),
    ("; ".join(f"Expand many{number} = one n" for number in range(6)),
     {"one": [1.0], "n": [1 << 26]}),
]  # fmt: skip


@pytest.mark.parametrize(("nodes", "values"), LARGE, ids=[nodes[:40] for nodes, _ in LARGE])
def test_what_constants_alone_make_large_is_refused(nodes: str, values: dict[str, Any]) -> None:
    graph = onnx.load_from_string(tiny_graph(12, "float32", None))
    constants(graph, nodes, **values)
    assert "constants make its " in refused(graph.SerializeToString())


def test_constants_may_be_dequantized_reshaped_and_put_together() -> None:
    graph = onnx.load_from_string(tiny_graph(12, "float32", None))
    large = np.zeros((1 << 14, 1 << 10), np.int8)  # as many values, squared, as are refused
    constants(
        graph,
        "DequantizeLinear a = large scale; Mul b = a scales; Transpose c = b; Reshape d = c shape; "
        "Gather e = a ids; Concat f = half half; ConstantOfShape g = f; Slice h = shape low high; "
        "Expand i = scale h; Unsqueeze k = a first; MatMul l = k square; Add m = l ones; "
        "Reshape o = large flat; MatMulInteger p = large bytes; Cast q = p; Add r = q ones",
        large=large,
        scale=np.float32(1),
        scales=np.ones((1 << 14, 1), np.float32),
        shape=[1 << 10, 1 << 14],
        ids=np.arange(512),
        half=[1 << 10],
        first=[0],
        square=np.ones((1 << 10, 1 << 10), np.float32),
        ones=np.ones(1 << 10, np.float32),
        flat=[-1],
        bytes=np.zeros((1 << 10, 1 << 10), np.int8),
        low=[0],
        high=[2**63 - 1],
    )
    assert examine_graph("onnx", [graph.SerializeToString()]).nodes[0].operator


def test_nodes_that_are_not_in_order_are_refused() -> None:
    graph = onnx.load_from_string(tiny_graph(12, "float32", None))
    constants(graph, "Identity b = a; Tile a = one n", one=[1.0], n=[1 << 10])
    assert "not in the order in which they run" in refused(graph.SerializeToString())
    graph = onnx.load_from_string(tiny_graph(12, "float32", None))
    constants(graph, "Identity a = one; Identity a = one", one=[1.0])
    assert "not in the order in which they run" in refused(graph.SerializeToString())


def short(graph: ModelProto) -> None:
    graph.graph.initializer[0].dims[0] = 2**30


def twice(graph: ModelProto) -> None:
    graph.graph.initializer.append(graph.graph.initializer[0])


def contrib(graph: ModelProto) -> None:
    graph.graph.node[0].domain = "evil.example"


def random_numbers(graph: ModelProto) -> None:
    graph.graph.node[0].op_type = "RandomNormalLike"


def long_name(graph: ModelProto) -> None:
    graph.graph.node[0].op_type = "x" * 100_000


def long_operator(graph: ModelProto) -> None:
    graph.graph.node[0].op_type = "x" * 1000


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (external, "external_data of TensorProto"),
        (loop, r"a subgraph \(g\) of AttributeProto"),
        (function, "functions of ModelProto"),
        (sparse, "sparse_initializer of GraphProto"),
        (huge, "constants make its ConstantOfShape larger"),
        (expanded, "constants make its Expand larger"),
        (computed, "constants make its Expand larger"),
        (short, "needs .* bytes and stores"),
        (twice, "is there twice"),
        (contrib, r"operator 'evil\.example\.Gather'"),
        (random_numbers, "operator 'RandomNormalLike', which is not allowed"),
        (long_name, "a name of 100,000 bytes"),
        (long_operator, "operator 'xxx"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_an_engine_must_not_see_is_refused(
    tmp_path: Path, change: Callable[[ModelProto], None], told: str
) -> None:
    graph = onnx.load_from_string(tiny_graph(12, "float32", None))
    change(graph)
    content = graph.SerializeToString()
    refused(content)
    folder = tiny_artifact(tmp_path / "artifact")
    (folder / GRAPH).write_bytes(content)
    with pytest.raises(M2DError, match=told):
        load(relisted(folder))


def test_damaged_graphs_are_one_sentence() -> None:
    for content in (b"", b"{}", b"\xff" * 100, SOUND[:-7], SOUND[: len(SOUND) // 2]):
        refused(content)
    assert "graph of ModelProto is there twice" in refused(SOUND + doubled())


def doubled() -> bytes:
    """A second graph field: protobuf merges it into the first, other readers take the last."""
    graph = ModelProto()
    graph.graph.name = "second"
    return graph.SerializeToString()


def test_an_ir_gives_its_table() -> None:
    assert table_rows(examine_graph("openvino", [XML.encode(), BIN])) == 4


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('offset="0"', 'offset="10"', "lies outside model.bin"),
        ('size="32"', 'size="33"', "needs 32 bytes and stores 33"),
        ('offset="0"', 'offset="-1"', "where a whole number is needed"),
        ('shape="4,2"', 'shape="9999999999,2"', "needs 79,999,999,992 bytes"),
        ('type="Gather"', 'type="TensorIterator"', "operator 'TensorIterator'"),
        ('type="Gather"', 'type="ReadValue"', "operator 'ReadValue'"),
        ('<data batch_dims="0"/>', '<body><layers><layer id="0"/></layers></body>', "a subgraph"),
        ("<net", '<!DOCTYPE net [<!ENTITY a "b">]><net', "declares a document type or entities"),
        ('version="1.0"?', 'version="1.0" encoding="utf-16"?', "not UTF-8"),
        ("</net>", "", "is not XML"),
        ('id="2"', 'id="1"', "two of its layers have the id '1'"),
        ('element_type="f32"', 'element_type="string"', "the type 'string'"),
    ],
)
def test_an_ir_that_reads_or_runs_something_else_is_refused(old: str, new: str, told: str) -> None:
    assert old in XML
    with pytest.raises(M2DError, match=told) as caught:
        examine_graph("openvino", [XML.replace(old, new, 1).encode(), BIN])
    assert "model.xml cannot be read or run" in str(caught.value)
