"""The sum of two tensors and a bias as one BiasAdd, which ONNX Runtime's CUDA provider has for fp16 and fp32."""

from __future__ import annotations

import onnx_ir as ir

from ditforge.engines.compilers.onnx_passes.graph import MICROSOFT, node, rank, replace, sole_source

FORMATS = (ir.DataType.FLOAT16, ir.DataType.FLOAT)


def three(graph: ir.Graph) -> int:
    """Add of a bias to the sum of two products of three dimensions becomes BiasAdd."""
    count = 0
    for found in list(graph):
        if (found.op_type, found.domain) != ("Add", "") or found.outputs[0].dtype not in FORMATS:
            continue
        total, bias = found.inputs if sole_source(found.inputs[0], "Add") else found.inputs[::-1]
        added = sole_source(total, "Add")
        if added is None or bias is None or not bias.is_initializer() or rank(bias) != 1:
            continue
        if any(sole_source(part, "MatMul") is None or rank(part) != 3 for part in added.inputs):
            continue
        inputs = [added.inputs[0], bias, added.inputs[1]]
        replace(graph, found, [node("BiasAdd", inputs, like=found.outputs[0], domain=MICROSOFT)])
        count += 1
    return count
