"""The product of a concatenation as a sum of products, which saves writing and reading what is concatenated.

The weight's rows for each part lie one after the other in the file of weights, so that nothing is copied. In 16 bits
the sum is rounded once more than in one product.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from ditforge.engines.compilers.onnx_passes.graph import (
    add_initializer,
    attribute,
    dimension,
    node,
    rank,
    replace,
    sole_source,
    source,
)


def split(graph: ir.Graph) -> int:
    """MatMul of a Concat over the last dimension becomes a MatMul for each part, and Adds."""
    count = 0
    for found in list(graph):
        if (found.op_type, found.domain) != ("MatMul", ""):
            continue
        joined = sole_source(found.inputs[0], "Concat")
        if joined is None or attribute(joined, "axis", 0) not in (-1, (rank(joined.outputs[0]) or 0) - 1):
            continue
        widths = [dimension(part, -1) if rank(part) else None for part in joined.inputs]
        sizes = [width for width in widths if width is not None]
        weights = rows(graph, found.inputs[1], sizes) if len(sizes) == len(widths) else None
        if weights is None:
            continue
        made = [*weights[0]]
        products = [
            node("MatMul", [part, weight], like=joined.outputs[0], shape=found.outputs[0].shape)
            for part, weight in zip(joined.inputs, weights[1], strict=True)
        ]
        total, sums = products[0], list[ir.Node]()
        for product in products[1:]:
            total = node("Add", [total.outputs[0], product.outputs[0]], like=joined.outputs[0])
            total.outputs[0].shape = found.outputs[0].shape
            sums.append(total)
        replace(graph, found, [*made, *products, *sums])
        count += 1
    return count


def rows(graph: ir.Graph, weight: ir.Value | None, sizes: Sequence[int]) -> tuple[list[ir.Node], list[ir.Value]] | None:
    """The rows of a weight [K, N] for each part, and the nodes that dequantise them where the weight is quantised."""
    dequantise = source(weight, "DequantizeLinear")
    stored = dequantise.inputs[0] if dequantise is not None else weight
    if stored is None or not stored.is_initializer() or rank(stored) != 2 or dimension(stored, 0) != sum(sizes):
        return None
    if dequantise is not None and (attribute(dequantise, "axis", 1) != 1 or "block_size" in dequantise.attributes):
        return None
    made, values, start = list[ir.Node](), list[ir.Value](), 0
    for size in sizes:
        name = f"{stored.name}_rows_{start}"
        if name not in graph.initializers:
            assert stored.const_value is not None, f"{stored.name} has no value"
            add_initializer(graph, name, sliced(stored.const_value, name, start, size))
        value = graph.initializers[name]
        if dequantise is not None:
            attributes = {key: found.value for key, found in dequantise.attributes.items()}
            inputs = [value, *dequantise.inputs[1:]]
            again = node("DequantizeLinear", inputs, attributes, like=weight, shape=value.shape)
            made.append(again)
            value = again.outputs[0]
        values.append(value)
        start += size
    return made, values


def sliced(tensor: ir.TensorProtocol, name: str, start: int, count: int) -> ir.TensorProtocol:
    """Rows of a matrix: a part of the same file where it is in one, or read when they are written."""
    columns = tensor.shape.numpy()[1]
    shape = ir.Shape([count, columns])
    if isinstance(tensor, ir.ExternalTensor):
        row = tensor.nbytes // tensor.shape.numpy()[0]
        return ir.ExternalTensor(
            tensor.location,
            (tensor.offset or 0) + start * row,
            count * row,
            tensor.dtype,
            shape=shape,
            name=name,
            base_dir=tensor.base_dir,
        )

    def read() -> ir.TensorProtocol:
        return ir.Tensor(tensor.numpy()[start : start + count], dtype=tensor.dtype, name=name)

    return ir.LazyTensor(read, dtype=tensor.dtype, shape=shape, name=name)
