"""Resize in fp32 where the graph is in bf16, for which ONNX Runtime's CUDA provider has no kernel.

To repeat pixels, the only Resize of autoencoders, is exact in either.
"""

from __future__ import annotations

import onnx_ir as ir

from ditforge.engines.compilers.onnx_passes.graph import attribute, node, replace


def in_fp32(graph: ir.Graph) -> int:
    """A Resize to the nearest pixel gets Casts around it."""
    count = 0
    for found in list(graph):
        given = found.inputs[0] if (found.op_type, found.domain) == ("Resize", "") else None
        if given is None or given.dtype != ir.DataType.BFLOAT16 or attribute(found, "mode", "nearest") != "nearest":
            continue
        wide = node("Cast", [given], {"to": int(ir.DataType.FLOAT)}, like=given, shape=given.shape)
        wide.outputs[0].dtype = ir.DataType.FLOAT
        attributes = {name: item.value for name, item in found.attributes.items()}
        larger = node("Resize", [wide.outputs[0], *found.inputs[1:]], attributes, like=wide.outputs[0])
        back = node("Cast", [larger.outputs[0]], {"to": int(ir.DataType.BFLOAT16)}, shape=found.outputs[0].shape)
        replace(graph, found, [wide, larger, back])
        count += 1
    return count
