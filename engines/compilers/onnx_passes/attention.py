"""Attention as com.microsoft.MultiHeadAttention, on [B, tokens, hidden] and without a Transpose.

Its CUDA kernels (flash attention, or CUTLASS's memory-efficient one) take half the time of the ONNX operator's.
Source: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

import onnx_ir as ir

from ditforge.engines.compilers.onnx_passes.graph import (
    MICROSOFT,
    attribute,
    axes,
    dimension,
    node,
    number,
    rank,
    replace,
    reshape,
    sole_user,
    source,
)
from ditforge.engines.compilers.onnx_passes.rotary import HEADS_FIRST


def multi_head(graph: ir.Graph) -> int:
    """Attention between Transposes, whose result is reshaped, becomes MultiHeadAttention and that Reshape.

    An additive mask of four dimensions is taken too. Others, a cache, grouped heads and a softcap are left alone.
    """
    count = 0
    for found in list(graph):
        if (found.op_type, found.domain) != ("Attention", "") or float(attribute(found, "softcap", 0.0)) != 0:
            continue
        given = [transposed(value) for value in found.inputs[:3]]
        mask = found.inputs[3] if len(found.inputs) > 3 else None
        if None in given or any(found.inputs[4:]) or any(out.uses() for out in found.outputs[1:]):
            continue
        query, key, value = (item for item in given if item is not None)
        heads, head_dim = dimension(query, 2), dimension(query, 3)
        if heads is None or head_dim is None or {dimension(key, 2), dimension(value, 2)} != {heads}:
            continue
        if mask is not None and (mask.dtype != query.dtype or rank(mask) != 4):
            continue
        back = sole_user(found.outputs[0], "Transpose")
        merged = sole_user(back.outputs[0], "Reshape") if back is not None and axes(back) == HEADS_FIRST else None
        if merged is None or not keeps_nothing(merged):
            continue
        flat = [reshape(graph, item, (0, 0, -1)) for item in (query, key, value)]
        attributes: dict[str, int | float] = {"num_heads": heads}
        if "scale" in found.attributes:
            attributes["scale"] = float(attribute(found, "scale", 0.0))
        if attribute(found, "is_causal", 0):
            attributes["unidirectional"] = 1
        inputs: list[ir.Value | None] = [item.outputs[0] for item in flat]
        if mask is not None:
            inputs += [None, None, mask]
        fused = node("MultiHeadAttention", inputs, attributes, like=query, domain=MICROSOFT)
        fused.outputs[0].shape = ir.Shape([None, None, heads * (dimension(value, 3) or head_dim)])
        final = node("Reshape", [fused.outputs[0], merged.inputs[1]], like=query, shape=merged.outputs[0].shape)
        final.attributes["allowzero"] = ir.AttrInt64("allowzero", int(attribute(merged, "allowzero", 0)))
        replace(graph, merged, [*flat, fused, final])
        count += 1
    return count


def transposed(value: ir.Value | None) -> ir.Value | None:
    """What a Transpose of tokens and heads takes, if the value comes from one."""
    found = source(value, "Transpose")
    return found.inputs[0] if found is not None and axes(found) == HEADS_FIRST else None


def keeps_nothing(reshaping: ir.Node) -> bool:
    """Whether a Reshape takes no dimension from its input, so that an input of other dimensions gives the same."""
    if attribute(reshaping, "allowzero", 0):
        return True
    sizes = number(reshaping.inputs[1])
    return sizes is not None and bool((sizes != 0).all())
