"""What is done to a traced graph: weights stored as they are multiplied, values attached, constants folded, written."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor, to_torch_dtype

from ditforge.export.checkpoint.weights import Weights
from ditforge.export.network import Network

DATA_SUFFIX = ".data"
SOURCE = "source"  # in an initializer's meta: reads the checkpoint's tensor, in its own dtype


def store_transposed(model: ir.Model) -> set[str]:
    """Drop every Transpose of a weight matrix and declare the weight transposed instead; returns those weights' names.

    Otherwise constant folding would hold a second copy of them in memory, and nothing may stand between a quantised
    weight and its MatMul.
    """
    transposed = set()
    for node in list(model.graph):
        weight = node.inputs[0] if node.inputs else None
        if (
            node.op_type != "Transpose"
            or weight is None
            or not weight.is_initializer()
            or weight.const_value is not None
        ):
            continue
        if len(weight.uses()) != 1 or weight.shape is None or len(weight.shape) != 2:
            continue
        node.outputs[0].replace_all_uses_with(weight)
        model.graph.remove(node, safe=True)
        weight.shape = ir.Shape(tuple(weight.shape)[::-1])
        transposed.add(weight.name or "")
    return transposed


def attach_weights(
    model: ir.Model, aliases: dict[str, list[str]], transposed: set[str], weights: Weights, network: Network
) -> None:
    """Give every initializer without a value the checkpoint's tensor, in the graph's dtype, read only when written.

    That they fit has been checked by fit.check_weights.
    """
    for name, names in aliases.items():
        value = model.graph.initializers[name]
        assert value.shape is not None, f"the tracer left {name} without a shape"
        assert value.dtype is not None, f"the tracer left {name} without a dtype"
        key = weights.find(names, network.key_prefixes)
        assert key is not None, f"{weights.folder} lacks {names[0]}"
        source = partial(read_tensor, weights, key, network.factor(names), name in transposed)
        value.meta[SOURCE] = source
        convert = partial(converted, source, value.dtype, name)
        value.const_value = ir.LazyTensor(convert, dtype=value.dtype, shape=value.shape, name=name)


def read_tensor(weights: Weights, key: str, factor: float, flip: bool) -> torch.Tensor:
    """The checkpoint's tensor `key`, in its own dtype (times a `factor`: in float32), transposed if `flip`."""
    tensor = weights.read(key, factor)
    return tensor.T.contiguous() if flip else tensor


def converted(source: Callable[[], torch.Tensor], dtype: ir.DataType, name: str) -> TorchTensor:
    """The tensor as the graph's initializer `name`."""
    return TorchTensor(source().to(to_torch_dtype(dtype)), name=name)


def simplify(model: ir.Model, network: Network) -> None:
    """Fold constants, drop what does nothing, and name dimensions as the contract does. Weights are not read."""
    import onnxscript.optimizer

    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    with np.errstate(all="ignore"):  # it evaluates both sides of every Where
        onnxscript.optimizer.optimize(model)
    graph = model.graph
    model.metadata_props.clear()  # the tracer's, of which some are in another order each time
    graph.metadata_props.clear()
    for value in (*graph.inputs, *graph.outputs, *graph.initializers.values()):
        value.metadata_props.clear()
    for node in model.graph:
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = None  # the tracer's own names of dimensions, which are not those of the inputs
                value.metadata_props.clear()
        node.metadata_props.clear()  # stack traces of the machine that exported
    ports = {**network.inputs, **network.outputs}
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.shape = ir.Shape(ports[value.name or ""].names())


def save(model: ir.Model, path: Path, progress: Callable[[int], None] | None = None) -> list[Path]:
    """Write the graph to `path` and its weights beside it, one tensor at a time; returns the files written.

    `progress` is called with the bytes of weights before each tensor. The result has passed onnx.checker with full
    shape inference.
    """
    data, done = path.with_name(path.name + DATA_SUFFIX), 0

    def count(tensor: ir.TensorProtocol, info: object) -> None:
        nonlocal done
        return_freed_memory()
        if progress:
            progress(done)
        done += tensor.nbytes

    ir.save(model, path, external_data=data.name, callback=count)
    onnx.checker.check_model(path, full_check=True)
    return [file for file in (path, data) if file.is_file()]


def return_freed_memory() -> None:
    """Give back to the system what has been freed, where the C library can (glibc: malloc_trim(3)).

    Left to itself it keeps pieces between tensors of many sizes, gigabytes in the end.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)


def assert_no_float64(model: ir.Model) -> None:
    """TensorRT has no float64: a graph that computes in it is a mistake of ours."""
    wide = [value.name for node in model.graph for value in node.outputs if value.dtype == ir.DataType.DOUBLE]
    wide += [name for name, value in model.graph.initializers.items() if value.dtype == ir.DataType.DOUBLE]
    assert not wide, f"float64 in the graph: {wide[:5]}"
