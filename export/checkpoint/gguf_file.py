"""Read GGUF files, which llama.cpp's and ComfyUI-GGUF's tools write: weights in blocks with scales, and metadata.

The header is read here, with limits, and a tensor's bytes when they are needed, so that memory is bounded by one
tensor; gguf's own reader maps the whole file. The package gguf dequantises the blocks. Format: ggml, docs/gguf.md.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from functools import cache
from math import gcd, prod
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch

from ditforge.errors import UserError
from ditforge.export.checkpoint.lazy_tensors import Lazy

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32
MOST_DIMENSIONS = 8
MOST_VALUES = 4_000_000  # of metadata; a vocabulary of 256,000 words has three values a word
LARGEST = 2**48  # numbers of a tensor
ROW = 96  # blocks that gguf dequantises in one step: five times as fast as one by one
LONGEST_NAME, LONGEST_TEXT = 2**16, 2**26
# The types of metadata's values, by their numbers: struct's letters. 8 is a string and 9 an array.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
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
AGAIN = "download the file again"
# The file's own shape of a tensor whose rows were rearranged to fit into blocks (ComfyUI-GGUF, tools/convert.py).
SHAPE_KEY = "comfy.gguf.orig_shape."


class _Damaged(Exception):
    """The bytes of a file contradict themselves."""


@dataclass(frozen=True)
class GgufFile:
    """The contents of a GGUF file: its metadata, without arrays of other things than numbers, and its tensors."""

    metadata: dict[str, Any]
    tensors: dict[str, Lazy]

    @property
    def architecture(self) -> str:
        """What the file says of the model; "" if it says nothing."""
        return str(self.metadata.get("general.architecture") or "")


def is_gguf(file: Path) -> bool:
    """Whether the file begins as GGUF files do. Raises UserError if it cannot be read."""
    try:
        with file.open("rb") as opened:
            return opened.read(len(MAGIC)) == MAGIC
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}", "check the file and its permissions") from error


def open_gguf(file: Path) -> GgufFile:
    """Read the header of a GGUF file. No tensor is read.

    Raises UserError for a file that is truncated or damaged, of another version, or with tensors of a type that gguf
    cannot dequantise.
    """
    size = file.stat().st_size
    try:
        with file.open("rb") as opened:
            return _read(file, opened, size)
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}", "check the file and its permissions") from error
    except _Damaged as error:
        raise UserError(f"{file} ({size} bytes) is truncated or damaged: {error}", AGAIN) from error


@dataclass
class _Reader:
    """Reads a header in order, within the file's size and the limits above."""

    opened: IO[bytes]
    size: int
    at: int = 0
    values: int = 0

    def take(self, count: int) -> bytes:
        if count < 0 or self.at + count > self.size:
            raise _Damaged(f"its header claims {count} more bytes at byte {self.at}")
        found = self.opened.read(count)
        self.at += len(found)
        if len(found) != count:
            raise _Damaged("it became shorter")
        return found

    def number(self, letter: str) -> Any:
        return struct.unpack(f"<{letter}", self.take(struct.calcsize(letter)))[0]

    def text(self, longest: int) -> str:
        length = self.number("Q")
        if length > longest:
            raise _Damaged(f"its header has a text of {length} bytes")
        return self.take(length).decode("utf-8", "replace")

    def skip(self, count: int) -> None:
        if count < 0 or self.at + count > self.size:
            raise _Damaged(f"its header claims {count} more bytes at byte {self.at}")
        self.at += count
        self.opened.seek(self.at)

    def count(self, more: int) -> None:
        self.values += more
        if self.values > MOST_VALUES:
            raise _Damaged(f"its header claims more than {MOST_VALUES} values")

    def value(self, kind: int) -> Any:
        """Return a value of metadata; None for an array of strings or of arrays, which is skipped."""
        self.count(1)
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == STRING:
            return self.text(LONGEST_TEXT)
        if kind != ARRAY:
            raise _Damaged(f"its metadata has a value of type {kind}, which there is not")
        inner, length = self.number("I"), self.number("Q")
        if inner in SCALARS:
            item = struct.calcsize(SCALARS[inner])
            if length > MOST_DIMENSIONS:
                self.skip(length * item)
                return None
            return list(struct.unpack(f"<{length}{SCALARS[inner]}", self.take(length * item)))
        if inner != STRING:
            raise _Damaged(f"its metadata has an array of type {inner}")
        self.count(length)
        for _ in range(length):
            self.skip(self.number("Q"))
        return None


