"""Static int8 by NNCF: Q/DQ pairs with scales from calibration texts."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from m2dexport.errors import MissingExtra, UsageError
from m2dexport.graph.edit import weight_matmuls
from m2dexport.quantize.activations import CalibrationTokens

#: With fewer texts, the measured range of an activation is not reliable.
MIN_TEXTS = 100
_MOST_TEXTS = 300  # NNCF's own default: more take longer and hardly change a range
#: SmoothQuant's alpha: the share of an activation's range that moves into the weights. NNCF's .95
#: leaves too little precision to weights whose inputs come from a GELU.
_SMOOTHING = 0.7


def quantize_static(model: ir.Model, calibration: CalibrationTokens | None) -> ir.Model:
    """Return the graph with Q/DQ pairs around every MatMul of the transformer.

    SmoothQuant and bias correction are on, and the model type is TRANSFORMER. Attention, norms and
    everything after pooling stay in float32.

    Args:
        model: the float32 graph.
        calibration: texts to measure activations on, one at a time.

    Raises:
        UsageError: without calibration, or with fewer than ``MIN_TEXTS`` texts.
        MissingExtra: when nncf is not installed.
    """
    texts = calibration.ids if calibration is not None else ()
    if len(texts) < MIN_TEXTS:
        raise UsageError(
            f"{len(texts)} calibration texts are too few for static int8 weights; pass at least "
            f"{MIN_TEXTS}."
        )
    nncf = _import_nncf()
    for index, node in enumerate(model.graph):
        node.name = f"node_{index}"
    quantized = {node.name for node, _, _ in weight_matmuls(model.graph)}
    others = [node.name for node in model.graph if node.name not in quantized]
    dataset = nncf.Dataset([_inputs(ids) for ids in texts[:_MOST_TEXTS]])
    smoothing = nncf.AdvancedSmoothQuantParameters(matmul=_SMOOTHING)
    with _silent(nncf):
        done = nncf.quantize(
            ir.to_proto(model),
            dataset,
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=_MOST_TEXTS,
            ignored_scope=nncf.IgnoredScope(names=others),
            advanced_parameters=nncf.AdvancedQuantizationParameters(smooth_quant_alphas=smoothing),
        )
    result: ir.Model = ir.from_proto(done)
    _name_codes(result.graph)
    return result


def _inputs(ids: Sequence[int]) -> dict[str, Any]:
    row = np.array([ids], dtype=np.int64)
    return {"input_ids": row, "attention_mask": np.ones_like(row)}


def _name_codes(graph: ir.Graph) -> None:
    """Name codes and scales after their weight, as the other precisions do."""
    for node in graph:
        codes = node.inputs[0] if node.op_type == "DequantizeLinear" else None
        if codes is None or codes.const_value is None:
            continue
        weight = str(codes.name).removeprefix("q_output_").removesuffix("_1")
        for value, kind in zip(node.inputs, ("int8", "scale", "zero"), strict=False):
            if value is not None:
                value.name = f"{weight}.{kind}"


def _import_nncf() -> Any:
    """Return the nncf package, imported with its usage reporting switched off."""
    before = os.environ.get("NNCF_CI")
    os.environ["NNCF_CI"] = "1"  # read once, at import
    try:
        import nncf
        import nncf.onnx
    except ModuleNotFoundError as error:
        if error.name != "nncf":
            raise
        raise MissingExtra("int8-static", "nncf", "nncf") from error
    finally:
        if before is None:
            del os.environ["NNCF_CI"]
        else:
            os.environ["NNCF_CI"] = before
    return nncf


@contextlib.contextmanager
def _silent(nncf: Any) -> Iterator[None]:
    """Keep NNCF's progress bars and messages off the user's terminal."""
    logger = nncf.common.logging.nncf_logger
    level = logger.level
    logger.setLevel("ERROR")
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
