"""Differences and replacements of whole weights, biases and norms, as ComfyUI, LyCORIS and PEFT write them."""

from __future__ import annotations

from math import prod

import torch

from ditforge.export.checkpoint.adapters.changes import Change, addition, finite, shapes
from ditforge.export.checkpoint.lazy_tensors import Lazy


def difference(tensor: Lazy) -> Change:
    """Return the change that adds the tensor: `diff`, `diff_b`, `w_norm` and `b_norm`."""
    return addition(tensor, shapes(tensor))


def replacement(tensor: Lazy) -> Change:
    """Return the change that puts the tensor in the weight's place, whatever the strength: ComfyUI's `set_weight`, and
    the modules that PEFT trained as a whole (`modules_to_save`, `bias`)."""

    def apply(current: Lazy, base: Lazy, strength: float) -> Lazy:
        row = current.shape[1:]
        return current.each_row(lambda a, b: finite(tensor, a, b).reshape(b - a, *row), torch.float32)

    return Change(tensor.length, prod(tensor.shape[1:]), shapes(tensor), apply)
