"""The description of one network, which becomes one ONNX graph.

The file of a model family makes these descriptions; the rest of the export traces the network, attaches its weights and
writes it.
"""

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
    """A dimension that varies, called `name`. Its sizes are multiples of `multiple`: `Dim("height", 8)` is 8, 16, …"""

    name: str
    multiple: int = 1


BATCH = Dim("batch")


OF_THE_EXPORT = "the number format of the export, or around its 8-bit layers"


@dataclass(frozen=True)
class Port:
    """An input or output of a network. The batch is the first dimension; each dimension is a fixed number or a Dim."""

    dtype: torch.dtype
    shape: tuple[int | Dim, ...]

    def names(self) -> tuple[int | str, ...]:
        """The shape, with the name of each dimension that varies in place of its size."""
        return tuple(dim.name if isinstance(dim, Dim) else dim for dim in self.shape)


@dataclass(frozen=True)
class Network:
    """The description of a network that will become one ONNX graph.

    name: the component's name, as in the contract (`dit`, `vae_decoder`, …).
    build: makes the module. It is called with fake tensors and with `dtype` as the default dtype, so it takes no
        memory. The module's parameters are named `module.KEY`, where KEY is the tensor's name in the checkpoint.
    inputs, outputs: the graph's ports by name.
    weights: the folder of the checkpoint that holds the weights, such as `transformer`.
    dtype: the dtype of the weights and of most of the computation.
    reason: why the network has this precision, and what it needs there; users read it.
    key_prefixes: prefixes that some checkpoints write before KEY.
    linears: a pattern of the names of the weights that may be quantised to 8 bits; None if no weight may.
    factors: for each pattern of names, the factor by which those weights are multiplied when they are read. Factors are
        powers of two that keep activations within the range of `dtype`; the module that `build` makes compensates them.
    unread: for each pattern of names of tensors that such checkpoints hold too, why the network does not need them.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: dict[str, Port]
    outputs: dict[str, Port]
    weights: str
    dtype: torch.dtype
    reason: str = OF_THE_EXPORT
    key_prefixes: tuple[str, ...] = ()
    linears: re.Pattern[str] | None = None
    factors: Mapping[re.Pattern[str], float] = field(default_factory=dict)
    unread: Mapping[re.Pattern[str], str] = field(default_factory=dict)

    def may_be_8_bit(self, weight: str) -> bool:
        """Return whether the weight with this name may be quantised to 8 bits."""
        return self.linears is not None and self.linears.fullmatch(weight) is not None

    def factor(self, names: Iterable[str]) -> float:
        """Return the factor for one weight, given all the names that it has. It is 1 for most weights."""
        fitting = {self.factors[p] for name in names for p in self.factors if p.fullmatch(name)}
        assert len(fitting) <= 1, f"{list(names)} has several factors: {fitting}"
        return fitting.pop() if fitting else 1.0
