"""A change: what an adapter does to the weight of one module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch

from ditforge.errors import UserError
from ditforge.export.checkpoint.lazy_tensors import Lazy

Apply = Callable[[Lazy, Lazy, float], Lazy]
Parts = dict[str, Lazy]  # the tensors that an adapter has for one module, by the parts of keys.py


@dataclass(frozen=True)
class Change:
    """A change of one weight, in the layout in which the adapter's file names its module.

    rows: how many rows the weight must have. row: how many numbers each row must have; None if any number fits.
    sizes: the shapes in the file, for error messages.
    apply: takes the weight as earlier adapters left it, the weight of the checkpoint, and the strength. Returns the
        weight with the adapter, in float32, unread.
    delta: what a strength of 1 adds to the weight, if that does not depend on the weight.
    """

    rows: int
    row: int | None
    sizes: str
    apply: Apply
    delta: Lazy | None = None


def addition(delta: Lazy, sizes: str) -> Change:
    """Return the change W + strength * delta. delta has as many rows as W, and as many numbers in each."""

    def apply(current: Lazy, base: Lazy, strength: float) -> Lazy:
        def read(start: int, stop: int) -> torch.Tensor:
            weight = current.read_rows(start, stop).float()
            return weight + strength * finite(delta, start, stop).reshape(weight.shape)

        return current.each_row(read, torch.float32)

    return Change(delta.length, prod(delta.shape[1:]), sizes, apply, delta)


def finite(tensor: Lazy, start: int, stop: int) -> torch.Tensor:
    """Read rows of the tensor in float32. Raises UserError if there is a NaN or an infinity among them."""
    values = tensor.read_rows(start, stop).float()
    if not torch.isfinite(values).all():
        raise UserError(f"{tensor.file} holds NaN or infinity: such an adapter spoils the weights", "use another file")
    return values


def whole(tensor: Lazy) -> torch.Tensor:
    """Read the whole tensor in float32. Raises UserError as finite() does."""
    return finite(tensor, 0, tensor.length)


def computed(like: Lazy, compute: Callable[[], torch.Tensor]) -> Lazy:
    """Return a tensor of the shape of `like` whose rows cannot be computed alone: `compute` returns all of them."""
    return like.each_row(lambda start, stop: compute()[start:stop], torch.float32)


def shapes(*tensors: Lazy) -> str:
    """Return the shapes of the tensors as text."""
    return " times ".join(str(list(tensor.shape)) for tensor in tensors)


def need(parts: Parts, names: tuple[str, ...], module: str) -> tuple[Lazy, ...]:
    """Return the parts with these names. Raises UserError if one is missing."""
    for name in names:
        if name not in parts:
            file = next(iter(parts.values())).file
            raise UserError(f"{file}: {module} has no {name}", "copy the file again")
    return tuple(parts[name] for name in names)


def misfit(module: str, sizes: str, file: object) -> UserError:
    """Return the error for tensors of one adapter that do not fit each other."""
    return UserError(f"{file}: {module} is {sizes}, which do not fit each other", "copy the file again")
