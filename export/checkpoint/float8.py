"""Dequantise the weights that a checkpoint stores in float8, as ComfyUI's files do."""

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
# ComfyUI's older and newer names (comfy/ops.py). A weight is the float8 tensor times its scale. The RUNTIME_KEYS tell
# ComfyUI's runtime how to multiply, and are not needed here.
SCALES = (".scale_weight", ".weight_scale")
RUNTIME_KEYS = re.compile(r"(.*\.)?(scaled_fp8|scale_input|input_scale|comfy_quant)")


def dequantised(tensors: Tensors) -> dict[str, Lazy]:
    """Return the tensors with all float8 weights dequantised, unread.

    A weight with a scale is multiplied by it and becomes float32; a scale has the shape [] or one number for each row.
    A weight without a scale becomes bfloat16, which represents every float8 number exactly. Raises UserError for
    weights packed into integers, and for a scale of another shape.
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
    """Return the weight `key` times its scale, in float32, unread.

    Raises UserError if the scale is neither a single number nor one number for each row.
    """
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
