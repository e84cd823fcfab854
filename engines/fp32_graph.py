"""Writes a bf16 graph as the same graph in fp32, because ONNX Runtime has no bf16 kernels for CPUs.

8-bit weights and their Q/DQ pairs stay as they are. Only what is computed in 16 bits is computed in 32 bits instead.
The fp32 graph therefore shows the effect of quantisation, but not the rounding of bf16.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

NARROW, WIDE = ir.DataType.BFLOAT16, ir.DataType.FLOAT


def write_fp32_graph(graph: Path, out: Path) -> Path:
    """Write the bf16 ONNX file `graph` in fp32 into the folder `out`, one tensor at a time. Returns its path."""
    model = ir.load(graph)
    for initializer in model.graph.initializers.values():
        if initializer.dtype == NARROW:
            initializer.const_value = widened(initializer)
            initializer.dtype = WIDE
    for node in model.graph:
        for value in node.outputs:
            if value.dtype == NARROW:
                value.dtype = WIDE
        for attribute in list(node.attributes.values()):
            if attribute.type == ir.AttributeType.INT and attribute.name in ("to", "output_dtype"):
                if attribute.as_int() == NARROW:
                    node.attributes[attribute.name] = ir.AttrInt64(attribute.name, int(WIDE))
            elif attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype == NARROW:
                wide = ir.tensor(attribute.as_tensor().numpy().astype(np.float32))
                node.attributes[attribute.name] = ir.AttrTensor(attribute.name, wide)
    path = out / graph.name
    ir.save(model, path, external_data=f"{graph.name}.data")
    return path


def widened(initializer: ir.Value) -> ir.LazyTensor:
    """The initializer's bf16 numbers in fp32, read when they are written."""
    narrow = initializer.const_value
    assert narrow is not None, f"{initializer.name} has no value"

    def read() -> ir.TensorProtocol:
        return ir.tensor(narrow.numpy().astype(np.float32), name=initializer.name)

    return ir.LazyTensor(read, dtype=WIDE, shape=initializer.shape or ir.Shape(()), name=initializer.name)
