"""Graphs made for TensorRT and TensorRT-RTX alike: standard operators, explicit types, Q/DQ."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace

import onnx_ir as ir

from m2dexport.engines import Compilation, engine_version
from m2dexport.engines.onnxruntime.make import runner
from m2dexport.engines.tensorrt.cuda import require_gpu
from m2dexport.engines.tensorrt.library import (
    build_anywhere,
    build_engine,
    gpus_for,
    is_portable,
    require_gpus,
)
from m2dexport.engines.tensorrt.load import ENGINE, GRAPH, RECIPE
from m2dexport.engines.tensorrt.recipe import (
    FORMAT,
    Built,
    Computes,
    EngineRecipe,
    compatible_of,
    profiles_for,
    recipe_from_toml,
)
from m2dexport.errors import UsageError
from m2dexport.graph.last_layer import prune_last_layer
from m2dexport.graph.vector import serialize_graph
from m2dexport.precisions import Isa, WeightPrecision
from m2dexport.quantize.activations import CalibrationTokens
from m2dexport.quantize.explicit import quantize_explicitly, store_weights
from m2dexport.quantize.recipes import (
    HALF,
    Requirement,
    changeable,
    require_precision,
    without_unused,
)
from m2dexport.quantize.typed import compute_half, hide_finitely


def requirements(oldest: str) -> Mapping[WeightPrecision, Requirement]:
    """Return the weights that a library runs, from its oldest version that does."""
    return {
        "fp32": Requirement(oldest, floor=None),
        "fp16": Requirement(oldest, 0.999),
        "bf16": Requirement(oldest, 0.99),
        "int8": Requirement(oldest, 0.99, calibrated=True),
        "int8-weight-only": Requirement(oldest, 0.995, calibrated=True),
        "int4-weight-only": Requirement(oldest, 0.9, calibrated=True),
    }


def hide_keys_finitely(model: ir.Model) -> None:
    """Leave the graph in standard operators, with masks that are finite in every type."""
    hide_finitely(model.graph)


def quantized(
    engine: str,
    known: Mapping[WeightPrecision, Requirement],
    model: ir.Model,
    weights: WeightPrecision,
    calibration: CalibrationTokens | None = None,
    isa: Isa = "portable",
) -> ir.Model:
    """Return a copy of a float32 graph with its weights in another precision.

    All precisions but fp32 also compute in 16 bits, float16 unless they are bf16. Arguments and
    errors are those of ``engines.onnxruntime.make.quantize``.

    Args:
        engine: "tensorrt" or "tensorrt-rtx".
        known: its ``PRECISIONS``.
        model: a float32 graph.
        weights: a key of ``known``.
        calibration: what integer weights are fitted to.
        isa: plays no part.
    """
    require_precision(weights, engine, known)
    model = changeable(model)
    if weights == "int8":
        quantize_explicitly(model, calibration, runner)
    elif weights == "int8-weight-only":
        store_weights(model, 8, calibration, runner)
    elif weights == "int4-weight-only":
        store_weights(model, 4, calibration, runner)
    if weights != "fp32":
        compute_half(model, HALF.get(weights, ir.DataType.FLOAT16))
    return without_unused(model)


def require_compilation_of(engine: str, compilation: Compilation) -> None:
    """Refuse what no engine can be built for, on this machine or at all.

    Raises:
        UsageError: when the library makes no engines for a GPU, or needs one that is not here.
    """
    require_gpus(engine, compilation.gpus)
    compatible = compatible_of(compilation.compatible)
    if is_portable(engine):
        if compatible:
            raise UsageError(f"engines of {engine} are portable; leave --compatible out.")
        return
    if compilation.keep_engine:
        raise UsageError(
            f"an engine of {engine} is for this machine's GPU, and kept beside the bundle; "
            "leave --with-engine out."
        )
    require_gpu(0, engine)


def graph_files(
    engine: str, model: ir.Model, compilation: Compilation = Compilation()
) -> dict[str, bytes]:
    """Return the graph and the recipe of its engine, by name.

    As for onnxruntime, the last layer computes the pooled token alone, where one is pooled.

    Args:
        engine: "tensorrt" or "tensorrt-rtx".
        model: a graph.
        compilation: the GPUs and shapes that the engine is for.

    Raises:
        UsageError: when a shape is longer than the model's texts.
    """
    recipe = EngineRecipe(
        format=FORMAT,
        library=engine,
        computes=_computes(model.graph),
        gpus=gpus_for(engine, compilation.gpus),
        compatible=compatible_of(compilation.compatible),
        profiles=profiles_for(compilation.shapes, compilation.max_length),
    )
    model = model.clone()
    prune_last_layer(model)
    return {GRAPH: serialize_graph(model), RECIPE: recipe.to_toml()}


def compiled_files(files: Mapping[str, bytes], compilation: Compilation) -> dict[str, bytes]:
    """Return the files of a graph once an engine was built of it, to find out whether it can be.

    Where no GPUs are named, the recipe then has those for which it can.

    Args:
        files: of ``graph_files``.
        compilation: likewise; it says whether the engine is among what is returned.

    Raises:
        M2DError: when the library refuses the graph.
    """
    graph = files[GRAPH]
    recipe = recipe_from_toml(files[RECIPE], RECIPE)
    if compilation.gpus:
        engine = build_engine(graph, recipe, recipe.gpus)
    else:
        engine, gpus = build_anywhere(graph, recipe)
        recipe = replace(recipe, gpus=gpus)
    if not compilation.keep_engine:
        return {**files, RECIPE: recipe.to_toml()}
    built = Built(
        version=engine_version(recipe.library)[1],
        graph_sha256=hashlib.sha256(graph).hexdigest(),
        engine_sha256=hashlib.sha256(engine).hexdigest(),
    )
    return {**files, RECIPE: replace(recipe, built=built).to_toml(), ENGINE: engine}


def _computes(graph: ir.Graph) -> Computes:
    """Return the narrowest type of float that a graph computes in."""
    types = {output.dtype for node in graph for output in node.outputs}
    if ir.DataType.BFLOAT16 in types:
        return "bfloat16"
    return "float16" if ir.DataType.FLOAT16 in types else "float32"
