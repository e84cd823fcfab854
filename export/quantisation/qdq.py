"""Quantise linear layers of a graph to 8 bits with Q/DQ pairs in standard ONNX, which compilers fuse into products.

Weights are quantised symmetrically with one scale for each output channel. They are stored as 8-bit numbers, and the
scales in the graph's own dtype. No operator stands between a DequantizeLinear and its MatMul. Source: NVIDIA TensorRT
documentation, "Working with Quantized Types"; ONNX operators QuantizeLinear-21 and DequantizeLinear-21; Micikevicius et
al. 2022, arXiv:2209.05433 (E4M3).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor, to_torch_dtype

from ditforge.errors import UserError
from ditforge.export.graph.writing import SOURCE
from ditforge.option import setting


@dataclass(frozen=True)
class Scheme:
    """An 8-bit number format for weights.

    dtype: the dtype of the 8-bit numbers.
    largest: the largest number that is used.
    activations: whether activations are quantised too. Their ranges are then needed, from a calibration.
    """

    name: str
    dtype: torch.dtype
    largest: float
    activations: bool


E4M3 = torch.float8_e4m3fn
SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme("fp8", E4M3, torch.finfo(E4M3).max, activations=True),
        Scheme("fp8-weights", E4M3, torch.finfo(E4M3).max, activations=False),
        Scheme("int8-weights", torch.int8, 127.0, activations=False),
    )
}


def weight_scale(weight: torch.Tensor, scheme: Scheme, dtype: torch.dtype) -> torch.Tensor:
    """Return the scales [N] in `dtype` of the columns of `weight` [K, N]. A column is an output channel.

    A scale maps the column's largest absolute value to the scheme's largest number. A column of zeros gets the smallest
    normal number as its scale.
    """
    amax = weight.float().abs().amax(dim=0)
    return (amax / scheme.largest).clamp(min=torch.finfo(dtype).tiny).to(dtype)


def quantise_weight(weight: torch.Tensor, scale: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Divide `weight` [K, N] by `scale` [N], and round it to the scheme's 8-bit numbers."""
    scaled = torch.div(weight.float(), scale.float()).clamp_(-scheme.largest, scheme.largest)
    return (scaled if scheme.dtype.is_floating_point else scaled.round_()).to(scheme.dtype)


def activation_scale(amax: float, scheme: Scheme, dtype: torch.dtype) -> torch.Tensor:
    """Return the scale, a number in `dtype`, that maps activations of up to `amax` to the scheme's largest number."""
    return torch.tensor(amax / scheme.largest).clamp(min=torch.finfo(dtype).tiny).to(dtype)


def quantise_linears(model: ir.Model, layers: set[str], scheme: Scheme, amax: Mapping[str, float]) -> list[str]:
    """Quantise the MatMuls whose weights are named in `layers`. Returns these names, in the graph's order.

    `amax` has the largest absolute input of each layer; it is used only if the scheme quantises activations. Layers
    that share an input and its range share a Q/DQ pair. Weights are read only when they are written. Raises UserError
    if a layer's range is needed and missing.
    """
    done: list[str] = []
    pairs: dict[tuple[str, float], ir.Value] = {}
    for node in list(model.graph):
        weight = node.inputs[1] if node.op_type == "MatMul" else None
        if weight is None or weight.name not in layers or not weight.is_initializer():
            continue
        node.replace_input_with(1, dequantised_weight(model, weight, scheme))
        if scheme.activations:
            activation = node.inputs[0]
            assert activation is not None, "a MatMul without an input"
            key = (activation.name or "", calibrated(amax, weight.name))
            if key not in pairs:
                pairs[key] = quantised_and_back(model, activation, key[1], weight.dtype, scheme)
            node.replace_input_with(0, pairs[key])
        done.append(weight.name)
    return done


def calibrated(amax: Mapping[str, float], layer: str) -> float:
    """Return the largest absolute input of a layer. Raises UserError if the calibration does not have it."""
    if layer not in amax:
        raise UserError(
            f"the calibration has no range for {layer}: it was made for another model",
            "ditforge calibrate CHECKPOINT --out FILE   makes one for this model; "
            f"or {setting('precision', 'fp8-weights')}",
        )
    return amax[layer]


