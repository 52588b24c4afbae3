"""int8 weights and dynamic activations per tensor: onnxruntime's dynamic quantization.

An activation's scale covers the whole batch, including the padding, so a text's vector depends on
the other texts of its batch (onnxruntime issue 10111). The recipe is here because it is what most
people mean by int8, and as the baseline for the speed of the others.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from m2dexport.graph.edit import array_of, constant, replace, weight_matmuls
from m2dexport.quantize.codes import symmetric_int8


def quantize_dynamic(graph: ir.Graph) -> None:
    """Replace every MatMul of the transformer by standard operators on 8-bit codes.

    The result equals that of ``onnxruntime.quantization.quantize_dynamic`` with ``per_channel``:
    symmetric int8 weights per output channel, uint8 activations per tensor. onnxruntime fuses the
    operators when it loads the graph.
    """
    quantized: dict[ir.Value, list[ir.Value]] = {}
    for node, x, weight in weight_matmuls(graph):
        if x not in quantized:
            tape = Tape()
            quantized[x] = list(tape.op_multi_out("DynamicQuantizeLinear", [x], num_outputs=3))
            quantized[x][0].shape = x.shape
            quantized[x][0].type = ir.TensorType(ir.DataType.UINT8)
            graph.insert_before(node, tape.nodes)
        codes, step, zero_point = quantized[x]
        values, scale = symmetric_int8(array_of(weight), axis=0)
        int8 = constant(graph, f"{weight.name}.int8", values)
        # Not shared: onnxruntime's exact kernels rewrite codes and zero point of each weight.
        zero = constant(graph, f"{weight.name}.zero", np.zeros((), dtype=np.int8))
        tape = Tape()
        sums = tape.op("MatMulInteger", [codes, int8, zero_point, zero])
        factor = tape.op("Mul", [step, constant(graph, f"{weight.name}.scale", scale[0])])
        wide = tape.op("Cast", [sums], {"to": ir.DataType.FLOAT})
        replace(graph, node, tape, tape.op("Mul", [wide, factor]))
