"""ONNX Runtime: graphs made for it; what a build needs."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import onnx_ir as ir

from m2dexport.engines import ENGINES, Compilation, Device
from m2dexport.engines.onnxruntime import run
from m2dexport.graph.fuse import fuse_for_onnxruntime
from m2dexport.graph.last_layer import prune_last_layer
from m2dexport.graph.vector import serialize_graph
from m2dexport.precisions import Isa, WeightPrecision
from m2dexport.quantize.activations import CalibrationTokens, Run
from m2dexport.quantize.blockwise import quantize_blockwise
from m2dexport.quantize.dynamic import quantize_dynamic
from m2dexport.quantize.half import store_half
from m2dexport.quantize.int8 import quantize_matmuls
from m2dexport.quantize.recipes import (
    HALF,
    Requirement,
    changeable,
    require_precision,
    with_tables,
)
from m2dexport.quantize.static import quantize_static

PRECISIONS: Mapping[WeightPrecision, Requirement] = {
    "fp32": Requirement("1.17", floor=None),
    "fp16": Requirement("1.17", 0.9999),
    "bf16": Requirement("1.17", 0.9999),
    "int8": Requirement(
        "1.17", 0.98, calibrated=True, isas=("portable", "vnni"), mixable=True, faithful=True
    ),
    "int8-dynamic": Requirement("1.17", 0.95, mixable=True, batch_dependent=True),
    "int8-static": Requirement("1.17", 0.95, calibrated=True, made_by=("nncf",)),
    "int8-weight-only": Requirement("1.22", 0.995, mixable=True),
    "int4-weight-only": Requirement("1.17", 0.9, mixable=True),
}


def fuse(model: ir.Model) -> None:
    """Put onnxruntime's own operators in the place of attention and GELU, where they match."""
    fuse_for_onnxruntime(model)


def quantize(
    model: ir.Model,
    weights: WeightPrecision,
    calibration: CalibrationTokens | None = None,
    isa: Isa = "portable",
) -> ir.Model:
    """Return a copy of a float32 graph with its weights in another precision.

    The graph's inputs and outputs keep their types.

    Args:
        model: a graph with one output or with one output per depth.
        weights: a key of ``PRECISIONS``; "fp32" returns a plain copy.
        calibration: what activations are measured on; the precisions that need it refuse None.
        isa: of int8: "portable" makes codes whose products no processor saturates, "vnni" finer
            ones, which are exact at full speed with VNNI only.

    Raises:
        CheckpointError: when a weight holds NaN, or does not fit fp16.
        UsageError: when the precision is unknown, or the calibration texts that it needs are
            missing or too few.
        MissingExtra: when the package that makes a precision is not installed.
    """
    require_precision(weights, "onnx", PRECISIONS)
    model = changeable(model)
    if weights in HALF:
        store_half(model.graph, HALF[weights])
    elif weights == "int8":
        quantize_matmuls(model, calibration, runner, isa)
    elif weights == "int8-dynamic":
        quantize_dynamic(model.graph)
    elif weights == "int8-static":
        model = quantize_static(model, calibration)
    elif weights == "int8-weight-only":
        quantize_blockwise(model, 8)
    elif weights == "int4-weight-only":
        quantize_blockwise(model, 4)
    return with_tables(model, weights)


def files(model: ir.Model, compilation: Compilation = Compilation()) -> dict[str, bytes]:
    """Return the engine's files of a graph, by name: the ONNX file.

    Its last layer computes the pooled token alone, where one is pooled. Nothing that is to be
    quantized yet is: a depth's weights are the same by itself and in the graph of all depths.
    """
    (name,) = ENGINES["onnx"].files
    model = model.clone()
    prune_last_layer(model)
    return {name: serialize_graph(model)}


def runner(model: ir.Model) -> Run:
    """Return what runs a graph, in one thread: the order of its sums does not change then."""
    return partial(run.run, run.load(files(model), Device(threads=1), "portable"))
