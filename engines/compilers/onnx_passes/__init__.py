"""Passes that put a traced graph into the form for which ONNX Runtime's CUDA provider has its best kernels.

One file is one idea. A pass takes a graph, changes it, and returns how often its pattern was there. It computes the
same, but for rounding, and asks no graph which network it is. Weights stay on disk.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import onnx_ir as ir

from ditforge.engines.compilers.onnx_passes import (
    attention,
    bias_add,
    eight_bit,
    gelu,
    head_norm,
    modulation,
    reshapes,
    resize,
    rotary,
    shapes,
    split_product,
    value_bias,
)
from ditforge.engines.compilers.onnx_passes.graph import MICROSOFT, Pass, name_values, remove_unused

# In this order: a pass finds what those before it have made.
PASSES: dict[str, Pass] = {
    "narrow rotation": rotary.narrow,
    "rotation before heads": rotary.tokens_first,
    "multi-head attention": attention.multi_head,
    "norm with bias": head_norm.biased,
    "modulated norm": modulation.modulated,
    "gelu with bias": gelu.biased,
    "gelu with sigmoid": gelu.with_sigmoid,
    "split product": split_product.split,
    "three terms": bias_add.three,
    "bias of values": value_bias.moved,
    "8-bit beside bf16": eight_bit.beside_bf16,
    "resize in fp32": resize.in_fp32,
    "merged heads": reshapes.merged,
}
NEEDED = ("8-bit beside bf16", "resize in fp32")  # without these the CUDA provider lacks a kernel


def load(graph: Path, weights: Path | None = None) -> ir.Model:
    """Read a graph, whose weights are in the folder `weights`, by default its own, and infer its shapes."""
    model = ir.load(graph)
    ir.external_data.set_base_dir(model.graph, weights or graph.parent)
    return shapes.infer(model)


def apply(model: ir.Model, names: Collection[str] = tuple(PASSES)) -> dict[str, int]:
    """Apply the passes of these names, in the order of PASSES. Returns how often each found its pattern."""
    graph = model.graph
    counts = {}
    for name, run in PASSES.items():
        if name in names:
            counts[name] = run(graph)
            remove_unused(graph)
    name_values(graph)
    model.opset_imports.setdefault(MICROSOFT, 1)
    graph.sort()
    return counts
