"""Join the graphs of regions into the graph of a network."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir
from torch._subclasses.fake_tensor import FakeTensor

from ditforge.regions import Call


def join(
    graphs: Mapping[str, ir.Graph], calls: Sequence[Call], inputs: Iterable[str], outputs: Collection[str], opset: int
) -> ir.Model:
    """Join the graphs of regions, one copy for each call, into one graph with these inputs and outputs by name.

    Each graph takes the tensors of a call, and then its weights. Weights become initializers without values. Only they
    and the ports have shapes in the result.
    """
    values: dict[str, ir.Value] = {}
    weights: dict[str, ir.Value] = {}
    constants: dict[str, ir.Value] = {}
    nodes: list[ir.Node] = []
    ports = first_uses(graphs, calls)
    for name in inputs:
        values[name] = new_value(name, ports[name])
    for number, call in enumerate(calls):
        copy = graphs[call.kind].clone()
        for name, port in zip(call.weights, copy.inputs[len(call.inputs) :], strict=True):
            if name not in weights:
                weights[name] = new_value(name, port)
        given = [*(values[name] for name in call.inputs), *(weights[name] for name in call.weights)]
        for value, source in zip(list(copy.inputs), given, strict=True):
            value.replace_all_uses_with(source)
        for name, value in list(copy.initializers.items()):
            assert not isinstance(getattr(value.const_value, "raw", None), FakeTensor), f"{name} is no weight"
            key = f"{call.kind}.{name}"
            if key not in constants:
                constants[key] = new_value(key, value, copied(key, value))
            value.replace_all_uses_with(constants[key])
        results = list(copy.outputs)
        copy.outputs.clear()
        own = list(copy)
        copy.remove(own)
        for node in own:
            node.name = f"{number}.{node.name}"
            node.metadata_props.clear()  # stack traces of the machine that exported
            for value in node.outputs:
                value.name = f"{number}.{value.name}"
                value.shape = None  # in another region, the same name may stand for another dimension
                value.metadata_props.clear()
        for name, value in zip(call.outputs, results, strict=True):
            values[name] = value
            if name in outputs:
                value.name = name
        nodes += own
    graph = ir.Graph(
        [values[name] for name in inputs],
        [values[name] for name in outputs],
        nodes=nodes,
        initializers=[*weights.values(), *constants.values()],
        opset_imports={"": opset},
        name="network",
    )
    return ir.Model(graph, ir_version=10)


def first_uses(graphs: Mapping[str, ir.Graph], calls: Sequence[Call]) -> dict[str, ir.Value]:
    """Return, for each tensor that calls take, the port of the graph that takes it first."""
    ports: dict[str, ir.Value] = {}
    for call in calls:
        for name, port in zip(call.inputs, graphs[call.kind].inputs, strict=False):
            ports.setdefault(name, port)
    return ports


def copied(name: str, constant: ir.Value) -> ir.TensorProtocol:
    """Return a copy of a constant's value, which may lie in memory of the program that it was traced in."""
    content = constant.const_value
    assert content is not None, f"{name} has no value"
    return ir.Tensor(np.array(content.numpy()), dtype=content.dtype, name=name)


def new_value(name: str, like: ir.Value, content: ir.TensorProtocol | None = None) -> ir.Value:
    """Return a value with the type and shape of another one."""
    return ir.Value(name=name, type=like.type, shape=like.shape, const_value=content)
