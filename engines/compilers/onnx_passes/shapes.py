"""Ranks and sizes of a graph's values, which the export leaves out. Weights are not read."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from ditforge.engines.compilers.onnx_passes.graph import dimension, number, source


def infer(model: ir.Model) -> ir.Model:
    """The model with shapes, as far as they follow from the inputs' and the weights'."""
    infer_all = ShapeInferencePass(data_prop=True)
    model = infer_all(model).model
    for node in model.graph:
        if node.op_type == "Reshape" and (sizes := reshaped(node.inputs[1])) is not None:
            node.outputs[0].shape = sizes
    return infer_all(model).model


def reshaped(target: ir.Value | None) -> ir.Shape | None:
    """The shape that a Reshape gives, of which sizes are known where `target` is put together of constants.

    ONNX's own inference knows none of them if one is not known.
    """
    parts = [target]
    joined = source(target, "Concat")
    if joined is not None:
        parts = list(joined.inputs)
    sizes: list[int | None] = []
    for part in parts:
        known = number(part)
        if known is not None:
            sizes += [int(size) if size > 0 else None for size in known.reshape(-1)]
            continue
        count = length(part)
        if count is None:
            return None
        sizes += [None] * count
    return ir.Shape(sizes)


def length(value: ir.Value | None) -> int | None:
    """How many sizes a value holds that a graph computes from shapes."""
    shape = source(value, "Shape")
    if shape is not None:
        start, end = (shape.attributes.get(name) for name in ("start", "end"))
        if end is not None:
            return end.as_int() - (start.as_int() if start is not None else 0)
    single = source(value, "Reshape")
    if single is not None:
        target = number(single.inputs[1])
        return 1 if target is not None and target.size == 1 else None
    return dimension(value, 0) if value is not None and value.shape is not None and len(value.shape) == 1 else None
