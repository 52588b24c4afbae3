"""numpy: tables of static models; what a build needs."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from m2dexport.checkpoint.static import TABLE
from m2dexport.engines import ENGINES, Compilation
from m2dexport.engines.numpy.table import table_bytes
from m2dexport.errors import UsageError
from m2dexport.precisions import Isa, WeightPrecision
from m2dexport.quantize.activations import CalibrationTokens
from m2dexport.quantize.half import store_half
from m2dexport.quantize.recipes import (
    HALF,
    Requirement,
    changeable,
    require_precision,
    with_tables,
)

_OLDEST = "1.26"

PRECISIONS: Mapping[WeightPrecision, Requirement] = {
    "fp32": Requirement(_OLDEST, floor=None),
    "fp16": Requirement(_OLDEST, 0.9999),
    "int8": Requirement(_OLDEST, 0.999),
    "int4-weight-only": Requirement(_OLDEST, 0.9),
}
#: What the graph calls the arrays of a table -> what its file calls them.
_NAMES = {
    TABLE: "rows",
    f"{TABLE}.float16": "rows",
    f"{TABLE}.int8": "codes",
    f"{TABLE}.int4": "packed",
    f"{TABLE}.scale": "scale",
    f"{TABLE}.offset": "offset",
}


def fuse(model: ir.Model) -> None:
    """Leave the graph as it is: only its table is taken.

    Raises:
        UsageError: when it is a transformer's.
    """
    if TABLE not in model.graph.initializers:
        raise UsageError("the engine static runs depth 0 only; choose another engine.")


def quantize(
    model: ir.Model,
    weights: WeightPrecision,
    calibration: CalibrationTokens | None = None,
    isa: Isa = "portable",
) -> ir.Model:
    """Return a copy of a static model's graph with its table in another precision.

    int8 has a scale per token, int4 a scale and an offset per 32 values. Arguments and errors are
    those of ``engines.onnxruntime.make.quantize``; nothing is calibrated.
    """
    require_precision(weights, "static", PRECISIONS)
    model = changeable(model)
    if weights in HALF:
        store_half(model.graph, HALF[weights])
    return with_tables(model, weights)


def files(model: ir.Model, compilation: Compilation = Compilation()) -> dict[str, bytes]:
    """Return the engine's file of a graph, by name: its table."""
    (file,) = ENGINES["static"].files
    table: dict[str, NDArray[np.generic]] = {}
    for name, value in model.graph.initializers.items():
        if name in _NAMES and value.const_value is not None:
            table[_NAMES[name]] = value.const_value.numpy()
    return {file: table_bytes(table)}
