"""Read the header of GGUF files: metadata, and the types and shapes of tensors.

It is read here, with limits, since gguf's own reader maps the whole file, and takes any time for arrays that are
claimed to be long. Nothing here needs PyTorch. Format: ggml, docs/gguf.md.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any

from ditforge.errors import UserError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32
MOST_DIMENSIONS = 8
MOST_VALUES = 4_000_000  # of metadata; a vocabulary of 256,000 words has three values a word
LARGEST = 2**48  # numbers of a tensor
LONGEST_NAME, LONGEST_TEXT = 2**16, 2**26
# The types of metadata's values, by their numbers: struct's letters. 8 is a string and 9 an array.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
AGAIN = "download the file again"
# The file's own shape of a tensor whose rows were rearranged to fit into blocks (ComfyUI-GGUF, tools/convert.py).
SHAPE_KEY = "comfy.gguf.orig_shape."


class _Damaged(Exception):
    """The bytes of a file contradict themselves."""


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a GGUF file, unread: its type as ggml names it, its shape, and its first byte.

    A block has `block` numbers and `item` bytes.
    """

    kind: str
    shape: tuple[int, ...]
    at: int
    block: int
    item: int


@dataclass(frozen=True)
class GgufHeader:
    """The header of a GGUF file: its metadata, without arrays of other things than numbers, and its tensors."""

    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]

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


def read_gguf_header(file: Path) -> GgufHeader:
    """Read the header of a GGUF file. Raises UserError for a file that is truncated, damaged or of another version."""
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


def _read(file: Path, opened: IO[bytes], size: int) -> GgufHeader:
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
        name: _described(name, shape, kind, (start + offset, size), metadata.get(SHAPE_KEY + name))
        for name, (shape, kind, offset) in described.items()
    }
    return GgufHeader(metadata, tensors)


def _described(
    name: str, reverse: tuple[int, ...], number: int, place: tuple[int, int], own_shape: object
) -> GgufTensor:
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
    return GgufTensor(kind.name, shape, at, block, item)
