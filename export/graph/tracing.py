"""Trace a network to an ONNX graph with fake tensors. They have only shapes and dtypes, so any size fits in memory."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim as TorchDim, ExportedProgram
from torch.func import functional_call

from ditforge.export.graph.joining import join
from ditforge.export.graph.recording import Part, kinds_of, record
from ditforge.export.network import BATCH, Dim, Network, Port
from ditforge.export.region import Function
from ditforge.regions import Call

# The first opset with RMSNormalization, RotaryEmbedding and Attention. Convolutions take bf16 from opset 22 on.
OPSET = 23
PREFIX = "module."  # the modules of Network.build have this before the checkpoint's keys in their parameters' names
# The sizes of the example inputs: at least 2 (1 would be traced as a constant), and different for each dimension.
EXAMPLE_BATCH = 2
EXAMPLE_SIZES = (4, 6, 10, 14)
TRACED_BATCHES = 63  # for 64 images and more, PyTorch's upsampling takes another branch, which has the same result


@dataclass(frozen=True)
class Traced:
    """A traced network, as a graph and as programs, which come from the same traces of its regions.

    model: the ONNX graph. Its parameters are initializers without values, named as in the checkpoint.
    aliases: for the name of each such initializer, all names that the checkpoint may use for it: more than one where
        modules share a parameter.
    calls: the calls of the programs, in the order in which they run.
    programs: the programs as torch.export saves them, by the kind of region.
    """

    model: ir.Model
    aliases: dict[str, list[str]]
    calls: tuple[Call, ...]
    programs: dict[str, bytes]


def trace(network: Network) -> Traced:
    """Trace the network: each kind of its regions once.

    Raises DitforgeError if the network computes something outside of its regions.
    """
    with fake(network), quiet():
        module = network.build().eval()
        sizes = _example_sizes(network)
        examples = [{n: _example(port, s) for n, port in network.inputs.items()} for s in (sizes, _other(sizes))]
        parts = record(network, module, examples)
        names = _parameter_names(module)
        kinds = kinds_of(parts)
        first = {kind: part for part, kind in reversed(list(zip(parts, kinds, strict=True)))}
        programs = {kind: trace_part(first[kind]) for kind in dict.fromkeys(kinds)}
        graphs = {kind: _graph_of(program) for kind, program in programs.items()}
        calls = tuple(
            Call(
                kind=kind,
                inputs=tuple(part.inputs),
                outputs=tuple(part.outputs),
                weights=tuple(names[part.prefix + name][0] for name in part.weights),
            )
            for part, kind in zip(parts, kinds, strict=True)
        )
    # Constants have values, which are not read right among fake tensors.
    with quiet():
        for graph in graphs.values():
            _fold_constants(graph)
        model = join(
            {kind: graph.graph for kind, graph in graphs.items()},
            calls,
            list(network.inputs),
            list(network.outputs),
            OPSET,
        )
        saved = {kind: _saved(program) for kind, program in programs.items()}
    _name_ports(model, network)
    keys = {group[0]: group for group in names.values()}
    aliases = {name: keys[name] for call in calls for name in call.weights}
    return Traced(model, aliases, calls, saved)


class Traceable(nn.Module):
    """A region as a module without parameters: it takes the region's inputs, and then its weights."""

    def __init__(self, part: Part) -> None:
        super().__init__()
        self.part = [part]  # in a list, so that its module does not become this one's

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        part = self.part[0]
        inputs = dict(zip(part.inputs, tensors, strict=False))
        weights = dict(zip(part.weights, tensors[len(inputs) :], strict=True))
        arguments = tuple(None if name is None else inputs[name] for name in part.given)
        if part.module is None:
            result = part.function(None, *arguments)
        else:
            named = {f"{Called.NAME}.{name}": weight for name, weight in weights.items()}
            result = functional_call(Called(part.function, part.module), named, arguments)
        results = (result,) if isinstance(result, Tensor) else tuple(result)
        # The next program expects dense tensors, and its own inputs are not to be given back.
        return tuple(results[place].contiguous() for place in part.places)


