"""Records of which regions a network consists, by running it with fake tensors: their kinds, inputs and weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from ditforge.errors import DitforgeError
from ditforge.export.network import Network
from ditforge.export.region import Function, recorded_by

Signature = tuple[Any, ...]


@dataclass
class Part:
    """A region of a network as it was recorded.

    function, module: what is called, with which weights.
    given: for each argument after the module, the name of the tensor; None where the argument is None.
    inputs, outputs: the tensors that it takes and gives, by name. What it gives back as it took it is no output.
    places: the places of the outputs among what the function returns.
    weights: the names of the module's parameters that it reads, in the order in which it first reads them.
    prefix: the module's name in the network, with a point at its end.
    varying: for each input, the dimensions that vary.
    """

    function: Function
    module: nn.Module | None
    given: tuple[str | None, ...]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    places: tuple[int, ...]
    weights: tuple[str, ...]
    prefix: str
    varying: list[set[int]] = field(default_factory=list)

    def signature(self) -> Signature:
        """Return what decides which program the region is traced to. Regions that agree in it share one."""
        parameters = dict(self.module.named_parameters(remove_duplicate=False)) if self.module is not None else {}
        inputs = list(self.inputs)
        return (
            self.function.__module__,
            self.function.__qualname__,
            tuple(None if name is None else inputs.index(name) for name in self.given),
            self.places,
            tuple(
                (tensor.dtype, tuple(-1 if axis in axes else size for axis, size in enumerate(tensor.shape)))
                for tensor, axes in zip(self.inputs.values(), self.varying, strict=True)
            ),
            tuple((name, tuple(parameters[name].shape), parameters[name].dtype) for name in self.weights),
            settings_of(self.module) if self.module is not None else (),
        )


class Reads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes which parameters are read, by the numbers of their storages."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: dict[int, None] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_iter((args, kwargs)):
            if isinstance(leaf, nn.Parameter):
                self.seen[storage(leaf)] = None
        return func(*args, **(kwargs or {}))


def storage(tensor: Tensor) -> int:
    """Return the number of a tensor's storage, which no other storage has while this one is alive."""
    return int(tensor.untyped_storage()._cdata)


def settings_of(module: nn.Module) -> Signature:
    """Return all plain attributes of a module and of those in it, which may decide what they compute."""
    return tuple(
        (name, type(part).__qualname__, *sorted((k, repr(v)) for k, v in vars(part).items() if is_setting(k, v)))
        for name, part in module.named_modules()
    )


def is_setting(name: str, value: object) -> bool:
    """Whether an attribute may decide what a module computes: a layer's own number, which is for caches, does not."""
    return name not in ("layer_idx", "training") and is_plain(value)


def is_plain(value: object) -> bool:
    """Whether a value is a number, a text, or several of these."""
    if isinstance(value, tuple | list):
        return all(map(is_plain, value))
    return value is None or isinstance(value, bool | int | float | str | torch.dtype)


def record(network: Network, module: nn.Module, examples: Sequence[dict[str, Tensor]]) -> list[Part]:
    """Run the network's module on fake tensors of different sizes. Returns its regions, in the order in which they ran.

    The regions have the tensors of the first example. Raises DitforgeError if a region takes a tensor that no region
    has made.
    """
    first, *others = (record_once(network, module, example) for example in examples)
    for parts in zip(first, *others, strict=True):
        for tensors in zip(*(part.inputs.values() for part in parts), strict=True):
            sizes = enumerate(zip(*(tensor.shape for tensor in tensors), strict=True))
            parts[0].varying.append({axis for axis, found in sizes if len(set(found)) > 1})
    return first


def record_once(network: Network, module: nn.Module, example: dict[str, Tensor]) -> list[Part]:
    """Run the network's module on one example, and return its regions."""
    parts: list[Part] = []
    known: list[tuple[Tensor, str]] = [(tensor, name) for name, tensor in example.items()]
    names = {id(tensor): name for tensor, name in known}  # `known` keeps the tensors, and so their ids, alive
    prefixes = {id(found): f"{name}." if name else "" for name, found in module.named_modules()}

    def called(function: Function, part: nn.Module | None, inputs: tuple[Tensor | None, ...]) -> Any:
        where = f"{function.__qualname__}, a region of {network.name},"
        if part is not None and id(part) not in prefixes:
            raise DitforgeError(f"{where} has a module that is not in the network", "a fault of the model's family")
        for tensor in inputs:
            if tensor is not None and id(tensor) not in names:
                problem = f"{where} takes a tensor {list(tensor.shape)} that no region made"
                raise DitforgeError(problem, "a fault of the model's family: compute it within a region")
        reads = Reads()
        with reads:
            result = function(part, *inputs)
        results = (result,) if isinstance(result, Tensor) else tuple(result)
        taken = {names[id(tensor)]: tensor for tensor in inputs if tensor is not None}
        order = tuple(None if tensor is None else names[id(tensor)] for tensor in inputs)
        given = {number: tensor for number, tensor in enumerate(results) if id(tensor) not in names}
        made = {f"{len(parts)}.{number}": tensor for number, tensor in given.items()}
        for name, tensor in made.items():
            known.append((tensor, name))
            names[id(tensor)] = name
        prefix = prefixes[id(part)] if part is not None else ""
        parts.append(Part(function, part, order, taken, made, tuple(given), read_by(part, reads), prefix))
        return result

    with recorded_by(called):
        result = module(**example)
    if not parts:  # it calls no region, so it is one
        result = called(whole(list(example)), module, tuple(example.values()))
    results = (result,) if isinstance(result, Tensor) else tuple(result)
    ends = {id(tensor): name for tensor, name in zip(results, network.outputs, strict=True)}
    if unknown := [name for key, name in ends.items() if key not in names]:
        problem = f"{network.name} computes its output {unknown[0]} outside of its regions"
        raise DitforgeError(problem, "a fault of the model's family: compute it within a region")
    renamed = {names[key]: name for key, name in ends.items()}
    for part in parts:
        part.given = tuple(None if name is None else renamed.get(name, name) for name in part.given)
        part.inputs = {renamed.get(name, name): tensor for name, tensor in part.inputs.items()}
        part.outputs = {renamed.get(name, name): tensor for name, tensor in part.outputs.items()}
    return parts


def whole(inputs: list[str]) -> Function:
    """Return the function that calls a module with inputs of these names: the region of a network without any."""

    def network(module: nn.Module, *tensors: Tensor) -> Any:
        return module(**dict(zip(inputs, tensors, strict=True)))

    return network


def read_by(module: nn.Module | None, reads: Reads) -> tuple[str, ...]:
    """Return the names of the module's parameters that were read, in the order of reading."""
    if module is None:
        return ()
    names: dict[int, str] = {}
    for name, parameter in module.named_parameters():
        names.setdefault(storage(parameter), name)
    return tuple(names[key] for key in reads.seen if key in names)


def kinds_of(parts: Iterable[Part]) -> list[str]:
    """Return the name of each region's kind: that of its function, with a number if the function has several kinds."""
    found: dict[Signature, str] = {}
    for part in parts:
        name, key = part.function.__name__.strip("_"), part.signature()
        if key not in found:
            same = sum(known.partition("-")[0] == name for known in found.values())
            found[key] = f"{name}-{same + 1}" if same else name
    return [found[part.signature()] for part in parts]