def _read(file: Path, opened: IO[bytes], size: int) -> GgufFile:
    reader = _Reader(opened, size)
    reader.take(len(MAGIC))
    version = reader.number("I")
    if version not in VERSIONS:
        if version & 0xFFFF == 0:
            raise UserError(f"{file} is a GGUF file for machines with big-endian numbers", "use the usual one")
        raise UserError(f"{file} is a GGUF file of version {version}", f"use one of version {VERSIONS[-1]}")
    count, pairs = reader.number("Q"), reader.number("Q")
    metadata: dict[str, Any] = {}
    for _ in range(pairs):
        name = reader.text(LONGEST_NAME)
        if name in metadata:
            raise _Damaged(f"its metadata has {name} twice")
        metadata[name] = reader.value(reader.number("I"))
    described: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(count):
        name = reader.text(LONGEST_NAME)
        if name in described:
            raise _Damaged(f"it has the tensor {name} twice")
        reader.count(1)
        dimensions = reader.number("I")
        if dimensions > MOST_DIMENSIONS:
            raise _Damaged(f"{name} has {dimensions} dimensions")
        shape = tuple(reader.number("Q") for _ in range(dimensions))
        described[name] = shape, reader.number("I"), reader.number("Q")
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise _Damaged(f"its alignment is {alignment}, which is no power of two")
    start = -(-reader.at // alignment) * alignment
    tensors = {
        name: _tensor(file, name, shape, kind, (start + offset, size), metadata.get(SHAPE_KEY + name))
        for name, (shape, kind, offset) in described.items()
    }
    return GgufFile(metadata, tensors)


def _tensor(
    file: Path, name: str, reverse: tuple[int, ...], number: int, place: tuple[int, int], own_shape: object
) -> Lazy:
    """Return a tensor, unread. GGUF has its dimensions in reverse order.

    `place` is the tensor's first byte and the file's size.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        kind = GGMLQuantizationType(number)
    except ValueError:
        raise _Damaged(f"{name} has the type {number}, which there is not") from None
    at, size = place
    shape = tuple(reversed(reverse))
    block, item = GGML_QUANT_SIZES[kind]
    if prod(max(side, 1) for side in shape) >= LARGEST:
        raise _Damaged(f"{name} has the shape {list(shape)}")
    if shape and shape[-1] % block:
        raise _Damaged(f"{name} has rows of {shape[-1]}, and {kind.name} has blocks of {block}")
    if prod(shape) // block * item > size - at:
        raise _Damaged(f"{name} ends behind the end of the file")
    if own_shape is not None:
        if not isinstance(own_shape, list) or prod(own_shape) != prod(shape) or min(own_shape, default=1) < 0:
            raise _Damaged(f"{name} has the shape {list(shape)}, and {SHAPE_KEY}{name} is {own_shape}")
        shape = tuple(int(side) for side in own_shape)
    _check_kind(file, name, kind)
    length = shape[0] if shape else 1
    row = prod(shape[1:])

    def read(start: int, stop: int) -> torch.Tensor:
        if not shape:
            return _numbers(file, name, kind, at, 1).reshape(())
        if row % block:  # a block holds parts of two rows
            return _numbers(file, name, kind, at, length * row).reshape(shape)[start:stop]
        numbers = _numbers(file, name, kind, at + start * row // block * item, (stop - start) * row)
        return numbers.reshape(stop - start, *shape[1:])

    return Lazy(shape, PLAIN.get(kind.name, torch.float32), file, read)


def _check_kind(file: Path, name: str, kind: GGMLQuantizationType) -> None:
    """Raise UserError if gguf cannot dequantise the type."""
    if kind.name in PLAIN or _is_dequantised(kind):
        return
    problem = f"{file}: {name} has the type {kind.name}, which the package gguf cannot dequantise"
    raise UserError(problem, "use a file in Q8_0, Q6_K, Q5_K, Q4_K or another common type")


@cache
def _is_dequantised(kind: GGMLQuantizationType) -> bool:
    import numpy
    from gguf import GGML_QUANT_SIZES, quants

    try:
        quants.dequantize(numpy.zeros((1, GGML_QUANT_SIZES[kind][1]), numpy.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _numbers(file: Path, name: str, kind: GGMLQuantizationType, at: int, count: int) -> torch.Tensor:
    """Read `count` numbers, which are whole blocks, from byte `at`."""
    import numpy
    from gguf import GGML_QUANT_SIZES, quants

    block, item = GGML_QUANT_SIZES[kind]
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
    if kind.name in PLAIN:
        dtype = PLAIN[kind.name]
        return torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
    if not content:
        return torch.empty(0)
    row = gcd(count // block, ROW)
    blocks = numpy.frombuffer(content, dtype=numpy.uint8).reshape(-1, row * item)
    with numpy.errstate(all="ignore"):  # scales that are no numbers are found where the weight is used
        return torch.from_numpy(quants.dequantize(blocks, kind).reshape(-1))
