"""Which processors multiply a graph's 8-bit codes exactly, read from the finished graph.

x86 processors without VNNI add the products of two neighbouring unsigned and signed bytes in 16
bits, and saturate (onnxruntime issue 14642). onnxruntime has slower, exact kernels for them.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from m2dexport.graph.edit import table_users
from m2dexport.precisions import Isa

#: Largest sum of two neighbouring codes of the same sign that cannot saturate, for any input:
#: 255 * 128 < 2**15. Codes of opposite signs never saturate.
MAX_PAIR = 128


def isa_of(graph: ir.Graph) -> Isa:
    """Return which processors compute a finished graph's 8-bit products exactly, for any input.

    Only signed 8-bit matrices, (in, out), can saturate; embedding tables, whose rows are looked up,
    cannot.
    """
    saturates = any(
        value.const_value is not None
        and value.const_value.dtype == ir.DataType.INT8
        and len(value.shape or ()) == 2
        and not table_users(value)
        and _largest_pair(value.const_value.numpy()) > MAX_PAIR
        for value in graph.initializers.values()
    )
    return "vnni" if saturates else "portable"


def _largest_pair(codes: NDArray[np.int8]) -> int:
    """Return the largest sum of same-sign codes in rows 2i and 2i + 1, which are added first."""
    even = codes[: len(codes) // 2 * 2].astype(np.int16).reshape(-1, 2, codes.shape[1])
    if not even.size:
        return 0
    positive = np.maximum(even, 0).sum(axis=1).max()
    negative = -np.minimum(even, 0).sum(axis=1).min()
    return int(max(positive, negative))