def dequantised_weight(model: ir.Model, weight: ir.Value, scheme: Scheme) -> ir.Value:
    """Replace the initializer `weight` with 8-bit numbers, scales and a DequantizeLinear. Returns its output."""
    name, dtype, shape = weight.name or "", weight.dtype, weight.shape
    # The checkpoint's own tensor is quantised, because one in the graph's dtype would have been rounded already.
    source: Callable[[], torch.Tensor] = weight.meta[SOURCE]
    assert dtype is not None, f"{name} has no dtype"
    assert shape is not None, f"{name} has no shape"
    torch_dtype = to_torch_dtype(dtype)

    known: list[torch.Tensor] = []  # the scale, once it was computed: a weight is read once

    def scale_of(read: Callable[[], torch.Tensor]) -> torch.Tensor:
        if not known:
            known.append(weight_scale(read(), scheme, torch_dtype))
        return known[0]

    def numbers() -> TorchTensor:
        tensor = source()
        return TorchTensor(quantise_weight(tensor, scale_of(lambda: tensor), scheme), name=f"{name}_quantized")

    def scales() -> TorchTensor:
        return TorchTensor(scale_of(source), name=f"{name}_scale")

    eight_bit = ir.tensor(torch.zeros(1, dtype=scheme.dtype)).dtype
    quantised = initializer(model, quantised_name(name), ir.LazyTensor(numbers, dtype=eight_bit, shape=shape))
    scaling = initializer(model, scale_name(name), ir.LazyTensor(scales, dtype=dtype, shape=ir.Shape([shape[1]])))
    node = ir.node("DequantizeLinear", [quantised, scaling], {"axis": 1}, name=f"{name}_dequantize")
    out = node.outputs[0]
    out.name, out.dtype = f"{name}_dequantized", dtype
    model.graph.insert_before(next(iter(weight.uses())).node, node)
    if len(weight.uses()) == 1:
        model.graph.initializers.pop(name)
    return out


def quantised_name(weight: str) -> str:
    """Return the name of the initializer that has the weight's 8-bit numbers."""
    return f"{weight}_quantized"


def scale_name(weight: str) -> str:
    """Return the name of the initializer that has the scales of the weight's output channels."""
    return f"{weight}_scale"


def quantised_and_back(
    model: ir.Model, activation: ir.Value, amax: float, dtype: ir.DataType | None, scheme: Scheme
) -> ir.Value:
    """Insert a Q/DQ pair with one scale for the whole tensor after `activation`. Returns the pair's output."""
    assert dtype is not None, f"{activation.name} has no dtype"
    name = activation.name or ""
    torch_dtype = to_torch_dtype(dtype)
    number = activation_scale(amax, scheme, torch_dtype)
    scale = initializer(model, f"{name}_scale", TorchTensor(number, name=f"{name}_scale"))
    zero = TorchTensor(torch.zeros((), dtype=scheme.dtype), name=f"{name}_zero")
    zero_point = initializer(model, f"{name}_zero", zero)
    quantise = ir.node("QuantizeLinear", [activation, scale, zero_point], name=f"{name}_quantize")
    dequantise = ir.node("DequantizeLinear", [quantise.outputs[0], scale, zero_point], name=f"{name}_dequantize")
    quantise.outputs[0].name, quantise.outputs[0].dtype = f"{name}_quantized", zero.dtype
    dequantise.outputs[0].name, dequantise.outputs[0].dtype = f"{name}_dequantized", dtype
    producer = activation.producer()
    if producer is None:
        model.graph.insert_before(model.graph[0], [quantise, dequantise])
    else:
        model.graph.insert_after(producer, [quantise, dequantise])
    return dequantise.outputs[0]


def initializer(model: ir.Model, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """Add an initializer called `name` to the graph, and return it."""
    tensor.name = name
    value = ir.Value(
        name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()), const_value=tensor
    )
    model.graph.initializers.add(value)
    return value
