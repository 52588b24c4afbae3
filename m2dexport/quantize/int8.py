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

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.tape import Tape

from m2dexport.errors import UsageError
from m2dexport.graph.edit import CONTRIB, array_of, bias_of, constant, replace, weight_matmuls
from m2dexport.graph.fuse import gelu_input
from m2dexport.precisions import Isa
from m2dexport.quantize.activations import CalibrationTokens, Load, collect_activations
from m2dexport.quantize.codes import symmetric_int8
from m2dexport.quantize.rounding import round_weights

Floats = NDArray[np.float32]

_SMOOTHING = 0.85  # a in the module's formula
_MARGIN = 1.15  # fixed ranges are this much wider than what the calibration texts show
_ZERO = 128  # the code of 0.0 in signed inputs
_GELU_FLOOR = 0.17  # GELU(x) >= -0.16998
_TINY = np.float32(1e-10)  # the scale of a token that is all zeros
#: A channel spikes when it goes this far beyond the typical channel; so many at most are kept wide.
_TOKEN_SPIKE = 2.0
_FIXED_SPIKE = 3.0
_MOST_SPIKES = 16
#: Keeping spikes wide takes three more operators: their error without must be this many times more.
_SPIKES_PAY = 1.25
#: A fixed scale is faster; beyond this many times the error of per-token scales it is not used.
_FIXED_MAX_ERROR = 4.0


@dataclass(frozen=True)
class _Linear:
    """One MatMul by a constant, and the bias that is added to it, if that is all that follows."""

    node: ir.Node
    weight: ir.Value
    bias: tuple[ir.Node, ir.Value] | None  # the Add, and its constant


@dataclass(frozen=True)
class _Input:
    """One value that MatMuls take."""

    value: ir.Value
    rows: Floats  # (rows, in), its values on calibration texts
    isa: Isa  # that the codes of the weights that it meets are made for


@dataclass(frozen=True)
class _FixedScales:
    """``codes = round(x * factor + centre) + 128``, the same for every token."""

    factor: Floats  # (in,)
    centre: Floats  # (in,)
    spikes: NDArray[np.int64]  # channels that are multiplied in float32 instead


@dataclass(frozen=True)
class _TokenScales:
    """``codes = round((x + shift) / scale) + zero``; a token's largest is ``levels`` scales."""

    shift: float  # makes every value positive, where there is a known lower bound; else 0
    cap: float  # the largest value, after the shift, that codes must reach
    spikes: NDArray[np.int64]  # channels that are multiplied in float32 instead

    @property
    def levels(self) -> int:
        return 255 if self.shift else 127

    @property
    def zero(self) -> int:
        return 0 if self.shift else _ZERO


_Scales = TypeVar("_Scales", _FixedScales, _TokenScales)


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
    # The codes must not depend on how many cores the sums are split over.
    with threadpool_limits(limits=1, user_api="blas"):
        for x, linears in inputs.items():
            _quantize_input(model.graph, _Input(x, rows[str(x.name)], isa), linears, per_token)


def _inputs(graph: ir.Graph) -> dict[ir.Value, list[_Linear]]:
    """Return the values that MatMuls of constants take, each with these MatMuls, in order."""
    found: dict[ir.Value, list[_Linear]] = {}
    for node, x, weight in weight_matmuls(graph):
        found.setdefault(x, []).append(_Linear(node, weight, bias_of(node)))
    return found


def _quantize_input(
    graph: ir.Graph, x: _Input, linears: Sequence[_Linear], per_token: bool
) -> None:
    weights = [array_of(linear.weight) for linear in linears]
    scales = _choose_scales(x, np.concatenate(weights, axis=1))
    tape = Tape()
    if isinstance(scales, _FixedScales):
        codes = _fixed_codes(graph, tape, x.value, scales)
        graph.insert_before(linears[0].node, tape.nodes)
        for linear, weight in zip(linears, weights, strict=True):
            _replace_fixed(graph, linear, weight, x, codes, scales)
        return
    if not per_token:
        return
    token_codes = _token_codes(graph, tape, x.value, scales)
    graph.insert_before(linears[0].node, tape.nodes)
    for linear, weight in zip(linears, weights, strict=True):
        _replace_per_token(graph, linear, weight, x, token_codes, scales)


def _choose_scales(x: _Input, weight: Floats) -> _FixedScales | _TokenScales:
    """Return the fastest kind of scales whose error on the calibration rows is not much larger."""
    shift = _GELU_FLOOR if _is_gelu(x.value) else 0.0
    token, error = _with_spikes_that_pay(
        lambda most: _token_scales(x.rows, shift, most), x.rows, weight
    )
    if not _is_normed(x.value):
        return token
    fixed, fixed_error = _with_spikes_that_pay(
        lambda most: _fixed_scales(x.rows, weight, most), x.rows, weight
    )
    return fixed if fixed_error <= _FIXED_MAX_ERROR * error else token


