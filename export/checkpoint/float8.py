"""Weights that a checkpoint stores in float8, as ComfyUI's files do, as numbers again."""

from __future__ import annotations

import re
from collections.abc import Callable
from math import prod

import torch

from ditforge.errors import UserError
from ditforge.export.checkpoint.conversion import Tensors
from ditforge.export.checkpoint.lazy_tensors import Lazy
from ditforge.export.checkpoint.refused_formats import FULL

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
# ComfyUI's names, older and newer (comfy/ops.py): a weight is float8 times its scale; the others tell its runtime how
# to multiply, and are of no use here.
SCALES = (".scale_weight", ".weight_scale")
RUNTIME_KEYS = re.compile(r"(.*\.)?(scaled_fp8|scale_input|input_scale|comfy_quant)")


def dequantised(tensors: Tensors) -> dict[str, Lazy]:
    """The same with float8 weights as numbers: times their scale in float32 where they have one, else in bfloat16.

    Each float8 number is a bfloat16 number. Scales are [] or one a row. Raises UserError for packed integer weights.
    """
    scales = {key.removesuffix(s) + ".weight": t for key, t in tensors.items() for s in SCALES if key.endswith(s)}
    found = {}
    for key, tensor in tensors.items():
        if key.endswith(SCALES) or RUNTIME_KEYS.fullmatch(key):
            continue
        if key.endswith(".weight") and not tensor.dtype.is_floating_point:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UserError(f"{tensor.file}: {key} is {kind}, weights packed in a way that is not known", FULL)
        if key in scales:
            found[key] = scaled(key, tensor, scales[key])
        elif tensor.dtype in FLOAT8:
            found[key] = tensor.each_row(_in_bfloat16(tensor), torch.bfloat16)
        else:
            found[key] = tensor
    return found


def scaled(key: str, tensor: Lazy, scale: Lazy) -> Lazy:
    """The tensor times its scale, in float32. Raises UserError if the scale has another shape than [] or one a row."""
    numbers = prod(scale.shape)
    if numbers not in (1, tensor.length) or (scale.shape and scale.shape[0] != numbers):
        problem = f"{tensor.file}: the scale of {key} has shape {list(scale.shape)}, the weight {list(tensor.shape)}"
        raise UserError(problem, "use a file with one scale for each weight, or for each of its rows")

    def read(start: int, stop: int) -> torch.Tensor:
        values = (scale.read() if numbers == 1 else scale.read_rows(start, stop)).float().reshape(-1)
        return tensor.read_rows(start, stop).float() * values.reshape(-1, *(1,) * (len(tensor.shape) - 1))

    return tensor.each_row(read, torch.float32)


def _in_bfloat16(tensor: Lazy) -> Callable[[int, int], torch.Tensor]:
    return lambda start, stop: tensor.read_rows(start, stop).to(torch.bfloat16)
