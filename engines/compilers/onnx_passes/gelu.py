"""GELU with the bias before it in one operator, and the products of a number and its sigmoid as QuickGelu.

ONNX Runtime's own optimiser does the same for older forms of GELU, but not for the operator of opset 20.
"""

from __future__ import annotations

import onnx_ir as ir

from ditforge.engines.compilers.onnx_passes.graph import MICROSOFT, attribute, node, number, replace, sole_source


def biased(graph: ir.Graph) -> int:
    """Gelu of a product and its bias becomes FastGelu where it is the approximation by tanh, and BiasGelu elsewhere."""
    count = 0
    for found in list(graph):
        added = sole_source(found.inputs[0], "Add") if (found.op_type, found.domain) == ("Gelu", "") else None
        if added is None:
            continue
        product, bias = added.inputs if sole_source(added.inputs[0], "MatMul") else added.inputs[::-1]
        if sole_source(product, "MatMul") is None or bias is None or not bias.is_initializer():
            continue
        if bias.shape is None or len(bias.shape) != 1:
            continue
        operator = "FastGelu" if attribute(found, "approximate", "none") == "tanh" else "BiasGelu"
        replace(graph, found, [node(operator, [product, bias], like=product, domain=MICROSOFT)])
        count += 1
    return count


def with_sigmoid(graph: ir.Graph) -> int:
    """x * sigmoid(alpha * x), which is SiLU where alpha is 1, becomes QuickGelu."""
    count = 0
    for found in list(graph):
        if (found.op_type, found.domain) != ("Mul", ""):
            continue
        for value, factor in (found.inputs, found.inputs[::-1]):
            sigmoid = sole_source(factor, "Sigmoid")
            if sigmoid is None or value is None:
                continue
            alpha = 1.0
            if sigmoid.inputs[0] is not value:
                scaled = sole_source(sigmoid.inputs[0], "Mul")
                if scaled is None or value not in scaled.inputs:
                    continue
                numbers = number(scaled.inputs[1] if scaled.inputs[0] is value else scaled.inputs[0])
                if numbers is None or numbers.size != 1:
                    continue
                alpha = float(numbers.reshape(()))
            replace(graph, found, [node("QuickGelu", [value], {"alpha": alpha}, like=value, domain=MICROSOFT)])
            count += 1
            break
    return count
