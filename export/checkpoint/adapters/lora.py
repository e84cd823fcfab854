"""LoRA: the product of two small matrices is added, alpha / rank * up @ down (arXiv:2106.09685).

With a third tensor between the two, it is a convolution's Tucker decomposition, as LyCORIS writes it (LoCon).
"""

from __future__ import annotations

import torch

from ditforge.errors import UserError
from ditforge.export.checkpoint.adapters.changes import Parts, misfit, shapes
from ditforge.export.checkpoint.lazy_tensors import Lazy


def rank(parts: Parts, module: str) -> int:
    """Return the rank of a LoRA with both matrices. Raises UserError if one is missing, or if the rank is 0."""
    for side, lost in (("lora_up", "up"), ("lora_down", "down")):
        if side not in parts:
            file = next(iter(parts.values())).file
            raise UserError(f"{file}: {module} has no {lost} matrix", "copy the file again")
    down = parts["lora_down"]
    if not down.shape or not down.length:
        raise UserError(f"{down.file}: {module} has a rank of 0", "copy the file again")
    return down.length


def delta(parts: Parts, module: str, scale: float) -> tuple[Lazy, str]:
    """Return scale * up @ down, unread, and the shapes as text. up is [out, rank, …], down is [rank, in, …].

    A part `lora_mid` is [rank, rank, height, width]. Raises UserError for matrices that cannot be multiplied.
    """
    up, down, mid = parts["lora_up"], parts["lora_down"], parts.get("lora_mid")
    sizes = shapes(up, down) if mid is None else shapes(up, mid, down)
    if up.shape[1:2] != (down.length,) or (mid is not None and mid.shape[:2] != (down.length, down.length)):
        raise misfit(module, sizes, up.file)

    def read(start: int, stop: int) -> torch.Tensor:
        left, right = up.read_rows(start, stop).float().flatten(1), down.read().float().flatten(1)
        if mid is None:
            return scale * (left @ right)
        return scale * torch.einsum("m n ..., i m, n j -> i j ...", mid.read().float(), left, right)

    row = down.shape[1:] if mid is None else (down.shape[1], *mid.shape[2:])
    return up.each_row(read, torch.float32, row), sizes


def bias_delta(bias: Lazy, scale: float) -> Lazy:
    """Return what a LoRA with a bias (PEFT's `lora_bias`) adds to the bias of the module: scale * bias."""
    return bias.each_row(lambda start, stop: scale * bias.read_rows(start, stop).float(), torch.float32)
