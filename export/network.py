"""What a family's file describes, and the rest of this room traces, fills and writes: one network, one ONNX graph."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
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
    may also write KEY behind one of `key_prefixes`. `reason` says why the network is as it is. Weights that match
    `linears` bear 8 bits; None where none does. `factors` are what weights are multiplied by when they are read, for
    each pattern of names: powers of two, which `build` makes up for, so that activations fit `dtype`.
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
    factors: Mapping[re.Pattern[str], float] = field(default_factory=dict)

    def may_be_8_bit(self, weight: str) -> bool:
        """Whether the weight of that name may be quantised."""
        return self.linears is not None and self.linears.fullmatch(weight) is not None

    def factor(self, names: Iterable[str]) -> float:
        """What the weight that has these names is multiplied by: 1 for most."""
        fitting = {self.factors[p] for name in names for p in self.factors if p.fullmatch(name)}
        assert len(fitting) <= 1, f"{list(names)} has several factors: {fitting}"
        return fitting.pop() if fitting else 1.0
