"""The steps from a traced graph to a file: transpose the weights, attach their values, and write it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial
from pathlib import Path

import onnx
import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor, to_torch_dtype

from ditforge.export.checkpoint.weights import Weights
from ditforge.export.network import Network

DATA_SUFFIX = ".data"
SOURCE = "source"  # the key in an initializer's meta of the function that reads the checkpoint's tensor


def store_transposed(model: ir.Model) -> set[str]:
    """Remove every Transpose of a weight matrix and store the weight transposed instead. Returns those weights' names.

    There are two reasons: constant folding would hold a second copy of each weight in memory, and no operator may stand
    between a quantised weight and its MatMul.
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
    """Attach the checkpoint's tensor to every initializer without a value.

    Each tensor is read, and converted to the graph's dtype, only when it is written. `aliases` comes from trace(), and
    `transposed` from store_transposed(). consistency.check_weights() has already checked that the weights fit.
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
    """Read the checkpoint's tensor `key`, times `factor`, and transposed if `flip` is True.

    Its dtype is the checkpoint's if `factor` is 1, else float32.
    """
    tensor = weights.read(key, factor)
    return tensor.T.contiguous() if flip else tensor


def converted(source: Callable[[], torch.Tensor], dtype: ir.DataType, name: str) -> TorchTensor:
    """Read the tensor from `source` and convert it to `dtype`, as the value of the graph's initializer `name`."""
    return TorchTensor(source().to(to_torch_dtype(dtype)), name=name)


def save(model: ir.Model, path: Path, progress: Callable[[int], None] | None = None) -> list[Path]:
    """Write the graph to `path` and its weights beside it, one tensor at a time. Returns the files written.

    `progress` is called before each tensor with the bytes of weights written so far. The written graph is checked by
    onnx.checker with full shape inference.
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
    """Return freed memory to the operating system, where the C library can (glibc: malloc_trim(3)).

    Otherwise the C library keeps the freed memory of tensors of many sizes, which adds up to gigabytes.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)


def assert_no_float64(model: ir.Model) -> None:
    """Assert that the graph has no float64 values, which TensorRT lacks. One would be a mistake in this package."""
    wide = [value.name for node in model.graph for value in node.outputs if value.dtype == ir.DataType.DOUBLE]
    wide += [name for name, value in model.graph.initializers.items() if value.dtype == ir.DataType.DOUBLE]
    assert not wide, f"float64 in the graph: {wide[:5]}"
