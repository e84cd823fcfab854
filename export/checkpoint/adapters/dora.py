"""DoRA: the sum of weight and adapter is scaled so that its rows or columns get learned lengths (arXiv:2402.09353)."""

from __future__ import annotations

from math import prod

import torch

from ditforge.errors import UserError
from ditforge.export.checkpoint.adapters.changes import Change, computed, finite, whole
from ditforge.export.checkpoint.lazy_tensors import Lazy

EPSILON = torch.finfo(torch.float32).eps  # LyCORIS adds it to lengths, so that it divides by no zero


def of_peft(delta: Lazy, sizes: str, magnitude: Lazy, module: str) -> Change:
    """Return the change of PEFT's DoRA: magnitude / |W + s * delta| * (W + s * delta), for each row.

    magnitude has one number for each row. The strength s scales delta, as in diffusers and PEFT. If earlier adapters
    have changed the weight already, the norm is still that of the checkpoint's weight with this delta, and the factor
    applies to everything, as in PEFT's merge().
    """
    check(magnitude, delta.length, module)

    def apply(current: Lazy, base: Lazy, strength: float) -> Lazy:
        def read(start: int, stop: int) -> torch.Tensor:
            added = strength * finite(delta, start, stop).flatten(1)
            norm = (base.read_rows(start, stop).float().flatten(1) + added).norm(dim=1)
            weight = current.read_rows(start, stop).float()
            factor = whole(magnitude).reshape(-1)[start:stop] / norm
            result: torch.Tensor = factor[:, None] * (weight.flatten(1) + added)
            return result.reshape(weight.shape)

        return current.each_row(read, torch.float32)

    return Change(delta.length, prod(delta.shape[1:]), sizes, apply)


def of_lycoris(delta: Lazy, sizes: str, scale: Lazy, module: str) -> Change:
    """Return the change of LyCORIS' `dora_scale`, which LoRA, LoHa and LoKr can have: W' = scale / |W + delta| * that.

    scale is [out, 1, …] for the lengths of rows, or [1, in, …] for those of columns, which older versions use. The
    result is W + s * (W' - W) for the strength s, as in ComfyUI and in LyCORIS' apply_dora_scale(). Of several
    adapters, each starts with what the earlier ones left.
    """
    columns = scale.shape[:1] == (1,) and delta.length != 1
    check(scale, delta.shape[1] if columns else delta.length, module)

    def apply(current: Lazy, base: Lazy, strength: float) -> Lazy:
        def read(start: int, stop: int) -> torch.Tensor:
            weight = current.read_rows(start, stop).float()
            added = weight + finite(delta, start, stop).reshape(weight.shape)
            lengths = whole(scale).reshape(1, -1) if columns else whole(scale).reshape(-1, 1)[start:stop]
            lengths = lengths.reshape(*lengths.shape, *(1,) * (weight.ndim - 2))
            others = (0, *range(2, weight.ndim)) if columns else tuple(range(1, weight.ndim))
            norm: torch.Tensor = torch.linalg.vector_norm(added, dim=others, keepdim=True)
            return weight + strength * (added * lengths / (norm + EPSILON) - weight)

        if columns:
            return computed(current, lambda: read(0, current.length))
        return current.each_row(read, torch.float32)

    return Change(delta.length, prod(delta.shape[1:]), sizes, apply)


def check(magnitude: Lazy, numbers: int, module: str) -> None:
    """Raise UserError if the magnitude has not this many numbers, or one that is not finite."""
    if prod(magnitude.shape) != numbers:
        problem = (
            f"{magnitude.file}: the magnitude of {module} has shape {list(magnitude.shape)}, for {numbers} lengths"
        )
        raise UserError(problem, "copy the file again")
    whole(magnitude)
