"""Trace a network to an ONNX graph with fake tensors. They have only shapes and dtypes, so any size fits in memory."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import onnx_ir as ir
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import Dim as TorchDim

from ditforge.export.network import BATCH, Dim, Network, Port

# The first opset with RMSNormalization, RotaryEmbedding and Attention. Convolutions take bf16 from opset 22 on.
OPSET = 23
PREFIX = "module."  # the modules of Network.build have this before the checkpoint's keys in their parameters' names
# The sizes of the example inputs: at least 2 (1 would be traced as a constant), and different for each dimension.
EXAMPLE_BATCH = 2
EXAMPLE_SIZES = (4, 6, 10, 14)
TRACED_BATCHES = 63  # for 64 images and more, PyTorch's upsampling takes another branch, which has the same result


def trace(network: Network) -> tuple[ir.Model, dict[str, list[str]]]:
    """Trace the network, and return its graph and the names of its parameters.

    The parameters are initializers without values, named as in the checkpoint. The second result maps the name of each
    such initializer to all the names that the checkpoint may use for it: more than one where modules share a parameter.
    """
    with fake(network), quiet():
        module = network.build().eval()
        sizes = _example_sizes(network)
        example = {name: _example(port, sizes) for name, port in network.inputs.items()}
        program = torch.export.export(module, (), example, dynamic_shapes=_dynamic_shapes(network, sizes), strict=False)
        exported = torch.onnx.export(program, opset_version=OPSET, dynamo=True, optimize=False, verbose=False)
    assert exported is not None
    model = exported.model
    _name_ports(model, network)
    names = _parameter_names(module)
    aliases: dict[str, list[str]] = {}
    for name, value in list(model.graph.initializers.items()):
        if not isinstance(getattr(value.const_value, "raw", None), FakeTensor):
            continue  # this is a constant that tracing computed, so its value is known
        value.const_value = None
        key = names[name][0]
        model.graph.initializers.pop(name)
        value.name = key
        model.graph.initializers.add(value)
        aliases[key] = names[name]
    return model, aliases


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
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch._subclasses.fake_tensor")]
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


def _example(port: Port, sizes: dict[str, int]) -> torch.Tensor:
    shape = [dim.multiple * sizes[dim.name] if isinstance(dim, Dim) else dim for dim in port.shape]
    return torch.zeros(shape, dtype=port.dtype)


def _dynamic_shapes(network: Network, sizes: dict[str, int]) -> dict[str, dict[int, object]]:
    dims = {name: TorchDim(name, min=1, max=TRACED_BATCHES if name == BATCH.name else 1 << 16) for name in sizes}
    return {
        name: {
            axis: dims[dim.name] if dim.multiple == 1 else dim.multiple * dims[dim.name]
            for axis, dim in enumerate(port.shape)
            if isinstance(dim, Dim)
        }
        for name, port in network.inputs.items()
    }


def _parameter_names(module: torch.nn.Module) -> dict[str, list[str]]:
    """Map the name of each parameter to its keys in the checkpoint: several where modules share the parameter."""
    twins: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        twins.setdefault(id(parameter), []).append(name)
    return {name: [twin.removeprefix(PREFIX) for twin in group] for group in twins.values() for name in group}


def _name_ports(model: ir.Model, network: Network) -> None:
    """Give the graph's outputs the contract's names. Its inputs already have them, from the arguments of `forward`."""
    graph = model.graph
    assert [value.name for value in graph.inputs] == list(network.inputs), "the tracer reordered the inputs"
    for value, (name, port) in zip(graph.outputs, network.outputs.items(), strict=True):
        value.name = name
        assert value.dtype == ir.tensor(torch.zeros((), dtype=port.dtype)).dtype, f"{name} is {value.dtype}"
