"""RMS norms over heads that add the bias of the product before them, as SkipSimplifiedLayerNormalization.

The operator normalises the sum of its input and a second one, which may have fewer rows: here the bias, one row for
each head. That saves a pass over queries and one over keys.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ditforge.engines.compilers.onnx_passes.graph import (
    MICROSOFT,
    add_initializer,
    attribute,
    dimension,
    node,
    rank,
    replace,
    reshape,
    sole_source,
)


def biased(graph: ir.Graph) -> int:
    """Add of a bias, Reshape into heads and RMSNormalization become one norm between two Reshapes."""
    count = 0
    for found in list(graph):
        if found.op_type != "RMSNormalization" or attribute(found, "axis", -1) not in (-1, 3):
            continue
        split = sole_source(found.inputs[0], "Reshape")
        added = sole_source(split.inputs[0], "Add") if split is not None else None
        heads, head_dim = dimension(found.inputs[0], 2), dimension(found.inputs[0], 3)
        if split is None or added is None or rank(found.inputs[0]) != 4 or heads is None or head_dim is None:
            continue
        product, bias = added.inputs if sole_source(added.inputs[0], "MatMul") else added.inputs[::-1]
        if bias is None or not bias.is_initializer() or bias.shape != (heads * head_dim,):
            continue
        if sole_source(product, "MatMul") is None:
            continue
        assert product is not None, "a MatMul without an output"
        rows = reshape(graph, product, (-1, heads, head_dim))
        skip = in_rows(graph, bias, heads, head_dim)
        attributes = {"epsilon": float(attribute(found, "epsilon", 1e-5))}
        inputs = [rows.outputs[0], skip, found.inputs[1]]
        normed = node("SkipSimplifiedLayerNormalization", inputs, attributes, like=product, domain=MICROSOFT)
        back = node("Reshape", [normed.outputs[0], split.inputs[1]], shape=found.outputs[0].shape)
        back.attributes["allowzero"] = ir.AttrInt64("allowzero", int(attribute(split, "allowzero", 0)))
        replace(graph, found, [rows, normed, back])
        count += 1
    return count


def in_rows(graph: ir.Graph, bias: ir.Value, heads: int, head_dim: int) -> ir.Value:
    """The bias [hidden] as [heads, head_dim]: the same numbers of the same file where it is in one."""
    name, tensor = f"{bias.name}_of_heads", bias.const_value
    assert tensor is not None, f"{bias.name} has no value"
    if name in graph.initializers:
        return graph.initializers[name]
    shape = ir.Shape([heads, head_dim])
    if isinstance(tensor, ir.ExternalTensor):
        place = tensor.location, tensor.offset, tensor.length, tensor.dtype
        return add_initializer(graph, name, ir.ExternalTensor(*place, shape=shape, name=name, base_dir=tensor.base_dir))
    numbers = np.asarray(tensor.numpy()).reshape(heads, head_dim)
    return add_initializer(graph, name, ir.Tensor(numbers, dtype=tensor.dtype, name=name))
