"""What the passes ask of a graph, and how they change it. Of constants they read small ones alone, never weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

MICROSOFT = "com.microsoft"  # the domain of the operators that ONNX Runtime adds to ONNX's
SMALL = 1 << 16  # elements of a constant that a pass may read
HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def source(value: ir.Value | None, operator: str, domain: str = "") -> ir.Node | None:
    """The node that computes a value, if it is of this operator."""
    node = value.producer() if value is not None else None
    return node if node is not None and (node.op_type, node.domain) == (operator, domain) else None


def sole_source(value: ir.Value | None, operator: str, domain: str = "") -> ir.Node | None:
    """The same, if nothing else takes the value, so that the node can go."""
    node = source(value, operator, domain)
    return node if value is not None and node is not None and is_used_once(value) else None


def is_used_once(value: ir.Value) -> bool:
    """Whether one node takes the value, and it is no output of the graph."""
    return len(value.uses()) == 1 and not value.is_graph_output()


def sole_user(value: ir.Value, operator: str) -> ir.Node | None:
    """The node that takes the value, if it is the only one and of this operator."""
    if not is_used_once(value):
        return None
    node = next(iter(value.uses())).node
    return node if (node.op_type, node.domain) == (operator, "") else None


def number(value: ir.Value | None) -> NDArray[np.float64] | None:
    """The numbers of a small initializer or Constant. None if they are not known, or too many."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    if tensor is None or tensor.size > SMALL:
        return None
    return np.asarray(tensor.numpy()).astype(np.float64)


def is_scalar(value: ir.Value | None, wanted: float) -> bool:
    """Whether the value is one known number, `wanted`."""
    found = number(value)
    return found is not None and found.size == 1 and bool(found.reshape(()) == wanted)


def rank(value: ir.Value | None) -> int | None:
    """The number of dimensions, where it is known."""
    return len(value.shape) if value is not None and value.shape is not None else None


def dimension(value: ir.Value | None, axis: int) -> int | None:
    """The size of a dimension, where it is a known number."""
    if value is None or value.shape is None:
        return None
    size = value.shape[axis]
    return size if isinstance(size, int) else None


def attribute(node: ir.Node, name: str, default: float | int | str) -> float | int | str:
    """An attribute's value, or its default where it is left out."""
    found = node.attributes.get(name)
    return default if found is None else found.value


def axes(node: ir.Node, name: str = "perm") -> tuple[int, ...]:
    """The numbers of an attribute such as a Transpose's; none if it is left out."""
    found = node.attributes.get(name)
    return tuple(found.as_ints()) if found is not None else ()


def constant(graph: ir.Graph, name: str, numbers: NDArray[np.generic] | Sequence[int]) -> ir.Value:
    """An initializer of a few numbers, made once for each name. Integers are int64."""
    if name not in graph.initializers:
        array = numbers if isinstance(numbers, np.ndarray) else np.asarray(numbers, np.int64)
        add_initializer(graph, name, ir.tensor(array, name=name))
    return graph.initializers[name]


def add_initializer(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """An initializer whose tensor may be on disk, or read only when it is written."""
    shape = ir.Shape(tensor.shape.numpy())
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
    graph.initializers.add(value)
    return value


def node(
    operator: str,
    inputs: Sequence[ir.Value | None],
    attributes: Mapping[str, int | float | str | Sequence[int]] | None = None,
    like: ir.Value | None = None,
    domain: str = "",
    shape: ir.Shape | None = None,
) -> ir.Node:
    """A node of one output, with the dtype of `like`."""
    made = ir.node(operator, inputs, attributes or {}, domain=domain)
    out = made.outputs[0]
    if like is not None:
        if like.dtype is not None:
            out.dtype = like.dtype
        out.name = f"{like.name}_{operator}"
    out.shape = shape
    return made


def reshape(graph: ir.Graph, value: ir.Value, sizes: Sequence[int]) -> ir.Node:
    """A Reshape to sizes of which 0 stands for the input's own and -1 for the rest."""
    target = constant(graph, "shape_" + "_".join(map(str, sizes)).replace("-", "rest"), list(sizes))
    free = ir.Shape([size if size > 0 else None for size in sizes])
    return node("Reshape", [value, target], like=value, shape=free)


def replace(graph: ir.Graph, old: ir.Node, made: Sequence[ir.Node]) -> None:
    """Put the nodes `made` in the place of `old`, and the last one's output, under its name, in that of its output."""
    last, before = made[-1].outputs[0], old.outputs[0]
    last.name = before.name
    if before.dtype is not None:
        last.dtype = before.dtype
    if last.shape is None:
        last.shape = before.shape
    before.name = None
    ir.convenience.replace_nodes_and_values(graph, old, [old], list(made), [before], [last])


def remove_unused(graph: ir.Graph) -> None:
    """Remove nodes that nothing takes the outputs of, and initializers that no node takes."""
    for found in reversed(list(graph)):
        if not any(out.uses() or out.is_graph_output() for out in found.outputs):
            graph.remove(found, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            graph.initializers.pop(name)


def name_values(graph: ir.Graph) -> None:
    """Give the values that passes made names of their own."""
    taken: set[str] = set(graph.initializers) | {value.name or "" for value in graph.inputs}
    for found in graph:
        for out in found.outputs:
            base, count = out.name or found.op_type.lower(), 1
            while out.name is None or out.name in taken:
                out.name, count = f"{base}_{count}", count + 1
            taken.add(out.name)


Pass = Callable[[ir.Graph], int]
