"""int8: 8-bit weights and activations, whose vectors do not depend on their batch.

Every MatMul of the transformer multiplies unsigned 8-bit codes of its input by signed 8-bit codes
of its weight, and scales the exact integer sum back to float32.

* Inputs that come out of a norm hardly change their range: they are quantized by **fixed** scales
  and centres, one of each per channel, measured on calibration texts. The scale moves between
  input and weight as in SmoothQuant (Xiao et al. 2023): ``s = max|x|^a / max|w|^(1-a)``.
* All other inputs are quantized **per token**, by the largest value among one token's channels.
  One scale per tensor, the usual choice, makes a text's vector depend on the texts beside it
  (onnxruntime issue 10111). GELU's output is not below -0.17, so it is shifted by that and needs
  no bit for the sign.
* A few channels may spike, and would leave the other channels of a token a handful of codes, and
  their large weights the other weights likewise. Where it pays, they are multiplied in float32, as
  in LLM.int8() (Dettmers et al. 2022).
* Weights have one scale per output channel and are rounded so that errors cancel (``rounding``).
* What quantization adds to a layer's mean output on the calibration texts is taken off its bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.tape import Tape

from m2dexport.cores import at_once, side_by_side
from m2dexport.errors import UsageError
from m2dexport.graph.edit import CONTRIB, array_of, bias_of, constant, replace, weight_matmuls
from m2dexport.graph.fuse import gelu_input
from m2dexport.precisions import Isa
from m2dexport.quantize.activations import CalibrationTokens, Load, collect_activations
from m2dexport.quantize.scales import (
    TINY,
    ZERO,
    Codes,
    Fitted,
    FixedScales,
    Seen,
    TokenScales,
    fit_scales,
)

Floats = NDArray[np.float32]

_GELU_FLOOR = 0.17  # GELU(x) >= -0.16998
_SQUARES = 6  # float64 matrices of input by input that rounding holds


@dataclass(frozen=True)
class _Linear:
    """One MatMul by a constant, and the bias that is added to it, if that is all that follows."""

    node: ir.Node
    weight: ir.Value
    bias: tuple[ir.Node, ir.Value] | None  # the Add, and its constant


def quantize_matmuls(
    model: ir.Model,
    calibration: CalibrationTokens | None,
    load: Load,
    isa: Isa,
    *,
    per_token: bool = True,
) -> None:
    """Replace every MatMul of the transformer by one of 8-bit codes, in place.

    MatMuls of fewer than 4096 weights, and those after pooling, stay as they are.

    Args:
        model: a float32 graph.
        calibration: the texts that scales, rounding and biases are fitted to.
        load: what runs the graph on them; sums must not depend on the number of its threads.
        isa: "portable" makes codes whose products no processor saturates, "vnni" finer ones.
        per_token: whether the engine can scale each token by itself; else MatMuls of inputs that
            need it stay as they are.

    Raises:
        UsageError: when the calibration texts are missing or too few.
    """
    from threadpoolctl import threadpool_limits  # sets a variable when it is imported

    if calibration is None:
        raise UsageError("int8 weights need calibration texts.")
    inputs = _inputs(model.graph)
    if not inputs:
        return
    model.opset_imports[CONTRIB] = 1
    rows = collect_activations(model, list(inputs), calibration, load)
    seen = [_seen(x, rows[str(x.name)]) for x in inputs]  # before the graph is changed

    def fitted(of_input: tuple[Seen, Sequence[_Linear]]) -> Fitted:
        weights = [array_of(linear.weight) for linear in of_input[1]]
        return fit_scales(of_input[0], weights, isa, per_token=per_token)

    # The codes must not depend on how many cores a sum is split over, so each takes one.
    with threadpool_limits(limits=1, user_api="blas"):
        given = zip(seen, inputs.values(), strict=True)
        found = side_by_side(fitted, given, at_once(_bytes_of_fit(seen)))
        for (x, linears), of_input in zip(inputs.items(), found, strict=True):
            _quantize_input(model.graph, x, linears, of_input)


def _bytes_of_fit(seen: Sequence[Seen]) -> int:
    """Return how many bytes it takes to fit the widest input."""
    widest: int = max(each.rows.shape[1] for each in seen)
    return _SQUARES * 8 * widest * widest


def _inputs(graph: ir.Graph) -> dict[ir.Value, list[_Linear]]:
    """Return the values that MatMuls of constants take, each with these MatMuls, in order."""
    found: dict[ir.Value, list[_Linear]] = {}
    for node, x, weight in weight_matmuls(graph):
        found.setdefault(x, []).append(_Linear(node, weight, bias_of(node)))
    return found


def _quantize_input(
    graph: ir.Graph, x: ir.Value, linears: Sequence[_Linear], fitted: Fitted
) -> None:
    scales, tape = fitted.scales, Tape()
    if not fitted.codes:
        return
    if isinstance(scales, FixedScales):
        codes = _fixed_codes(graph, tape, x, scales)
        graph.insert_before(linears[0].node, tape.nodes)
        for linear, weight in zip(linears, fitted.codes, strict=True):
            _replace_fixed(graph, linear, weight, x, codes, scales)
        return
    token_codes = _token_codes(graph, tape, x, scales)
    graph.insert_before(linears[0].node, tape.nodes)
    for linear, weight in zip(linears, fitted.codes, strict=True):
        _replace_per_token(graph, linear, weight, x, token_codes, scales)


def _seen(x: ir.Value, rows: Floats) -> Seen:
    return Seen(rows, floor=_GELU_FLOOR if _is_gelu(x) else 0.0, normed=_is_normed(x))


def _is_normed(x: ir.Value) -> bool:
    """Say whether a value is the output of a LayerNorm or RMSNorm: ``normalised * weight``."""
    node = x.producer()
    if node is None or x.shape is None:
        return False
    if node.op_type in ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"):
        return True
    constants = [v.const_value for v in node.inputs if v is not None and v.const_value is not None]
    return node.op_type == "Mul" and any(tensor.size == x.shape[-1] for tensor in constants)


def _is_gelu(x: ir.Value) -> bool:
    node = x.producer()
    return node is not None and (node.op_type == "Gelu" or gelu_input(node) is not None)


def _fixed_codes(graph: ir.Graph, tape: Tape, x: ir.Value, fixed: FixedScales) -> ir.Value:
    factor = constant(graph, f"{x.name}.factor", fixed.factor)
    centre = constant(graph, f"{x.name}.centre", fixed.centre)
    moved = tape.op("Add", [tape.op("Mul", [x, factor]), centre])
    codes = tape.op("QuantizeLinear", [moved, _one(graph), _zero(graph, ZERO)])
    codes.shape, codes.type = x.shape, ir.TensorType(ir.DataType.UINT8)
    return codes


def _replace_fixed(
    graph: ir.Graph,
    linear: _Linear,
    weight: Codes,
    x: ir.Value,
    codes: ir.Value,
    fixed: FixedScales,
) -> None:
    end, bias = _corrected(linear, weight)
    tape = Tape()
    inputs = _product_inputs(graph, linear, codes, weight, ZERO)
    inputs += [None, constant(graph, f"{linear.weight.name}.bias", bias)]
    result = tape.op("MatMulIntegerToFloat", inputs, domain=CONTRIB)
    wide_result = _of_spikes(graph, tape, linear, weight, x, fixed.spikes)
    replace(graph, end, tape, tape.op("Sum", [result, *wide_result]) if wide_result else result)


def _of_spikes(
    graph: ir.Graph,
    tape: Tape,
    linear: _Linear,
    weight: Codes,
    x: ir.Value,
    spikes: NDArray[np.int64],
) -> list[ir.Value]:
    """Return what spikes add to a product, where there are any."""
    if not spikes.size:
        return []
    channels = constant(graph, f"{x.name}.spikes", spikes)
    kept = constant(graph, f"{linear.weight.name}.spikes", weight.spikes)
    wide = tape.op("Gather", [x, channels], {"axis": 2})
    return [tape.op("MatMul", [wide, kept])]


def _token_codes(
    graph: ir.Graph, tape: Tape, x: ir.Value, scales: TokenScales
) -> tuple[ir.Value, ir.Value]:
    """Return uint8 codes, (batch, sequence, in), and each token's largest value, their scale."""
    last_axis = constant(graph, "int8.last_axis", np.array([-1], dtype=np.int64))
    if scales.shift:
        floor = constant(graph, "int8.gelu_floor", np.array(scales.shift, dtype=np.float32))
        moved = magnitude = tape.op("Add", [x, floor])
    else:
        moved, magnitude = x, tape.op("Abs", [x])
    largest = tape.op("ReduceMax", [magnitude, last_axis], {"keepdims": 1})
    tiny = constant(graph, "int8.tiny", np.array(TINY))
    cap = constant(graph, f"{x.name}.cap", np.array(scales.cap, dtype=np.float32))
    largest = tape.op("Clip", [largest, tiny, cap])
    units = tape.op("Div", [moved, largest])
    codes = tape.op("QuantizeLinear", [units, _step(graph, scales), _zero(graph, scales.zero)])
    codes.shape, codes.type = x.shape, ir.TensorType(ir.DataType.UINT8)
    if x.shape is not None:
        largest.shape = ir.Shape([*x.shape[:-1], 1])
        largest.type = ir.TensorType(ir.DataType.FLOAT)
    return codes, largest


