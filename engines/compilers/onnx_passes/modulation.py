"""A layer norm with a scale and shift for each sample, as one LayerNormalization.

ONNX Runtime's kernels take a Scale and a B of [B, 1, D] beside an X of [B, tokens, D], which ONNX's definition does not
promise. They multiply and add in fp32. Source: onnxruntime/core/providers/cpu/nn/layer_norm_helper.h
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ditforge.engines.compilers.onnx_passes.graph import dimension, node, number, rank, replace, sole_source


def modulated(graph: ir.Graph) -> int:
    """LayerNormalization without weights, Mul and Add of [B, 1, D] become one LayerNormalization."""
    count = 0
    for found in list(graph):
        if found.op_type != "Add" or found.domain:
            continue
        for product, shift in (found.inputs, found.inputs[::-1]):
            multiplied = sole_source(product, "Mul")
            if multiplied is None or not is_for_samples(shift):
                continue
            pairs = (multiplied.inputs, multiplied.inputs[::-1])
            match = next(((norm, scale) for value, scale in pairs if (norm := plain_norm(value))), None)
            if match is None or not is_for_samples(match[1]):
                continue
            norm, scale = match
            attributes = {name: attribute.value for name, attribute in norm.attributes.items()} | {"axis": 2}
            inputs = [norm.inputs[0], scale, shift]
            replace(graph, found, [node("LayerNormalization", inputs, attributes, like=norm.inputs[0])])
            count += 1
            break
    return count


def plain_norm(value: ir.Value | None) -> ir.Node | None:
    """The LayerNormalization over the last of three dimensions that gives a value, if its weights change nothing."""
    norm = sole_source(value, "LayerNormalization")
    if norm is None or rank(norm.inputs[0]) != 3 or norm.attributes["axis"].as_int() not in (-1, 2):
        return None
    weights, bias = number(norm.inputs[1]), number(norm.inputs[2]) if len(norm.inputs) > 2 else np.zeros(1)
    plain = weights is not None and bool((weights == 1).all()) and bias is not None and not bias.any()
    return norm if plain else None


def is_for_samples(value: ir.Value | None) -> bool:
    """Whether a value is [B, 1, D]: one row for each sample."""
    return rank(value) == 3 and dimension(value, 1) == 1
