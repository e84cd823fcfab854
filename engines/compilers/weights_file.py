"""Writes tensors into a safetensors file one after the other, so that their sum need not fit into memory.

While one is written, several threads make the next ones: a matrix that is transposed keeps a processor busy.

Source: the format's description at https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ditforge.engines.compilers import Shape

THREADS = 4  # and so many tensors are in memory, and one more
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


def write(path: Path, tensors: Mapping[str, Pending]) -> None:
    """Write tensors by name into the file `path`, in their order."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.size
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file, closing(made_ahead(tensors)) as made:
        file.write(len(text).to_bytes(8, "little") + text)
        for one in made:
            file.write(one.reshape(-1).view(torch.uint8).numpy().data)


def made_ahead(tensors: Mapping[str, Pending]) -> Generator[Tensor, None, None]:
    """Make tensors on the CPU in their order, a few of them before they are asked for."""

    def make(name: str) -> Tensor:
        made, tensor = tensors[name].make(), tensors[name]
        found = made.dtype, tuple(made.shape)
        assert found == (tensor.dtype, tensor.shape), f"{name} is {found}, not {tensor}"
        return made.cpu().contiguous()

    with ThreadPoolExecutor(THREADS) as threads:
        coming: deque[Future[Tensor]] = deque()
        for name in tensors:
            coming.append(threads.submit(make, name))
            if len(coming) > THREADS:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()