def _replace_per_token(
    graph: ir.Graph,
    linear: _Linear,
    weight: Codes,
    x: ir.Value,
    quantized: tuple[ir.Value, ir.Value],
    scales: TokenScales,
) -> None:
    end, bias = _corrected(linear, weight)
    tape = Tape()
    inputs = _product_inputs(graph, linear, quantized[0], weight, scales.zero)
    inputs[2] = _step(graph, scales)
    product = tape.op("MatMulIntegerToFloat", inputs, domain=CONTRIB)
    result = tape.op("Mul", [product, quantized[1]])
    wide_result = _of_spikes(graph, tape, linear, weight, x, scales.spikes)
    moved = constant(graph, f"{linear.weight.name}.bias", bias)
    replace(graph, end, tape, tape.op("Sum", [result, *wide_result, moved]))


def _corrected(linear: _Linear, weight: Codes) -> tuple[ir.Node, Floats]:
    """Return the node that a quantized product replaces, and the bias less the mean error."""
    if linear.bias is None:
        return linear.node, weight.bias
    end, old = linear.bias
    return end, weight.bias + array_of(old)


def _product_inputs(
    graph: ir.Graph,
    linear: _Linear,
    codes: ir.Value,
    weight: Codes,
    zero: int,
) -> list[ir.Value | None]:
    name = linear.weight.name
    values = constant(graph, f"{name}.int8", weight.values)
    scale = constant(graph, f"{name}.scale", weight.scale)
    return [codes, values, _one(graph), scale, _zero(graph, zero)]


def _one(graph: ir.Graph) -> ir.Value:
    return constant(graph, "int8.one", np.array(1, dtype=np.float32))


def _step(graph: ir.Graph, scales: TokenScales) -> ir.Value:
    return constant(graph, f"int8.step_{scales.levels}", np.array(1 / scales.levels, np.float32))


def _zero(graph: ir.Graph, code: int) -> ir.Value:
    return constant(graph, f"int8.zero_{code}", np.array(code, dtype=np.uint8))
