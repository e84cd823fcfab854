"""Reads weights from a safetensors file into memory that is there already, with several threads.

One thread copies 2 to 3 GB a second from the page cache, where a GPU takes 25 and more.
Source: the format's description at https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from safetensors import safe_open

from ditforge.engines.compilers import Shape, weights_file

READERS = 8  # threads
CHUNK = 8 << 20  # bytes that one of them reads at a time
DTYPES = {name: dtype for dtype, name in weights_file.DTYPES.items()}


class WeightsReader:
    """An open file of weights. It is a context manager.

    dtypes, shapes: those of the tensors, by name. Raises SafetensorError if the file is damaged or cut short.
    """

    def __init__(self, path: Path) -> None:
        with safe_open(path, framework="pt"):
            pass  # it has checked the header, against the file's size too
        self.file = os.open(path, os.O_RDONLY)
        length = int.from_bytes(os.pread(self.file, 8, 0), "little")
        header: dict[str, Any] = json.loads(os.pread(self.file, length, 8))
        header.pop("__metadata__", None)
        self.dtypes: dict[str, torch.dtype] = {name: DTYPES[found["dtype"]] for name, found in header.items()}
        self.shapes: dict[str, Shape] = {name: tuple(found["shape"]) for name, found in header.items()}
        self.starts: dict[str, int] = {name: 8 + length + found["data_offsets"][0] for name, found in header.items()}
        self.threads = ThreadPoolExecutor(min(READERS, os.cpu_count() or 1))

    def read(self, names: Sequence[str], places: Sequence[NDArray[Any]]) -> None:
        """Read tensors into their places, which are uint8 [bytes]. Raises OSError if the file has been cut short."""

        def take(number: int, start: int, end: int, position: int) -> None:
            read_whole(self.file, places[number][start:end], position)

        self.each(take, names, [len(place) for place in places])

    def each(self, take: Callable[[int, int, int, int], None], names: Sequence[str], sizes: Sequence[int]) -> None:
        """Have several threads call `take` for each part of tensors, of so many bytes each.

        It is given the tensor's number, where the part begins and ends in it, and where the part begins in the file.
        """
        parts = [
            (number, start, min(start + CHUNK, size), self.starts[name] + start)
            for number, (name, size) in enumerate(zip(names, sizes, strict=True))
            for start in range(0, size, CHUNK)
        ]
        for _ in self.threads.map(lambda part: take(*part), parts):
            pass

    def __enter__(self) -> WeightsReader:
        return self

    def __exit__(self, *error: object) -> None:
        self.threads.shutdown()
        os.close(self.file)


def read_whole(file: int, place: NDArray[Any], start: int) -> None:
    """Fill `place` with what is in the file from `start` on. Raises OSError if there is less."""
    done = 0
    while done < len(place):
        if not (count := os.preadv(file, [place[done:].data], start + done)):
            raise OSError(f"the file ends after {start + done} bytes, and the weights do not")
        done += count
