"""What a family's file describes, and the rest of this room traces, fills and writes: one network, one ONNX graph."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class Dim:
    """A dimension that varies: a whole `multiple` of a number named `name` (`Dim("height", 8)`: 8, 16, 24, …)."""

    name: str
    multiple: int = 1


BATCH = Dim("batch")


@dataclass(frozen=True)
class Port:
    """An input or output of a network: its dtype and shape, batch first; a dimension is a number or a Dim."""

    dtype: torch.dtype
    shape: tuple[int | Dim, ...]

    def names(self) -> tuple[int | str, ...]:
        """The shape with the names of the dimensions that vary."""
        return tuple(dim.name if isinstance(dim, Dim) else dim for dim in self.shape)


@dataclass(frozen=True)
class Network:
    """One ONNX graph to be.

    `build` makes the module; it runs under fake tensors and with `dtype` as the default dtype, so it takes no memory.
    Its parameters are `module.KEY`, where KEY is what the checkpoint calls them in the folder `weights`; a checkpoint
    may also write KEY behind one of `key_prefixes`. `reason` says why `dtype` is the safe one for this network. Weights
    that match `linears` bear 8 bits; None where none does.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: dict[str, Port]
    outputs: dict[str, Port]
    weights: str
    dtype: torch.dtype
    reason: str
    key_prefixes: tuple[str, ...] = ()
    linears: re.Pattern[str] | None = None

    def may_be_8_bit(self, weight: str) -> bool:
        """Whether the weight of that name may be quantised."""
        return self.linears is not None and self.linears.fullmatch(weight) is not None
