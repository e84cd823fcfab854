"""Memory in /dev/shm by which the front and Triton hand large tensors to each other, instead of sending them."""

from __future__ import annotations

import logging
import mmap
import os
from collections.abc import MutableMapping, Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2 as pb

from ditforge.shared_memory import aligned, extend, refer

REGISTER = "/inference.GRPCInferenceService/SystemSharedMemoryRegister"
log = logging.getLogger(__name__)


class Arena:
    """So many bytes of memory, in the new file `file`; without one, the memory is this process's alone.

    `shared` says whether the Triton that runs has been told of the file. Only what has been taken needs room in
    /dev/shm.
    """

    def __init__(self, size: int, file: Path | None = None) -> None:
        self.size, self.file, self.shared = size, file, False
        self.descriptor = -1
        if file is not None:
            self.descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
            os.ftruncate(self.descriptor, size)
        self.memory = mmap.mmap(self.descriptor, size)
        self.backed = 0  # bytes from the beginning that have memory, also where they were given back
        self.used: list[tuple[int, int]] = []  # where each part that is taken begins and ends, in their order

    async def share(self, channel: grpc.aio.Channel, metadata: Sequence[tuple[str, str]]) -> None:
        """Tell Triton of the file. Where it cannot read it, contents are sent."""
        self.shared = False
        if self.file is None:
            return
        request = pb.SystemSharedMemoryRegisterRequest(
            name=self.file.name, key=f"/{self.file.name}", byte_size=self.size
        )
        try:
            await channel.unary_unary(REGISTER)(request.SerializeToString(), timeout=10, metadata=metadata)
            self.shared = True
        except grpc.aio.AioRpcError as error:
            log.warning("large tensors are sent to Triton in each step: %s", error.details())

    def refer(self, parameters: MutableMapping[str, pb.InferParameter], start: int, size: int) -> None:
        """Have a tensor's parameters say that its content is in the part which begins at `start`."""
        assert self.file is not None, "without a file there is nothing to share"
        refer(parameters, self.file.name, start, size)

    def view(self, start: int, size: int) -> memoryview:
        """The `size` bytes from `start` on."""
        return memoryview(self.memory)[start : start + size]

    def find(self, content: bytes | memoryview) -> int | None:
        """Where a content begins, if it is here."""
        if isinstance(content, bytes) or content.obj is not self.memory:
            return None
        return address(content) - address(self.memory)

    def take(self, size: int) -> int | None:
        """Take a part of so many bytes. Returns where it begins, or None if there is no such room."""
        size = aligned(size)
        start, place = 0, 0
        for begin, end in self.used:
            if begin - start >= size:
                break
            start, place = end, place + 1
        if self.size - start < size:
            return None
        if self.descriptor >= 0 and start + size > self.backed and not self.back(start + size):
            return None
        self.used.insert(place, (start, start + size))
        return start

    def back(self, end: int) -> bool:
        """Give the file memory up to `end`. Returns whether there is so much."""
        if not extend(self.descriptor, self.backed, end):
            return False
        self.backed = end
        return True

    def free(self, start: int) -> None:
        """Give back the part that begins there."""
        place = next(number for number, (begin, _) in enumerate(self.used) if begin == start)
        del self.used[place]


def address(memory: Any) -> int:
    """The address of the first byte of what has Python's buffer interface."""
    found: int = np.frombuffer(memory, np.uint8).__array_interface__["data"][0]
    return found