def _with_spikes_that_pay(
    scales_of: Callable[[int], _Scales], rows: Floats, weight: Floats
) -> tuple[_Scales, float]:
    """Return the scales without spikes, or with, where that is much better, and their error."""
    plain, wide = scales_of(0), scales_of(_MOST_SPIKES)
    errors = [_error(rows, weight, scales) for scales in (plain, wide)]
    return (wide, errors[1]) if errors[0] > _SPIKES_PAY * errors[1] else (plain, errors[0])


def _error(rows: Floats, weight: Floats, scales: _FixedScales | _TokenScales) -> float:
    """Return the square of what 8 bits, rounded to nearest, miss of the worst of the products.

    A constant error does not count: it is taken off the bias. The mean over all tokens would not
    see the few in which a channel spikes, and these decide about the worst text.
    """
    if isinstance(scales, _FixedScales):
        seen, moved = _fixed_values(rows, scales), weight / scales.factor[:, None]
    else:
        codes, scale = _token_values(rows, scales)
        seen, moved = codes * scale, weight
    weight_codes, weight_scale = symmetric_int8(_narrow(moved, scales.spikes), axis=0)
    error = rows @ weight - seen @ (weight_codes * weight_scale)
    error -= rows[:, scales.spikes] @ weight[scales.spikes]
    return float(np.square(error - error.mean(axis=0)).sum(axis=1).max())


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


def _fixed_scales(rows: Floats, weight: Floats, most_spikes: int) -> _FixedScales:
    low, high = rows.min(axis=0), rows.max(axis=0)
    half = np.maximum((high - low) / 2 * np.float32(_MARGIN), np.float32(1e-6))
    spikes = _spikes(half, _FIXED_SPIKE, most_spikes)
    half[spikes] = np.median(half)
    smooth = half**_SMOOTHING / np.maximum(np.abs(weight).max(axis=1), 1e-6) ** (1 - _SMOOTHING)
    factor = (127 / (half / smooth).max() / smooth).astype(np.float32)
    return _FixedScales(factor, -(low + high) / 2 * factor, spikes)


def _fixed_values(rows: Floats, fixed: _FixedScales) -> Floats:
    """Mirror ``_fixed_codes`` in numpy: the codes of (rows, in), less their zero."""
    values: Floats = np.clip(np.round(rows * fixed.factor + fixed.centre), -_ZERO, 255 - _ZERO)
    return values


def _fixed_codes(graph: ir.Graph, tape: Tape, x: ir.Value, fixed: _FixedScales) -> ir.Value:
    factor = constant(graph, f"{x.name}.factor", fixed.factor)
    centre = constant(graph, f"{x.name}.centre", fixed.centre)
    moved = tape.op("Add", [tape.op("Mul", [x, factor]), centre])
    codes = tape.op("QuantizeLinear", [moved, _one(graph), _zero(graph, _ZERO)])
    codes.shape, codes.type = x.shape, ir.TensorType(ir.DataType.UINT8)
    return codes


def _replace_fixed(
    graph: ir.Graph,
    linear: _Linear,
    weight: Floats,
    x: _Input,
    codes: ir.Value,
    fixed: _FixedScales,
) -> None:
    seen = _fixed_values(x.rows, fixed)
    moved = _narrow(weight, fixed.spikes) / fixed.factor[:, None]
    values, scale = round_weights(moved, seen, x.isa)
    wide = x.rows[:, fixed.spikes] @ weight[fixed.spikes]
    end, bias = _corrected(linear, x.rows @ weight - (seen @ values) * scale - wide)
    tape = Tape()
    inputs = _product_inputs(graph, linear, codes, values, scale, _ZERO)
    inputs += [None, constant(graph, f"{linear.weight.name}.bias", bias)]
    result = tape.op("MatMulIntegerToFloat", inputs, domain=CONTRIB)
    wide_result = _of_spikes(graph, tape, linear, weight, x.value, fixed.spikes)
    replace(graph, end, tape, tape.op("Sum", [result, *wide_result]) if wide_result else result)


def _token_scales(rows: Floats, shift: float, most_spikes: int) -> _TokenScales:
    largest = np.abs(rows + np.float32(shift)).max(axis=0)
    spikes = _spikes(largest, _TOKEN_SPIKE, most_spikes)
    if not spikes.size:
        return _TokenScales(shift, float("inf"), spikes)
    # Above the largest of the other channels, so that a new text does not reach it there.
    others = float(np.delete(largest, spikes).max())
    cap = max(_TOKEN_SPIKE * float(np.median(largest)), _MARGIN * others)
    return _TokenScales(shift, cap, spikes)


