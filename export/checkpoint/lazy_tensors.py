"""Tensors that are read when they are wanted: rows of safetensors files, and what is made of such rows.

Everything that is done to a weight here (cut, joined, multiplied by a scale, a LoRA added) works row by row, so that a
part of a fused weight is made without reading the rest.
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
    """A tensor that is not read yet. `file` is where it comes from; `read_rows(start, stop)` reads rows of dimension 0.

    A scalar has the shape () and one row.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path
    read_rows: ReadRows = field(repr=False)

    @property
    def length(self) -> int:
        """How many rows it has."""
        return self.shape[0] if self.shape else 1

    def read(self) -> torch.Tensor:
        """All of it."""
        return self.read_rows(0, self.length)

    def rows(self, start: int, stop: int) -> Lazy:
        """The rows from `start` to `stop`."""
        if (start, stop) == (0, self.length):
            return self
        read = self.read_rows
        return Lazy((stop - start, *self.shape[1:]), self.dtype, self.file, lambda a, b: read(start + a, start + b))

    def each_row(self, change: ReadRows, dtype: torch.dtype, row: tuple[int, ...] | None = None) -> Lazy:
        """What `change` makes of rows, in `dtype`, each of the shape `row`; None: the shape that it had."""
        return Lazy(self.shape if row is None else (self.length, *row), dtype, self.file, change)


def joined(parts: Iterable[Lazy]) -> Lazy:
    """The parts one below the other."""
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


def as_weights(folder: Path, tensors: Mapping[str, Lazy]) -> Weights:
    """The tensors of one network as the rest of the export takes them; `folder` is named in messages."""
    return Weights(
        folder,
        shards={name: tensor.file for name, tensor in tensors.items()},
        shapes={name: tensor.shape for name, tensor in tensors.items()},
        reads={name: tensor.read for name, tensor in tensors.items()},
    )


def open_tensors(file: Path) -> dict[str, Lazy]:
    """The tensors of the safetensors file by name, none of them read.

    Raises UserError for a file that is truncated, damaged or of another format.
    """
    return {name: in_file(stored) for name, stored in read_header(file).items()}


def in_file(stored: Stored) -> Lazy:
    """The tensor that is stored so."""
    return Lazy(stored.shape, getattr(torch, DTYPES[stored.dtype]), stored.file, stored.rows)


def folder_tensors(weights: Weights) -> dict[str, Lazy]:
    """The tensors of a diffusers component's folder by name, from all its shards, none of them read."""
    files = {file: open_tensors(file) for file in set(weights.shards.values())}
    return {name: files[file][name] for name, file in weights.shards.items()}
