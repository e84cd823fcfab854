"""Measure how much device memory a network needs. Fake tensors are used, so this takes seconds and no weights.

The activations are those of PyTorch's eager execution, where the inputs and outputs of an operator are in memory at the
same time. An engine that fuses operators needs less; docs/memory.md compares the two.
"""

from __future__ import annotations

import math
import re
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from ditforge.export.graph.tracing import PREFIX, fake, quiet
from ditforge.export.network import BATCH, Dim, Network, Port
from ditforge.footprint import Footprint
from ditforge.model import Model

SIDES = (1 / 4, 1 / 2, 1, 3 / 2, 2, 4)  # the sides of the pictures that are measured, relative to the default size
FUSED_HEAD = 256  # the most channels of a head that kernels such as FlashAttention take (arXiv:2307.08691)
BLOCK = re.compile(r"(.*?\.\d+)\.")  # the start of the names of a block's weights


@dataclass(frozen=True)
class Measured:
    """What was measured of a network.

    parameters: the shapes of the parameters that the network reads, by name.
    activations: the peak bytes of activations, by the side of the picture in pixels.
    flops: the floating point operations of matrix products, convolutions and attention, by the side of the picture in
        pixels. A multiplication and the addition of its result count as two.
    """

    network: Network
    parameters: dict[str, tuple[int, ...]]
    activations: dict[int, int]
    flops: dict[int, int]

    def footprint(self, scheme: str | None = None) -> Footprint:
        """Return the memory that the network takes, in bytes, with its linears in the 8-bit format `scheme`.

        `scheme` None means that all weights have the network's dtype. A GPU that multiplies in that dtype first
        converts the 8-bit weights of a linear to it, so the converted weights of the largest linear are counted too.
        """
        width, widened = self.network.dtype.itemsize, 0
        blocks: dict[str, int] = {}
        for name, shape in self.parameters.items():
            count = math.prod(shape)
            eight_bit = scheme is not None and self.network.may_be_8_bit(name)
            size = count + width * shape[0] if eight_bit else count * width  # with a scale for each output channel
            widened = max(widened, count * width) if eight_bit else widened
            found = BLOCK.match(name)
            block = found[1] if found else name
            blocks[block] = blocks.get(block, 0) + size
        return Footprint(
            weights=sum(blocks.values()),
            largest_block=max(blocks.values(), default=0),
            activations={side: size + widened for side, size in self.activations.items()},
            flops=self.flops,
        )


def measured_sides(model: Model) -> list[int]:
    """Return the sides in pixels of the pictures to measure: SIDES times the default size, up to the largest size."""
    multiple = model.size_multiple
    largest = model.max_size // multiple * multiple
    wanted = (round(model.default_size * part / multiple) * multiple for part in SIDES)
    return sorted({min(max(side, multiple), largest) for side in wanted})


def runs(network: Network, model: Model) -> list[int]:
    """Return the sides in pixels of the pictures to measure the network with.

    It is only the default size if no input of the network depends on the picture's size.
    """
    varies = any(isinstance(dim, Dim) and dim != BATCH for port in network.inputs.values() for dim in port.shape)
    return measured_sides(model) if varies else [model.default_size]


def measure(network: Network, model: Model, step: Callable[[], None] | None = None) -> Measured:
    """Run the network with fake tensors on one sample of each size. `step` is called after each.

    At the first size the whole network is run. At the other sizes, only the first two of each row of equal blocks are
    run, provided that this does not change the memory at the first size. The operations that are counted are then
    scaled up to all blocks.
    """
    first, *others = runs(network, model)
    report = step or (lambda: None)
    with fake(network), quiet():
        module = network.build().eval()
        names = {parameter.untyped_storage()._cdata: name for name, parameter in module.named_parameters()}
        shapes = {name.removeprefix(PREFIX): tuple(p.shape) for name, p in module.named_parameters()}
        given = (*module.parameters(), *module.buffers())

        def run(side: int) -> Live:
            sample = {name: _sample(port, side, model) for name, port in network.inputs.items()}
            live = Live((*given, *sample.values()))
            with live:
                module(**sample)
            live.peak += sum(tensor.untyped_storage().nbytes() for tensor in sample.values())
            return live

        whole = short = run(first)
        report()
        activations, flops = {first: whole.peak}, {first: sum(whole.flops.values())}
        with shortened(module) if others else nullcontext() as lists:
            if lists:
                short = run(first)
                if short.peak != whole.peak:
                    restore(lists)
                    short = whole
            for side in others:
                live = run(side)
                activations[side] = live.peak
                flops[side] = round(
                    sum(count * whole.flops[kind] / short.flops[kind] for kind, count in live.flops.items())
                )
                report()
    used = [names[storage].removeprefix(PREFIX) for storage in names if storage in whole.read]
    return Measured(network, {name: shapes[name] for name in used}, activations, flops)