class Called(nn.Module):
    """A region's function with its module, as torch.func.functional_call takes it."""

    NAME = "module"

    def __init__(self, function: Function, module: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.module = module

    def forward(self, *arguments: Tensor | None) -> Any:
        return self.function(self.module, *arguments)


def trace_part(part: Part) -> ExportedProgram:
    """Trace a region to a program that takes the region's inputs and its weights."""
    parameters = dict(part.module.named_parameters(remove_duplicate=False)) if part.module is not None else {}
    inputs, weights = list(part.inputs.values()), [parameters[name].detach() for name in part.weights]
    varying = [dict.fromkeys(axes, TorchDim.DYNAMIC) for axes in part.varying]
    shapes = ((*varying, *({} for _ in weights)),)
    return torch.export.export(Traceable(part), (*inputs, *weights), dynamic_shapes=shapes, strict=False)


def _graph_of(program: ExportedProgram) -> ir.Model:
    """Convert a program to an ONNX graph, whose inputs are the program's."""
    exported = torch.onnx.export(program, opset_version=OPSET, dynamo=True, optimize=False, verbose=False)
    assert exported is not None
    return exported.model


def _fold_constants(model: ir.Model) -> None:
    """Fold constants, and remove operators without effect."""
    import onnxscript.optimizer

    with np.errstate(all="ignore"):  # the optimiser evaluates both sides of every Where, so it may divide by 0
        onnxscript.optimizer.optimize(model)


def _saved(program: ExportedProgram) -> bytes:
    """Return the program as torch.export saves it. Nothing of the machine that traced it stays in it."""
    for node in program.graph.nodes:
        for key in ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn"):
            node.meta.pop(key, None)
    program.example_inputs = None  # they are fake tensors, which would be stored as code
    stream = io.BytesIO()
    torch.export.save(program, stream)
    return stream.getvalue()


def dry_run(network: Network) -> list[tuple[list[str], tuple[int, ...]]]:
    """Make and run the network with fake tensors, which raises an error if its configuration is wrong.

    The error can be of any type: it comes from PyTorch's modules. Returns for each parameter the names that it may have
    in the checkpoint, and its shape.
    """
    with fake(network), quiet():
        module = network.build().eval()
        sizes = _example_sizes(network)
        module(**{name: _example(port, sizes) for name, port in network.inputs.items()})
    names = _parameter_names(module)
    return [(names[name], tuple(parameter.shape)) for name, parameter in module.named_parameters()]


@contextmanager
def fake(network: Network) -> Iterator[None]:
    """Within this context, new tensors have shapes and dtypes but no values. Parameters have the network's dtype."""
    with FakeTensorMode(allow_non_fake_inputs=True), default_dtype(network.dtype), torch.no_grad():
        yield


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Within this context, new modules have parameters of `dtype`. (Converting fake parameters afterwards fails.)"""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def quiet() -> Iterator[None]:
    """Hide the exporter's warnings that are of no use to users (missing torchvision, its own deprecations)."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch._subclasses.fake_tensor", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _example_sizes(network: Network) -> dict[str, int]:
    ports = (*network.inputs.values(), *network.outputs.values())
    names = dict.fromkeys(dim.name for port in ports for dim in port.shape if isinstance(dim, Dim) and dim != BATCH)
    return {BATCH.name: EXAMPLE_BATCH, **dict(zip(names, EXAMPLE_SIZES, strict=False))}


def _other(sizes: dict[str, int]) -> dict[str, int]:
    """Other sizes, in which every dimension differs that depends on any of them."""
    return {name: size + 1 for name, size in sizes.items()}


def _example(port: Port, sizes: dict[str, int]) -> torch.Tensor:
    shape = [dim.multiple * sizes[dim.name] if isinstance(dim, Dim) else dim for dim in port.shape]
    return torch.zeros(shape, dtype=port.dtype)


def _parameter_names(module: torch.nn.Module) -> dict[str, list[str]]:
    """Map the name of each parameter to its keys in the checkpoint: several where modules share the parameter."""
    twins: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        twins.setdefault(id(parameter), []).append(name)
    return {name: [twin.removeprefix(PREFIX) for twin in group] for group in twins.values() for name in group}


def _name_ports(model: ir.Model, network: Network) -> None:
    """Name the dimensions of the graph's inputs and outputs as the contract does."""
    graph = model.graph
    for values, ports in ((graph.inputs, network.inputs), (graph.outputs, network.outputs)):
        for value, (name, port) in zip(values, ports.items(), strict=True):
            assert value.name == name, f"the tracer reordered {name} and {value.name}"
            assert value.dtype == ir.tensor(torch.zeros((), dtype=port.dtype)).dtype, f"{name} is {value.dtype}"
            value.shape = ir.Shape(port.names())
