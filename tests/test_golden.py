"""The formats, pinned: what an artifact says of itself, and the graph that a checkpoint becomes."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import transformers
from tiny import tiny_checkpoint

from m2dexport.build.recipe import Recipe

GOLDEN = Path(__file__).parent / "golden"
COMMAND = "WRITE_GOLDEN=1 python -m pytest -n 0 tests/test_golden.py"
#: Constants of so many values at most are shown, and larger ones named.
FEW = 4


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of one layer; read only."""
    folder = tmp_path_factory.mktemp("one_layer") / "m"
    return tiny_checkpoint(folder, config={"num_hidden_layers": 1}, prompts={"query": "find: "})


def require_golden(name: str, text: str) -> None:
    path = GOLDEN / name
    if os.environ.get("WRITE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    expected = path.read_text(encoding="utf-8")
    assert text == expected, f"{name} has changed; if that is meant, run: {COMMAND}"


def masked(stored: dict[str, Any]) -> dict[str, Any]:
    """Put words in the place of hashes, versions and measurements, which differ by machine."""
    measured = dict.fromkeys(stored["parity"], "<measured>")
    versions = {
        name: "<sha256>" if re.fullmatch("[0-9a-f]{64}", value) else "<version>"
        for name, value in stored["provenance"].items()
    }
    hashes = {
        name: f"<{len(value)} characters>"
        for name, value in stored.items()
        if isinstance(value, str) and re.search("[0-9a-f]{16}", value)
    }
    rates = {"clipping_rate": "<measured>"}
    return {**stored, **hashes, **rates, "parity": measured, "provenance": versions}


def test_artifact_json_is_as_it_was(one_layer, artifact) -> None:
    folder = artifact(one_layer, 1, 20, Recipe(vectors="int8")).path
    stored = json.loads((folder / "artifact.json").read_text(encoding="utf-8"))
    assert 0 <= stored["clipping_rate"] < 0.1
    require_golden("artifact.json", json.dumps(masked(stored), indent=2, sort_keys=True) + "\n")


@pytest.mark.skipif(
    transformers.__version__ < "5", reason="transformers 4.57 fixes the attention of its encoders"
)
def test_the_fused_graph_of_a_bert_is_as_it_was(one_layer, original) -> None:
    require_golden("bert-fused.txt", listing(original(one_layer, 1, 20).graph))


def listing(model: ir.Model) -> str:
    """Return a graph as text: a line for each node, in order, then the constants it names.

    Values are numbered, and dimensions that vary are underscores: their own names vary, too.
    """
    names: dict[ir.Value, str] = {value: str(value.name) for value in model.graph.inputs}
    lines, constants = [], {}
    for node in model.graph:
        for value in node.inputs:
            if value is not None and value.const_value is not None:
                names[value] = shown(value)
                if value.const_value.size > FEW:
                    constants[names[value]] = type_of(value)
        for value in node.outputs:
            last = value in model.graph.outputs
            names.setdefault(value, str(value.name) if last else f"%{len(lines)}")
        inputs = ", ".join("" if value is None else names[value] for value in node.inputs)
        attributes = "".join(
            f" {name}={plain(attribute.value)}"
            for name, attribute in sorted(node.attributes.items())
        )
        outputs = ", ".join(f"{names[value]} {type_of(value)}" for value in node.outputs)
        operator = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
        lines.append(f"{outputs} = {operator}({inputs}){attributes}")
    lines += ["", *(f"{name} {kind}" for name, kind in sorted(constants.items()))]
    return "\n".join(lines) + "\n"


def shown(value: ir.Value) -> str:
    """Return a constant's values where they are few, else its name."""
    tensor = value.const_value
    if tensor is None or tensor.size > FEW:
        return str(value.name)
    values = ", ".join(f"{number:.4g}" for number in tensor.numpy().flat)
    return f"[{values}]" if tensor.shape else values


def plain(value: Any) -> Any:
    """Return an attribute's value, of a number the digits that a file keeps."""
    return f"{value:.7g}" if isinstance(value, float) else value


def type_of(value: ir.Value) -> str:
    dims = [str(d) if isinstance(d, int) else "_" for d in value.shape or ()]
    kind = value.dtype.name.lower() if value.dtype is not None else "?"
    return f"{kind}[{', '.join(dims)}]"
