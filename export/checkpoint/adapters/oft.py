"""OFT: the weight is rotated in blocks (arXiv:2306.07280), as LyCORIS and PEFT write it; BOFT (arXiv:2311.06243) too.

The rotation is Cayley's, (I + Q)(I - Q)^-1 of a skew matrix Q.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
from typing import Any

import torch

from ditforge.export.checkpoint.adapters.changes import Change, Parts, computed, misfit, shapes, whole
from ditforge.export.checkpoint.lazy_tensors import Lazy


def of_lycoris(parts: Parts, module: str, constraint: float) -> Change:
    """Return the change of LyCORIS: blocks of rows are rotated, and each row is then multiplied by `rescale`.

    oft_blocks is [blocks, size, size] for OFT and [stages, blocks, size, size] for BOFT. `constraint` is the file's
    alpha, 0 for none: the norm of Q is limited to it times the number of rows. The strength s makes s * R + (1 - s) * I
    of a rotation R.
    """
    blocks, rescale = parts["oft_blocks"], parts.get("rescale")
    sizes = shapes(blocks, *([rescale] if rescale else []))
    size = blocks.shape[-1] if len(blocks.shape) in (3, 4) else 0
    if not size or blocks.shape[-2] != size or (len(blocks.shape) == 4 and size % 2):
        raise misfit(module, sizes, blocks.file)
    rows = blocks.shape[-3] * size
    if rescale is not None and (not rescale.shape or rescale.shape[0] != rows):
        raise misfit(module, sizes, blocks.file)

    def apply(current: Lazy, base: Lazy, strength: float) -> Lazy:
        def compute() -> torch.Tensor:
            rotation = strength * _cayley(whole(blocks), constraint * rows) + (1 - strength) * torch.eye(size)
            weight = current.read().float()
            flat = weight.flatten(1)
            if rotation.ndim == 3:
                flat = torch.einsum("k n m, k n i -> k m i", rotation, flat.reshape(-1, size, flat.shape[1]))
            else:
                flat = _butterfly(rotation, flat)
            factor = whole(rescale).reshape(-1, 1) if rescale else 1.0
            return (flat.reshape(rows, -1) * factor).reshape(weight.shape)

        return computed(current, compute)

    return Change(rows, None, sizes, apply)


def _cayley(blocks: torch.Tensor, limit: float) -> torch.Tensor:
    skew = blocks - blocks.transpose(-1, -2)
    norm = skew.norm() + 1e-8
    if 0 < limit < norm:
        skew = skew * limit / norm
    identity = torch.eye(blocks.shape[-1])
    return (identity + skew) @ (identity - skew).inverse()


def _butterfly(rotations: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Rotate rows in stages: stage i mixes rows that lie 2^i half blocks apart (lycoris/functional/boft.py)."""
    size, inputs = rotations.shape[-1], weight.shape[1]
    for stage, rotation in enumerate(rotations):
        step = 2**stage * (size // 2)
        mixed = weight.reshape(-1, 2, step, inputs).transpose(1, 2).reshape(-1, size, inputs)
        mixed = torch.einsum("b i j, b j x -> b i x", rotation, mixed)
        weight = mixed.reshape(-1, step, 2, inputs).transpose(1, 2).reshape(-1, inputs)
    return weight


def of_peft(parts: Parts, module: str, config: Mapping[str, Any]) -> Change:
    """Return the change of PEFT: blocks of the inputs are rotated.

    oft_R is [blocks, n], with the n numbers above the diagonal of each Q. `config` is PEFT's configuration, with its
    defaults for what is missing. PEFT has no strength; here W + s * (W' - W) is taken for the strength s, as others do.
    """
    numbers = parts["oft_R"]
    size = (1 + isqrt(1 + 8 * numbers.shape[1])) // 2 if len(numbers.shape) == 2 else 0
    if size < 2 or size * (size - 1) // 2 != numbers.shape[1] or not numbers.length:
        raise misfit(module, shapes(numbers), numbers.file)
    shared = bool(config.get("block_share"))

    def apply(current: Lazy, base: Lazy, strength: float) -> Lazy:
        def read(start: int, stop: int) -> torch.Tensor:
            weight = current.read_rows(start, stop).float()
            rotation = _rotations(whole(numbers), size, config).transpose(1, 2)
            blocks = weight.reshape(weight.shape[0], -1, 1, size)
            rotated = (blocks @ rotation).reshape(weight.shape)
            return weight + strength * (rotated - weight)

        return current.each_row(read, torch.float32)

    # With shared blocks, the one rotation fits each number of inputs that its size divides.
    return Change(-1, None if shared else numbers.length * size, shapes(numbers), apply)


def _rotations(numbers: torch.Tensor, size: int, config: Mapping[str, Any]) -> torch.Tensor:
    skew = torch.zeros(numbers.shape[0], size, size)
    row, column = torch.triu_indices(size, size, 1)
    skew[:, row, column] = numbers
    skew = skew - skew.transpose(1, 2)
    if config.get("coft"):
        limit = float(config.get("eps", 6e-5)) / numbers.shape[0] ** 0.5
        norm = skew.norm(dim=(1, 2), keepdim=True)
        skew = torch.where(norm <= limit, skew, limit * skew / norm)
    identity = torch.eye(size)
    if not config.get("use_cayley_neumann", True):
        solved: torch.Tensor = torch.linalg.solve(identity + skew, identity - skew, left=False)
        return solved
    # The Neumann series of Cayley's rotation as peft/tuners/oft computes it, I + 2Q + 2Q^2 + …, the last term once.
    terms = int(config.get("num_cayley_neumann_terms", 5))
    last = max(terms, 4) - 1 if terms > 2 else terms - 1
    result, power = identity.expand_as(skew).clone(), skew
    for exponent in range(1, last + 1):
        result += power if exponent == last > 1 else 2 * power
        power = power @ skew
    return result
