"""The weights of a network, in the order and the form in which its packages take them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import to_torch_dtype
from torch import Tensor

from ditforge.engines.compilers import weights_file
from ditforge.engines.compilers.region_lowering import Lowered, Operand
from ditforge.regions import Call, Regions, Stored

READ_ALONE = "The given NumPy array is not writable"  # PyTorch's warning for a file that is mapped, and never written


def write(
    path: Path,
    found: Regions,
    kinds: Sequence[str],
    lowered: Mapping[str, Lowered],
    weight: Callable[[str], Tensor],
) -> list[Call]:
    """Write the operands of all calls, in their order, into the file `path`. Returns the calls with their names."""
    calls, pending = [], {}
    for number, (call, kind) in enumerate(zip(found.calls, kinds, strict=True)):
        names = []
        for place, operand in enumerate(lowered[kind].operands):
            names.append(f"{number:03}.{kind}.{place:02}.{operand.content}")
            stored = [found.weights[call.weights[place]] for place in operand.places]
            pending[names[-1]] = weights_file.Pending(
                operand.dtype, operand.shape, partial(read_operand, operand, stored, weight)
            )
        calls.append(Call(kind=kind, inputs=call.inputs, outputs=call.outputs, weights=tuple(names)))
    with warnings.catch_warnings():  # here, and not where it is read: several threads do that
        warnings.filterwarnings("ignore", READ_ALONE)
        weights_file.write(path, pending)
    return calls


def read_operand(operand: Operand, stored: Sequence[Stored], weight: Callable[[str], Tensor]) -> Tensor:
    """Read one operand of a call from the weights as they are stored for the graph.

    Each weight is copied to its rows, which takes a fifth of the time of torch.cat where matrices are transposed.
    """
    if operand.content == "activation":
        return torch.tensor([stored[0].activation_scale], dtype=torch.float32)
    parts = []
    for part in stored:
        tensor = weight(part.scale if operand.content == "scales" else part.name)
        parts.append(tensor.t() if part.transposed and tensor.dim() == 2 else tensor)
    if len(parts) == 1:
        return parts[0].to(operand.dtype).contiguous()
    joined = torch.empty(operand.shape, dtype=operand.dtype)
    row = 0
    for tensor in parts:
        joined[row : row + len(tensor)].copy_(tensor)
        row += len(tensor)
    return joined


def as_torch(value: ir.Value) -> Tensor:
    """Return the values of an initializer, which stay in the file that they are mapped from."""
    assert value.const_value is not None, f"{value.name} has no value"
    array = value.const_value.numpy()
    dtype = to_torch_dtype(value.const_value.dtype)
    if dtype in (torch.bfloat16, torch.float8_e4m3fn):  # which NumPy lacks
        return torch.from_numpy(array.view(f"uint{8 * dtype.itemsize}")).view(dtype)
    return torch.from_numpy(array)