def _spikes(largest: Floats, factor: float, most: int) -> NDArray[np.int64]:
    """Return the ``most`` or fewer channels beyond ``factor`` times the typical channel."""
    order = np.argsort(-largest, kind="stable")[:most]
    found: NDArray[np.int64] = np.sort(order[largest[order] > factor * np.median(largest)])
    return found


def _narrow(weight: Floats, spikes: NDArray[np.int64]) -> Floats:
    """Return a weight without the rows of spikes, beside which the other rows would be coarse."""
    narrow: Floats = weight.copy()
    narrow[spikes] = 0
    return narrow


def _of_spikes(
    graph: ir.Graph,
    tape: Tape,
    linear: _Linear,
    weight: Floats,
    x: ir.Value,
    spikes: NDArray[np.int64],
) -> list[ir.Value]:
    """Return what spikes add to a product, where there are any."""
    if not spikes.size:
        return []
    channels = constant(graph, f"{x.name}.spikes", spikes)
    kept = constant(graph, f"{linear.weight.name}.spikes", weight[spikes])
    wide = tape.op("Gather", [x, channels], {"axis": 2})
    return [tape.op("MatMul", [wide, kept])]


def _token_values(rows: Floats, scales: _TokenScales) -> tuple[Floats, Floats]:
    """Mirror ``_token_codes`` in numpy: codes less their zero, (rows, in), and scale, (rows, 1)."""
    moved = rows + np.float32(scales.shift)
    largest = np.clip(np.abs(moved).max(axis=1, keepdims=True), _TINY, np.float32(scales.cap))
    scale = largest / np.float32(scales.levels)
    low = 0 if scales.shift else -scales.levels
    values: Floats = np.clip(np.round(moved / scale), low, scales.levels)
    return values, scale


def _token_codes(
    graph: ir.Graph, tape: Tape, x: ir.Value, scales: _TokenScales
) -> tuple[ir.Value, ir.Value]:
    """Return uint8 codes, (batch, sequence, in), and each token's largest value, their scale."""
    last_axis = constant(graph, "int8.last_axis", np.array([-1], dtype=np.int64))
    if scales.shift:
        floor = constant(graph, "int8.gelu_floor", np.array(scales.shift, dtype=np.float32))
        moved = magnitude = tape.op("Add", [x, floor])
    else:
        moved, magnitude = x, tape.op("Abs", [x])
    largest = tape.op("ReduceMax", [magnitude, last_axis], {"keepdims": 1})
    tiny = constant(graph, "int8.tiny", np.array(_TINY))
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
    weight: Floats,
    x: _Input,
    quantized: tuple[ir.Value, ir.Value],
    scales: _TokenScales,
) -> None:
    codes, scale = _token_values(x.rows, scales)
    values, weight_scale = round_weights(_narrow(weight, scales.spikes), codes * scale, x.isa)
    wide = x.rows[:, scales.spikes] @ weight[scales.spikes]
    end, bias = _corrected(linear, x.rows @ weight - (codes @ values) * scale * weight_scale - wide)
    tape = Tape()
    inputs = _product_inputs(graph, linear, quantized[0], values, weight_scale, scales.zero)
    inputs[2] = _step(graph, scales)
    product = tape.op("MatMulIntegerToFloat", inputs, domain=CONTRIB)
    result = tape.op("Mul", [product, quantized[1]])
    wide_result = _of_spikes(graph, tape, linear, weight, x.value, scales.spikes)
    moved = constant(graph, f"{linear.weight.name}.bias", bias)
    replace(graph, end, tape, tape.op("Sum", [result, *wide_result, moved]))


def _corrected(linear: _Linear, error: Floats) -> tuple[ir.Node, Floats]:
    """Return the node that a quantized product replaces, and the bias less the mean error."""
    bias = error.mean(axis=0)
    if linear.bias is None:
        return linear.node, bias
    end, old = linear.bias
    return end, bias + array_of(old)


def _product_inputs(
    graph: ir.Graph,
    linear: _Linear,
    codes: ir.Value,
    values: NDArray[np.int8],
    scale: Floats,
    zero: int,
) -> list[ir.Value | None]:
    name = linear.weight.name
    weight = constant(graph, f"{name}.int8", values)
    weight_scale = constant(graph, f"{name}.scale", scale)
    return [codes, weight, _one(graph), weight_scale, _zero(graph, zero)]


def _one(graph: ir.Graph) -> ir.Value:
    return constant(graph, "int8.one", np.array(1, dtype=np.float32))


def _step(graph: ir.Graph, scales: _TokenScales) -> ir.Value:
    return constant(graph, f"int8.step_{scales.levels}", np.array(1 / scales.levels, np.float32))


def _zero(graph: ir.Graph, code: int) -> ir.Value:
    return constant(graph, f"int8.zero_{code}", np.array(code, dtype=np.uint8))
