"""Infers the shape of every value in an ONNX graph from the shapes of its inputs, without reading the weights.

onnx's reference implementation computes the values from which shapes are made (Shape, Div, Concat, Range, …), because
onnx's own propagation of such values does not know all operators. onnx's inference does the rest, node by node.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from ditforge.engines.compilers import Shape
from ditforge.errors import DitforgeError
from ditforge.option import setting

SMALL = 4096  # elements of a value that is computed, rather than only its shape
COMPUTED = (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL, ir.DataType.FLOAT)  # what shapes are computed in
SUBGRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)

Known = dict[ir.Value, NDArray[Any]]


def infer_shapes(graph: ir.Graph, inputs: Mapping[str, Shape]) -> dict[ir.Value, Shape]:
    """The shape of every value that a node makes, for the shapes of the graph's inputs by name.

    Raises DitforgeError for a node whose outputs' shapes depend on more than shapes.
    """
    types = {value: tensor_type(value, inputs[value.name or ""]) for value in graph.inputs}
    known: Known = {}
    for value in graph.initializers.values():
        shape = () if value.shape is None else tuple(value.shape.numpy())
        types[value] = tensor_type(value, shape)
        tensor = value.const_value
        if tensor is None or isinstance(tensor, ir.ExternalTensor):
            continue
        if math.prod(shape) <= SMALL and value.dtype in COMPUTED:
            known[value] = tensor.numpy()
    shapes = {}
    for node in graph:
        for value, found in infer_node(graph, node, types, known).items():
            types[value], shapes[value], value.dtype = found, dims(found), dtype(found)
    return shapes


def infer_node(
    graph: ir.Graph, node: ir.Node, types: dict[ir.Value, onnx.TypeProto], known: Known
) -> dict[ir.Value, onnx.TypeProto]:
    """The types of a node's outputs. Values of them that can be computed are added to `known`."""
    version = graph.opset_imports.get(node.domain)
    proto = ir.serde.serialize_node(node)
    inputs = [value for value in node.inputs if value is not None]
    if any(attribute.type in SUBGRAPHS for attribute in node.attributes.values()):
        raise DitforgeError(
            f"{node.op_type} {node.name} has a graph of its own, which cannot be cut", setting("segments", 1)
        )
    data = {str(value.name): onnx.numpy_helper.from_array(known[value]) for value in inputs if value in known}
    try:
        schema = onnx.defs.get_schema(node.op_type, version or 1, node.domain)
        opsets = [onnx.helper.make_opsetid(node.domain, version or 1)]
        made = onnx.shape_inference.infer_node_outputs(
            schema, proto, {str(value.name): types[value] for value in inputs}, data, opset_imports=opsets
        )
        found = {value: made[str(value.name)] for value in node.outputs if value.name in made}
        for kind in found.values():
            dims(kind)
    except (onnx.defs.SchemaError, onnx.shape_inference.InferenceError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise DitforgeError(
            f"{node.op_type} {node.name}: the shape of {node.outputs[0].name} is not known: {reason}",
            setting("segments", 1),
        ) from error
    small = all(math.prod(dims(kind)) <= SMALL and dtype(kind) in COMPUTED for kind in found.values())
    if small and (node.op_type in ("Shape", "Size") or all(value in known for value in inputs)):
        feeds = {str(value.name): known[value] if value in known else ghost(types[value]) for value in inputs}
        results = ReferenceEvaluator(proto, opsets={node.domain: version or 1}).run(None, feeds)
        known.update({value: np.asarray(result) for value, result in zip(node.outputs, results, strict=True)})
    return found


def tensor_type(value: ir.Value, shape: Shape) -> onnx.TypeProto:
    """The onnx type with the value's dtype and this shape."""
    return onnx.helper.make_tensor_type_proto(int(value.dtype or 0), shape)


def dims(kind: onnx.TypeProto) -> Shape:
    """The shape in a type. Raises ValueError if a dimension is not known."""
    found = kind.tensor_type.shape.dim
    if not kind.tensor_type.HasField("shape") or not all(dim.HasField("dim_value") for dim in found):
        raise ValueError("it depends on what is computed")
    return tuple(dim.dim_value for dim in found)


def dtype(kind: onnx.TypeProto) -> ir.DataType:
    """The dtype in a type."""
    return ir.DataType(kind.tensor_type.elem_type)


def ghost(kind: onnx.TypeProto) -> NDArray[Any]:
    """An array of that shape that takes no memory, for operators that look only at the shape."""
    return np.broadcast_to(np.float32(0), dims(kind))
