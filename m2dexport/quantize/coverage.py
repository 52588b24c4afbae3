"""The share of a graph's weights that is quantized, read from the finished graph."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import onnx_ir as ir

from m2dexport.errors import M2DError
from m2dexport.graph.edit import SMALL
from m2dexport.precisions import WeightPrecision

_NAMED = 3  # weights in a message
_NARROW = (
    *(ir.DataType.INT4, ir.DataType.INT8, ir.DataType.UINT8),
    *(ir.DataType.FLOAT16, ir.DataType.BFLOAT16),
)
#: Constants that codes are widened with; they are named after the same weight as the codes.
_PARTS = ("scale", "offset")


@dataclass(frozen=True)
class Coverage:
    """What was quantized and what was not."""

    share: float  # of all weight bytes, 0..1, those that are codes or belong to codes
    share_of_asked: float  # the same, without the weights that were to stay in float32
    left: tuple[str, ...]  # weights of 4096 values or more that stayed in float32, largest first
    kept: frozenset[str]  # weights that were to stay


def coverage(
    model: ir.Model, precision: WeightPrecision, kept: frozenset[str] = frozenset()
) -> Coverage:
    """Compute the share of a finished graph's weight bytes that is quantized.

    Packed codes count by the bytes they take, and so do the scales and offsets of the same weight.

    Args:
        model: the graph.
        precision: what its weights were to be stored in.
        kept: names of the weights that were to stay in float32.
    """
    if precision == "fp32":
        return Coverage(1.0, 1.0, (), kept)
    weights = {n: v.const_value for n, v in model.graph.initializers.items()}
    codes = {n for n, tensor in weights.items() if tensor is not None and tensor.dtype in _NARROW}
    coded = {name.rpartition(".")[0] for name in codes}
    narrow = 0
    wide: dict[str, int] = {}
    for name, tensor in weights.items():
        stem, _, part = name.rpartition(".")
        if tensor is None:
            continue
        if name in codes or (part in _PARTS and stem in coded):
            narrow += tensor.nbytes
        elif tensor.dtype == ir.DataType.FLOAT:
            wide[name] = tensor.nbytes
    left = [name for name, size in wide.items() if size >= 4 * SMALL]
    return Coverage(
        share=_share(narrow, wide.values()),
        share_of_asked=_share(narrow, (size for name, size in wide.items() if name not in kept)),
        left=tuple(sorted(left, key=lambda name: (-wide[name], name))),
        kept=kept,
    )


def require_coverage(covered: Coverage, least: float, name: str) -> None:
    """Refuse a graph of which too little was quantized.

    Args:
        covered: what ``coverage`` found.
        least: the share of the weight bytes that were to be quantized, 0..1, that must be.
        name: what the message calls the graph.

    Raises:
        M2DError: naming the largest weights that stayed in float32.
    """
    if covered.share_of_asked >= least:
        return
    left = [name for name in covered.left if name not in covered.kept]
    named = ", ".join(left[:_NAMED]) or f"weights of fewer than {SMALL} values"
    more = f" and {len(left) - _NAMED} more" if len(left) > _NAMED else ""
    raise M2DError(
        f"{name}: {covered.share_of_asked:.1%} of the weight bytes were quantized where "
        f"{least:.0%} are needed; left in float32: {named}{more}; build --min-coverage accepts "
        "less."
    )


def _share(narrow: int, wide: Iterable[int]) -> float:
    return narrow / max(1, narrow + sum(wide))
