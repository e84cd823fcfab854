"""Tensors that are read only when they are needed: from a safetensors file, or computed from other such tensors.

Every operation on a weight (cutting, joining, multiplying by a scale, adding a LoRA) works row by row. A part of a
fused weight can therefore be made without reading the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ditforge.export.checkpoint.weights import DTYPES, Stored, Weights, read_header

ReadRows = Callable[[int, int], torch.Tensor]


@dataclass(frozen=True)
class Lazy:
    """A tensor that is not read yet.

    `read_rows(start, stop)` reads the rows from `start` to `stop` of dimension 0. `file` is the file that the tensor
    comes from, for error messages. A scalar has the shape () and one row.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path
    read_rows: ReadRows = field(repr=False)

    @property
    def length(self) -> int:
        """The number of rows."""
        return self.shape[0] if self.shape else 1

    def read(self) -> torch.Tensor:
        """Read the whole tensor."""
        return self.read_rows(0, self.length)

    def rows(self, start: int, stop: int) -> Lazy:
        """Return the rows from `start` to `stop`, still unread."""
        if (start, stop) == (0, self.length):
            return self
        read = self.read_rows
        return Lazy((stop - start, *self.shape[1:]), self.dtype, self.file, lambda a, b: read(start + a, start + b))

    def each_row(self, change: ReadRows, dtype: torch.dtype, row: tuple[int, ...] | None = None) -> Lazy:
        """Return a tensor with as many rows, which `change(start, stop)` reads and converts.

        `dtype` is the dtype of the result, and `row` the shape of each of its rows (None: as before).
        """
        return Lazy(self.shape if row is None else (self.length, *row), dtype, self.file, change)


def joined(parts: Iterable[Lazy]) -> Lazy:
    """Concatenate the parts along their rows, without reading them."""
    parts = list(parts)
    if len(parts) == 1:
        return parts[0]

    def read(start: int, stop: int) -> torch.Tensor:
        pieces, first = [], 0
        for part in parts:
            a, b = max(start - first, 0), min(stop - first, part.length)
            if a < b:
                pieces.append(part.read_rows(a, b))
            first += part.length
        return torch.cat(pieces)

    length = sum(part.length for part in parts)
    return Lazy((length, *parts[0].shape[1:]), parts[0].dtype, parts[0].file, read)


def identity(size: int, like: Lazy) -> Lazy:
    """Return the identity matrix [size, size], in the dtype and with the file of the tensor `like`."""
    return Lazy((size, size), like.dtype, like.file, lambda a, b: torch.eye(size, dtype=like.dtype)[a:b])


def transposed(tensor: Lazy) -> Lazy:
    """Return the transposed matrix. The whole tensor is read for any of its rows."""
    rows, columns = tensor.shape
    return Lazy((columns, rows), tensor.dtype, tensor.file, lambda a, b: tensor.read()[:, a:b].T.contiguous())


def as_weights(folder: Path, tensors: Mapping[str, Lazy]) -> Weights:
    """Return the tensors of one network as Weights. `folder` is the folder that error messages name."""
    return Weights(
        folder,
        shards={name: tensor.file for name, tensor in tensors.items()},
        shapes={name: tensor.shape for name, tensor in tensors.items()},
        reads={name: tensor.read for name, tensor in tensors.items()},
    )


def open_tensors(file: Path) -> dict[str, Lazy]:
    """Return the tensors of a safetensors or GGUF file by name, without reading them.

    Raises UserError for a file that is truncated, damaged or of another format.
    """
    from ditforge.export.checkpoint.gguf_file import open_gguf
    from ditforge.export.checkpoint.gguf_header import is_gguf

    if is_gguf(file):
        return open_gguf(file).tensors
    return {name: in_file(stored) for name, stored in read_header(file).items()}


def in_file(stored: Stored) -> Lazy:
    """Return the stored tensor, unread."""
    return Lazy(stored.shape, getattr(torch, DTYPES[stored.dtype]), stored.file, stored.rows)


def folder_tensors(weights: Weights) -> dict[str, Lazy]:
    """Return the tensors in the folder of a diffusers component by name, from all its shards, without reading them."""
    files = {file: open_tensors(file) for file in set(weights.shards.values())}
    return {name: files[file][name] for name, file in weights.shards.items()}
