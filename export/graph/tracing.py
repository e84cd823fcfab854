"""A network becomes an ONNX graph, traced with fake tensors: shapes and dtypes only, so any size fits in memory."""

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

OPSET = 23  # the first with RMSNormalization, RotaryEmbedding and Attention; convolutions take bf16 from 22 on
PREFIX = "module."  # what Network.build puts before the checkpoint's keys
# The example's sizes: at least 2 (1 would be traced as a constant), and each dimension another one.
EXAMPLE_BATCH = 2
EXAMPLE_SIZES = (4, 6, 10, 14)
TRACED_BATCHES = 63  # from 64 images on, PyTorch's upsampling takes a branch of its own, to the same result


def trace(network: Network) -> tuple[ir.Model, dict[str, list[str]]]:
    """The network's graph, its parameters as initializers without values; and the names that each of these may have.

    Initializers are named as in the checkpoint; where modules share a parameter, all its names are given.
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
            continue  # a constant that tracing computed: its value is known
        value.const_value = None
        key = names[name][0]
        model.graph.initializers.pop(name)
        value.name = key
        model.graph.initializers.add(value)
        aliases[key] = names[name]
    return model, aliases


def dry_run(network: Network) -> list[tuple[list[str], tuple[int, ...]]]:
    """Make and run the network without values, which raises whatever is wrong with its configuration.

    Returns its parameters: the names that each may have in the checkpoint, and its shape.
    """
    with fake(network), quiet():
        module = network.build().eval()
        sizes = _example_sizes(network)
        module(**{name: _example(port, sizes) for name, port in network.inputs.items()})
    names = _parameter_names(module)
    return [(names[name], tuple(parameter.shape)) for name, parameter in module.named_parameters()]


@contextmanager
def fake(network: Network) -> Iterator[None]:
    """Tensors that are made inside have shapes and dtypes, but no values; parameters have the network's dtype."""
    with FakeTensorMode(allow_non_fake_inputs=True), default_dtype(network.dtype), torch.no_grad():
        yield


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Modules that are made inside have parameters of `dtype` (converting fake ones afterwards fails)."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporter's remarks to its developers (missing torchvision, deprecations of its own) from the user."""
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
    """For each name of a parameter, the checkpoint keys of it and of its twins (shared parameters)."""
    twins: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        twins.setdefault(id(parameter), []).append(name)
    return {name: [twin.removeprefix(PREFIX) for twin in group] for group in twins.values() for name in group}


def _name_ports(model: ir.Model, network: Network) -> None:
    """Give the graph's outputs the contract's names; the inputs have them from the module's arguments."""
    graph = model.graph
    assert [value.name for value in graph.inputs] == list(network.inputs), "the tracer reordered the inputs"
    for value, (name, port) in zip(graph.outputs, network.outputs.items(), strict=True):
        value.name = name
        assert value.dtype == ir.tensor(torch.zeros((), dtype=port.dtype)).dtype, f"{name} is {value.dtype}"
