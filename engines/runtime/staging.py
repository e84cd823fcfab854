"""Brings weights from a file to a GPU through pieces of pinned memory: while some are copied, others are read."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext, suppress
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from ditforge.engines.runtime.weights_reader import CHUNK, READERS, WeightsReader, read_whole
from ditforge.errors import DitforgeError

PIECES = 2 * READERS  # so that each thread has one to read into while another is copied


class Staging:
    """Pieces of the machine's memory, which stay pinned: pinning takes about as long as reading.

    `stream` is the CUDA stream in which they are copied; None copies to the machine's own memory. Raises DitforgeError
    if the memory cannot be pinned.
    """

    def __init__(self, stream: Any = None) -> None:
        self.stream = stream
        memory = torch.empty(PIECES * CHUNK, dtype=torch.uint8)
        if stream is not None:
            pin(memory.data_ptr(), memory.numel())
        self.free: SimpleQueue[tuple[Tensor, Any]] = SimpleQueue()  # each with the event of its last copy
        for number in range(PIECES):
            self.free.put((memory[number * CHUNK :][:CHUNK], None))

    def fill(self, file: WeightsReader, names: Sequence[str], places: Sequence[Tensor]) -> None:
        """Read tensors into their places, which are uint8 [bytes] on the device. They are there for what the stream,
        or one that waits for it, does afterwards.

        Raises OSError if the file has been cut short.
        """

        def bring(number: int, start: int, end: int, position: int) -> None:
            piece, copied = self.free.get()
            try:
                if copied is not None:
                    copied.synchronize()
                part = piece[: end - start]
                read_whole(file.file, part.numpy(), position)
                with nullcontext() if self.stream is None else torch.cuda.stream(self.stream):
                    places[number][start:end].copy_(part, non_blocking=True)
                copied = None if self.stream is None else self.stream.record_event()
            finally:
                self.free.put((piece, copied))

        file.each(bring, names, [place.numel() for place in places])


def pin(address: int, size: int) -> None:
    """Have CUDA copy from the machine's memory directly, from and to `size` bytes at `address`.

    PyTorch's own pinned memory would be rounded up to a power of two. Raises DitforgeError if the system does not allow
    so much.
    """
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    status = runtime.cudaHostRegister(address, size, 0)
    if int(status):
        with suppress(RuntimeError):
            torch.ones(1, device="cuda")  # raises the error once more, which would meet some other call otherwise
        problem = f"{size / 2**20:.0f} MiB of memory cannot be pinned for the GPU: {runtime.cudaGetErrorString(status)}"
        raise DitforgeError(problem, "ulimit -l unlimited   and more free memory")


def unpin(address: int) -> None:
    """Undo pin(), before the memory is freed."""
    torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]
