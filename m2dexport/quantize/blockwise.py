"""Weight-only precisions: block-wise codes for onnxruntime's ``MatMulNBits``.

Activations stay in float32 in the graph; the kernel rounds them per token and block of 32
(``accuracy_level`` 4), so a text's vector does not depend on its batch.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from m2dexport.graph.edit import CONTRIB, array_of, constant, replace, weight_matmuls
from m2dexport.quantize.codes import BLOCK, pack_nibbles, quantize_blocks

_INT8_ARITHMETIC = 4  # accuracy_level: multiply 8-bit activations


def quantize_blockwise(model: ir.Model, bits: Literal[4, 8]) -> None:
    """Replace every MatMul of the transformer by a ``MatMulNBits`` of 4 or 8 bits."""
    model.opset_imports[CONTRIB] = 1
    graph = model.graph
    for node, x, weight in weight_matmuls(graph):
        rows = np.ascontiguousarray(array_of(weight).T)  # one row per output channel
        blocks = quantize_blocks(rows, bits)
        codes = blocks.codes if bits == 8 else pack_nibbles(blocks.codes)
        inputs = [
            x,
            constant(graph, f"{weight.name}.int{bits}", codes),
            constant(graph, f"{weight.name}.scale", blocks.scale.reshape(-1)),
        ]
        if bits == 4:
            zero = blocks.zero[..., 0]
            even = np.pad(zero, ((0, 0), (0, zero.shape[1] % 2)))
            inputs.append(constant(graph, f"{weight.name}.zero", pack_nibbles(even).reshape(-1)))
        attributes = {
            "K": rows.shape[1],
            "N": rows.shape[0],
            "bits": bits,
            "block_size": BLOCK,
            "accuracy_level": _INT8_ARITHMETIC,
        }
        tape = Tape()
        result = tape.op("MatMulNBits", inputs, attributes, domain=CONTRIB)
        replace(graph, node, tape, result)