Lists = list[tuple[nn.Module, str, nn.ModuleList]]


@contextmanager
def shortened(module: nn.Module) -> Iterator[Lists]:
    """Within this context, each row of equal modules in the module's lists is cut to its first two modules.

    Yields the lists that were replaced. They are put back at the end.
    """
    lists: Lists = []
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.ModuleList):
                rows = (list(row) for _, row in groupby(child, built))
                kept = [one for row in rows for one in row[:2]]
                if len(kept) < len(child):
                    lists.append((parent, name, child))
                    setattr(parent, name, nn.ModuleList(kept))
    try:
        yield lists
    finally:
        restore(lists)


def restore(lists: Lists) -> None:
    """Put back the lists of modules that shortened() replaced."""
    for parent, name, whole in lists:
        setattr(parent, name, whole)


def built(module: nn.Module) -> tuple[object, ...]:
    """Return a key that is equal for modules of the same class whose parameters have the same names and shapes."""
    return type(module), tuple((name, tuple(p.shape)) for name, p in module.named_parameters())


def _sample(port: Port, side: int, model: Model) -> Tensor:
    """Return an input for one picture of side x side pixels. (`multiple` of a Dim is not multiplied in again.)"""

    def size(dim: Dim) -> int:
        return 1 if dim == BATCH else side // (model.vae_factor if dim.name.startswith("latent_") else 1)

    return torch.zeros([size(dim) if isinstance(dim, Dim) else dim for dim in port.shape], dtype=port.dtype)


class Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A context that records the memory and the operations of everything that is run within it.

    peak: the most bytes of tensors that were in memory at the same time. Tensors count by their storage, so a view
        costs nothing. The tensors in `given` do not count.
    read: the storages of the tensors that were read.
    flops: the floating point operations, by operator.
    """

    def __init__(self, given: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self.known = {tensor.untyped_storage()._cdata for tensor in given}
        self.read: set[int] = set()
        self.flops: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        self.read |= {tensor.untyped_storage()._cdata for tensor in tensors((args, kwargs))}
        for tensor in tensors(result):
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self.known:
                self.known.add(key)
                self.live += size
                weakref.finalize(storage, self.freed, key, size)
        attention = "scaled_dot_product" in str(function)
        if attention:
            self.flops["attention"] += attention_flops(args)
        elif count := flop_registry.get(function._overloadpacket):
            self.flops[str(function._overloadpacket)] += count(*args, **(kwargs or {}), out_val=result)
        scratch = unfused_scores(args) if attention else 0
        self.peak = max(self.peak, self.live + scratch)
        return result

    def freed(self, key: int, size: int) -> None:
        """Note that a storage was freed. Its address can then be used by another one."""
        self.known.discard(key)
        self.live -= size


def tensors(tree: object) -> list[Tensor]:
    """Return the tensors among an operator's arguments or results."""
    return [leaf for leaf in tree_iter(tree) if isinstance(leaf, Tensor)]


def attention_flops(args: tuple[Any, ...]) -> int:
    """Count the floating point operations of attention: those of the scores, and of the weighted sum of the values."""
    query, key, value = args[:3]
    rows: int = math.prod(query.shape[:-1])
    operations: int = 2 * rows * key.shape[-2] * (query.shape[-1] + value.shape[-1])
    return operations


def unfused_scores(args: tuple[Any, ...]) -> int:
    """Return the bytes of attention's scores, before and after the softmax.

    It is 0 where a fused kernel keeps the scores in registers, that is for heads of up to FUSED_HEAD channels.
    """
    query, key = args[:2]
    scores = math.prod(query.shape[:-1]) * key.shape[-2] * query.dtype.itemsize
    return 2 * scores if query.shape[-1] > FUSED_HEAD else 0
