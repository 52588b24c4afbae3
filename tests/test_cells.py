"""Cells: joined from what was measured, compared with the reference, and failed with a reason."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from onnx_ir.tape import Tape
from tiny import small_checkpoint
from tiny_profile import made_up

from m2dexport.checkpoint.open import open_checkpoint
from m2dexport.cli.cell_tables import View, print_cells
from m2dexport.data import calibration_texts
from m2dexport.engines import Device, engine_runner
from m2dexport.engines.onnxruntime import make
from m2dexport.errors import M2DError, ParityError, UsageError
from m2dexport.graph.edit import constant
from m2dexport.profile.cells import Graph, failures_of, join_cells
from m2dexport.profile.plan import Plan, within_length
from m2dexport.profile.schema import Profile
from m2dexport.profile.sweep import profile_checkpoint
from m2dexport.quantize.recipes import Requirement
from m2dexport.vectors.pairs import StsTask

TEXTS = calibration_texts()[:120]
TASK = StsTask("sts", TEXTS[:8], TEXTS[8:16], tuple(range(8)), "")
PLAN = Plan(
    layers=(1, 2),
    dims=(64,),
    weights=("fp32", "int4-weight-only"),
    vectors=("float32", "int8"),
    shapes=((1, 8),),
    repeats=3,
    align=("none",),
)
HALF = replace(PLAN, weights=("fp32", "fp16"), vectors=("float32",))
UNREACHABLE = Requirement("1.17", floor=1.1)

pytestmark = pytest.mark.usefixtures("unmeasured_memory")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_checkpoint(tmp_path_factory.mktemp("cells") / "bert", "bert")


@pytest.fixture(scope="module")
def profile(bert: Path) -> Profile:
    """A profile in which no depth reaches what int4 must."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(make.PRECISIONS, "int4-weight-only", UNREACHABLE)
        return profile_checkpoint(open_checkpoint(bert), [TASK], TEXTS, PLAN)


def test_a_precision_that_misses_its_gate_is_recorded_and_the_rest_is_measured(profile) -> None:
    assert {cell.weights for cell in profile.cells} == {"fp32"}
    assert len(profile.cells) == 4
    assert [(f.layers, f.weights) for f in profile.failures] == [
        (1, "int4-weight-only"),
        (2, "int4-weight-only"),
    ]
    assert all("where 1.1 is needed" in failure.reason for failure in profile.failures)
    assert profile.failures[0].cells == (
        "1x64-int4-weight-only-float32",
        "1x64-int4-weight-only-int8",
    )


def test_a_failed_cell_is_shown_and_asking_for_it_says_why(profile, capsys) -> None:
    print_cells(profile, View())
    assert "Failed, 2 cells: depth 1 in int4-weight-only has" in capsys.readouterr().out
    with pytest.raises(UsageError, match="1x64-int4-weight-only-int8 failed when measured: depth"):
        profile.cell("1x64-int4-weight-only-int8")


def test_a_reference_that_fails_is_an_error(bert: Path, monkeypatch) -> None:
    monkeypatch.setitem(make.PRECISIONS, "fp32", UNREACHABLE)
    with pytest.raises(ParityError, match="the reference cell 2x64-fp32-float32 failed: depth 2"):
        profile_checkpoint(open_checkpoint(bert), [TASK], TEXTS, PLAN)


def test_retention_is_null_where_the_reference_has_no_quality() -> None:
    plan = Plan((1,), (32,), ("fp32",), ("float32",), ((1, 8),), device=Device(threads=1))
    measured = made_up({"1x32-fp32-float32": (0.0, 1.0)})
    (cell,) = join_cells(measured, plan, [TASK], None)
    assert cell.mean_quality == 0
    assert cell.retention is None


def test_a_failure_names_the_cells_that_it_would_have_been() -> None:
    measured = made_up(
        {},
        failures={Graph(0, "fp32", "full", 32): "a", Graph(1, "fp32", "full"): "b"},
        unaligned={(2, 64): "c"},
    )
    plan = Plan((0, 1, 2, 3), (32, 64), ("fp32", "int8"), ("ubinary",), target="edge")
    assert {f.target for f in failures_of(measured, plan)} == {"edge"}
    assert [(f.reason, *f.cells) for f in failures_of(measured, plan)] == [
        ("a", "0x32-aligned-fp32-ubinary"),
        ("b", "1x32-aligned-fp32-ubinary", "1x64-aligned-fp32-ubinary"),
        ("c", "2x64-aligned-fp32-ubinary"),
        ("c", "2x64-aligned-int8-ubinary"),
    ]


def test_a_depth_of_nan_fails_and_the_others_are_measured(bert: Path, monkeypatch) -> None:
    """As of half weights that overflow in one layer only: the sums above it are not numbers."""
    spoiled = make.quantize

    def quantize(model, weights, *arguments):
        graph = spoiled(model, weights, *arguments)
        if weights == "fp16":
            output = graph.graph.outputs[0]
            zero = constant(graph.graph, "spoil", np.array(np.nan, dtype=np.float32))
            tape = Tape(graph.graph)
            result = tape.op("Add", [output, zero])
            result.name, result.shape, result.type = output.name, output.shape, output.type
            output.name = "sound"
            graph.graph.outputs[0] = result
        return graph

    monkeypatch.setattr(make, "quantize", quantize)
    found = profile_checkpoint(open_checkpoint(bert), [TASK], TEXTS, HALF)
    assert [(f.layers, f.weights) for f in found.failures] == [(1, "fp16")]
    assert "NaN or infinite" in found.failures[0].reason
    assert {cell.id for cell in found.cells} == {
        "1x64-fp32-float32",
        "2x64-fp32-float32",
        "2x64-fp16-float32",
    }


def test_a_graph_that_does_not_load_for_timing_fails_alone(bert: Path, monkeypatch) -> None:
    load = engine_runner("onnx").load

    def refuse(files, device, isa):
        if any("2-none-fp16" in str(path) for path in files.values() if isinstance(path, Path)):
            raise M2DError("no memory")
        return load(files, device, isa)

    monkeypatch.setattr(engine_runner("onnx"), "load", refuse)
    found = profile_checkpoint(open_checkpoint(bert), [TASK], TEXTS, HALF)
    assert [(f.layers, f.weights, f.reason) for f in found.failures] == [(2, "fp16", "no memory")]
    assert len(found.cells) == 3


def test_shapes_are_cut_to_the_maximum_length_and_recorded_so() -> None:
    plan = within_length(Plan((1,), (32,), shapes=((1, 16), (1, 512), (1, 1024))), 256)
    assert plan.shapes == ((1, 16), (1, 256))
