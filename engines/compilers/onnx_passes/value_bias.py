"""The bias of attention's values, added after the attention, as a part of the next product's bias.

The weights of attention add up to 1, so that a bias of all values is a bias of the result: (A (V + 1 b)) W + c is
(A V) W + (b W + c). That saves a pass over the values. The sum b W + c is computed in fp32 when it is written.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ditforge.engines.compilers.onnx_passes.graph import (
    MICROSOFT,
    add_initializer,
    attribute,
    is_used_once,
    rank,
    sole_source,
    source,
)


def moved(graph: ir.Graph) -> int:
    """MultiHeadAttention of values with a bias, before a product with a bias, loses the former."""
    count = 0
    for found in list(graph):
        if (found.op_type, found.domain) != ("MultiHeadAttention", MICROSOFT):
            continue
        added, taker = reshaped_from(found.inputs[2]), reshaped_to(found.outputs[0])
        product, bias = biased(added)
        if added is None or product is None or bias is None or taker is None or taker.op_type != "MatMul":
            continue
        weight, end = weights(taker.inputs[1]), biased_end(taker.outputs[0])
        if weight is None or end is None:
            continue
        after, place, later = end
        after.replace_input_with(place, total(graph, later, bias, weight))
        ir.convenience.replace_all_uses_with(added.outputs[0], product)
        count += 1
    return count


def reshaped_from(value: ir.Value | None) -> ir.Node | None:
    """The Add behind Reshapes that a value comes from, if nothing else takes what is between."""
    reshape = sole_source(value, "Reshape")
    return reshaped_from(reshape.inputs[0]) if reshape is not None else sole_source(value, "Add")


def reshaped_to(value: ir.Value) -> ir.Node | None:
    """The node behind Reshapes that takes a value, if it is the only one."""
    user = only_user(value)
    return reshaped_to(user.outputs[0]) if user is not None and user.op_type == "Reshape" else user


def only_user(value: ir.Value) -> ir.Node | None:
    """The only node that takes a value, if there is one."""
    return next(iter(value.uses())).node if is_used_once(value) else None


def biased(added: ir.Node | None) -> tuple[ir.Value | None, ir.Value | None]:
    """The product and the bias that an Add adds."""
    for product, bias in (added.inputs, added.inputs[::-1]) if added is not None else ():
        if sole_source(product, "MatMul") is not None and is_bias(bias):
            return product, bias
    return None, None


def biased_end(value: ir.Value) -> tuple[ir.Node, int, ir.Value] | None:
    """The Add or BiasAdd that adds a bias to a value, or to its sum with something else, and that bias."""
    for _ in range(2):
        after = only_user(value)
        if after is None or after.op_type not in ("Add", "BiasAdd"):
            return None
        for place, later in enumerate(after.inputs):
            if later is not None and is_bias(later):
                return after, place, later
        value = after.outputs[0]
    return None


def is_bias(value: ir.Value | None) -> bool:
    """Whether a value is a vector that is stored in the graph."""
    return value is not None and value.is_initializer() and rank(value) == 1


def weights(value: ir.Value | None) -> list[ir.TensorProtocol] | None:
    """The tensor of a stored matrix, and its columns' scales where it is quantised."""
    dequantise = source(value, "DequantizeLinear")
    if dequantise is not None and (attribute(dequantise, "axis", 1) != 1 or len(dequantise.inputs) > 2):
        return None
    stored = list(dequantise.inputs) if dequantise is not None else [value]
    tensors = [item.const_value for item in stored if item is not None and item.is_initializer()]
    known = [tensor for tensor in tensors if tensor is not None]
    return known if len(known) == len(stored) and len(known[0].shape) == 2 else None


def total(graph: ir.Graph, later: ir.Value, bias: ir.Value, weight: list[ir.TensorProtocol]) -> ir.Value:
    """The initializer b W + c, which is computed when it is written."""
    first, second = bias.const_value, later.const_value
    assert first is not None and second is not None, "a bias without a value"
    name = f"{later.name}_with_{bias.name}"

    def read() -> ir.TensorProtocol:
        matrix = numbers(weight[0]) if len(weight) == 1 else numbers(weight[0]) * numbers(weight[1])
        summed = numbers(first) @ matrix + numbers(second)
        return ir.Tensor(summed.astype(second.dtype.numpy()), dtype=second.dtype, name=name)

    return add_initializer(
        graph, name, ir.LazyTensor(read, dtype=second.dtype, shape=ir.Shape(second.shape.numpy()), name=name)
    )


def numbers(tensor: ir.TensorProtocol) -> NDArray[np.float32]:
    """A tensor in fp32."""
    return tensor.numpy().astype(np.float32)
