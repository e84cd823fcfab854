"""Read GGUF files, which llama.cpp's and ComfyUI-GGUF's tools write: weights in blocks with scales, and metadata.

A tensor's bytes are read when they are needed, so that memory is bounded by one tensor. The package gguf dequantises
the blocks. The header is read by gguf_header.py.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from math import gcd, prod
from pathlib import Path
from typing import Any

import torch

from ditforge.errors import UserError
from ditforge.export.checkpoint.gguf_header import AGAIN, GgufTensor, read_gguf_header
from ditforge.export.checkpoint.lazy_tensors import Lazy

ROW = 96  # blocks that gguf dequantises in one step: five times as fast as one by one
# What is stored without blocks, by ggml's names.
PLAIN = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}


@dataclass(frozen=True)
class GgufFile:
    """The contents of a GGUF file: its metadata, and its tensors.

    architecture: what the file says of the model; "" if it says nothing.
    """

    metadata: dict[str, Any]
    architecture: str
    tensors: dict[str, Lazy]


def open_gguf(file: Path) -> GgufFile:
    """Read the header of a GGUF file. No tensor is read.

    Raises UserError as read_gguf_header() does, and for tensors of a type that gguf cannot dequantise.
    """
    header = read_gguf_header(file)
    tensors = {name: _tensor(file, name, tensor) for name, tensor in header.tensors.items()}
    return GgufFile(header.metadata, header.architecture, tensors)


def _tensor(file: Path, name: str, stored: GgufTensor) -> Lazy:
    """Return a tensor, unread."""
    check_kind(file, name, stored.kind)
    kind, shape, at, block, item = stored.kind, stored.shape, stored.at, stored.block, stored.item
    length = shape[0] if shape else 1
    row = prod(shape[1:])

    def read(start: int, stop: int) -> torch.Tensor:
        if not shape:
            return _numbers(file, name, kind, at, 1).reshape(())
        if row % block:  # a block holds parts of two rows
            return _numbers(file, name, kind, at, length * row).reshape(shape)[start:stop]
        numbers = _numbers(file, name, kind, at + start * row // block * item, (stop - start) * row)
        return numbers.reshape(stop - start, *shape[1:])

    return Lazy(shape, PLAIN.get(kind, torch.float32), file, read)


def check_kind(file: Path, name: str, kind: str) -> None:
    """Raise UserError if gguf cannot dequantise the type."""
    if kind in PLAIN or is_dequantised(kind):
        return
    problem = f"{file}: {name} has the type {kind}, which the package gguf cannot dequantise"
    raise UserError(problem, "use a file in Q8_0, Q6_K, Q5_K, Q4_K or another common type")


@cache
def is_dequantised(kind: str) -> bool:
    """Return whether the package gguf can dequantise the type, which has ggml's name."""
    import numpy
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

    number = GGMLQuantizationType[kind]
    try:
        quants.dequantize(numpy.zeros((1, GGML_QUANT_SIZES[number][1]), numpy.uint8), number)
    except NotImplementedError:
        return False
    return True


def _numbers(file: Path, name: str, kind: str, at: int, count: int) -> torch.Tensor:
    """Read `count` numbers, which are whole blocks, from byte `at`."""
    import numpy
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

    number = GGMLQuantizationType[kind]
    block, item = GGML_QUANT_SIZES[number]
    content = bytearray(count // block * item)
    try:
        with file.open("rb") as opened:
            done = os.preadv(opened.fileno(), [content], at) if content else 0
            while 0 < done < len(content):  # one call reads 2 GB at most
                more = os.preadv(opened.fileno(), [memoryview(content)[done:]], at + done)
                done = done + more if more else -1
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}", "check the file and its permissions") from error
    if done != len(content):
        raise UserError(f"{file} is truncated or damaged: {name} ends behind its end", AGAIN)
    if kind in PLAIN:
        dtype = PLAIN[kind]
        return torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
    if not content:
        return torch.empty(0)
    row = gcd(count // block, ROW)
    blocks = numpy.frombuffer(content, dtype=numpy.uint8).reshape(-1, row * item)
    with numpy.errstate(all="ignore"):  # scales that are no numbers are found where the weight is used
        return torch.from_numpy(quants.dequantize(blocks, number).reshape(-1))
