"""8-bit weights beside bf16. ONNX Runtime's CUDA provider dequantises to fp16 and fp32 only.

FP8 goes to MatMulBlockQuantizedFp8Weight, whose block is a whole column. For INT8 the column's scale multiplies the
product instead of the weight: both formats' numbers are exact in bf16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ditforge.engines.compilers.onnx_passes.graph import (
    MICROSOFT,
    add_initializer,
    attribute,
    dimension,
    node,
    rank,
    replace,
    source,
)


def beside_bf16(graph: ir.Graph) -> int:
    """MatMul of bf16 and a dequantised weight becomes an operator that the CUDA provider has."""
    count = 0
    for found in list(graph):
        dequantise = source(found.inputs[1], "DequantizeLinear") if found.op_type == "MatMul" else None
        if dequantise is None or found.inputs[0] is None or dequantise.outputs[0].dtype != ir.DataType.BFLOAT16:
            continue
        weight, scale = dequantise.inputs[:2]
        if weight is None or scale is None or not weight.is_initializer() or not scale.is_initializer():
            continue
        if rank(weight) != 2 or rank(scale) != 1 or attribute(dequantise, "axis", 1) != 1 or len(dequantise.inputs) > 2:
            continue
        like = found.outputs[0]
        if weight.dtype == ir.DataType.FLOAT8E4M3FN:
            inputs = [found.inputs[0], flipped(graph, weight), widened(graph, scale)]
            attributes = {"block_size": dimension(weight, 0) or 0}
            operator = "MatMulBlockQuantizedFp8Weight"
            made = [node(operator, inputs, attributes, like=like, domain=MICROSOFT, shape=like.shape)]
        elif weight.dtype == ir.DataType.INT8:
            cast = node("Cast", [weight], {"to": int(ir.DataType.BFLOAT16)}, like=dequantise.outputs[0])
            product = node("MatMul", [found.inputs[0], cast.outputs[0]], like=like, shape=like.shape)
            made = [cast, product, node("Mul", [product.outputs[0], scale], like=like, shape=like.shape)]
        else:
            continue
        replace(graph, found, made)
        count += 1
    return count


def flipped(graph: ir.Graph, weight: ir.Value) -> ir.Value:
    """The weight [K, N] as [N, K], transposed when it is written."""
    return derived(graph, weight, "transposed", weight.dtype, np.transpose)


def widened(graph: ir.Graph, scale: ir.Value) -> ir.Value:
    """The scales [N] as fp32 [N, 1]."""
    return derived(graph, scale, "fp32", ir.DataType.FLOAT, lambda numbers: numbers.astype(np.float32)[:, None])


def derived(
    graph: ir.Graph,
    value: ir.Value,
    suffix: str,
    dtype: ir.DataType | None,
    change: Callable[[NDArray[Any]], NDArray[Any]],
) -> ir.Value:
    """An initializer of other numbers than those of `value`, made once, which are computed when it is written."""
    name, tensor = f"{value.name}_{suffix}", value.const_value
    assert tensor is not None and dtype is not None, f"{value.name} has no value"
    if name in graph.initializers:
        return graph.initializers[name]

    def read() -> ir.TensorProtocol:
        return ir.Tensor(np.ascontiguousarray(change(tensor.numpy())), dtype=dtype, name=name)

    shape = ir.Shape(change(np.broadcast_to(np.int8(0), tensor.shape.numpy())).shape)
    return add_initializer(graph, name, ir.LazyTensor(read, dtype=dtype, shape=shape, name=name))
