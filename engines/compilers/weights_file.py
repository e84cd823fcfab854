"""Writes tensors into a safetensors file one after the other, so that their sum need not fit into memory.

Source: the format's description at https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ditforge.engines.compilers import Shape

DTYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int8: "I8",
    torch.int32: "I32",
    torch.int64: "I64",
}


@dataclass(frozen=True)
class Pending:
    """A tensor that is made when it is written."""

    dtype: torch.dtype
    shape: Shape
    make: Callable[[], Tensor]

    @property
    def size(self) -> int:
        """Its number of bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def write(path: Path, tensors: Mapping[str, Pending], progress: Callable[[int, int], None]) -> None:
    """Write tensors by name into the file `path`, in their order. `progress` gets the bytes done, and those in all."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.size
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        done = 0
        for name, tensor in tensors.items():
            made = tensor.make()
            found = made.dtype, tuple(made.shape)
            assert found == (tensor.dtype, tensor.shape), f"{name} is {found}, not {tensor}"
            file.write(made.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            done += tensor.size
            progress(done, end)
