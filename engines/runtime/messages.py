"""What the engine process and its clients say to each other: JSON over a Unix socket, and memory that both have mapped.

A message is its length (4 bytes, big endian) and a JSON object. Memory travels as file descriptors beside a message
(SCM_RIGHTS, unix(7)), once each; arrays are then places in it. A client asks, and waits for the answer before it asks
again, so that there is never more than one message under way in a direction.

    {"call": "prepare", "engines": [[COMPILER, TARGET], …]}      of which some will be loaded soon
        → {}
    {"call": "load", "folder": PATH, "files": {NAME: File}, "made": Engine}
        → {"inputs": [NAME, …], "outputs": [NAME, …]}
    {"call": "run", "parts": [{NAME: ARRAY, …}, …]}      requests of equal shapes, which are run as one batch
        → {"outputs": {NAME: ARRAY, …}}
    {"call": …}                                          of an engine that fails
        → {"error": CLASS, "problem": TEXT, "fix": TEXT, "user": BOOL}

ARRAY is [DTYPE, SHAPE, MEMORY, OFFSET], where MEMORY is a number. `"memory": [[NUMBER, BYTES], …]` names the file
descriptors that come with a message, and `"dropped": [NUMBER, …]` is memory that no message will name again.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import socket
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

LENGTH = struct.Struct("!I")
MOST_DESCRIPTORS = 64
ALIGNED = 256  # bytes, of the arrays in a piece of memory
LEAST = 1 << 20  # bytes of a piece of memory


class Memory:
    """Memory that processes share, given by a file descriptor, which is closed. It lasts as long as arrays in it do."""

    def __init__(self, descriptor: int, size: int) -> None:
        try:
            self.bytes = np.frombuffer(mmap.mmap(descriptor, size), np.uint8)
        finally:
            os.close(descriptor)

    def array(self, dtype: np.dtype[Any] | str, shape: Sequence[int], offset: int) -> NDArray[Any]:
        """The array that is there. Raises TypeError if it is not inside."""
        return np.ndarray(shape, dtype, self.bytes.data, offset)


class Line:
    """One end of a connection. `memory` is what the other end has sent, by its numbers."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.memory: dict[int, Memory] = {}
        self.offered: list[tuple[int, int, int]] = []  # memory that goes with the next message: number, size, file
        self.dropped: list[int] = []
        self.offers = 0
        self.written: Memory | None = None  # what write() writes to
        self.number = -1  # the other end's name for it
        self.end = 0

    def send(self, message: dict[str, Any]) -> None:
        """Send a message, with what was offered and dropped before. Raises OSError if the other end is gone."""
        offered, dropped, self.offered, self.dropped = self.offered, self.dropped, [], []
        if offered or dropped:
            message["memory"], message["dropped"] = [[number, size] for number, size, _ in offered], dropped
        text = json.dumps(message).encode()
        data = LENGTH.pack(len(text)) + text
        descriptors = [descriptor for _, _, descriptor in offered]
        try:
            self.connection.sendall(data[socket.send_fds(self.connection, [data], descriptors) :])
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def receive(self) -> dict[str, Any]:
        """Wait for a message. Raises EOFError or OSError if the other end is gone."""
        data, descriptors, _, _ = socket.recv_fds(self.connection, 1 << 16, MOST_DESCRIPTORS)
        while len(data) < LENGTH.size or len(data) < LENGTH.size + LENGTH.unpack_from(data)[0]:
            more = self.connection.recv(1 << 20)
            if not more:
                raise EOFError
            data += more
        message: dict[str, Any] = json.loads(data[LENGTH.size :])
        sent = message.get("memory", ())
        if len(sent) != len(descriptors):  # some were lost
            raise OSError(errno.EMFILE, "this process may not have more open files")
        for (number, size), descriptor in zip(sent, descriptors, strict=True):
            self.memory[number] = Memory(descriptor, size)
        for number in message.get("dropped", ()):
            self.memory.pop(number, None)
        return message

    def offer(self, descriptor: int, size: int) -> int:
        """Send a piece of memory with the next message. Returns its number. The file descriptor is then closed."""
        self.offers += 1
        self.offered.append((self.offers, size, descriptor))
        return self.offers

    def begin(self, size: int) -> None:
        """Make room for the arrays of a message, of `size` bytes as `room` counts them, in the place of those before.

        Memory that does not suffice is replaced by twice as much. Arrays in it stay valid.
        """
        self.end = 0
        if self.written is None or self.written.bytes.nbytes < size:
            if self.written is not None:
                self.dropped.append(self.number)
            size = max(LEAST, 1 << (size - 1).bit_length())
            descriptor = os.memfd_create("ditforge")  # without a name anywhere: nothing is left of it in any case
            os.ftruncate(descriptor, size)
            self.number = self.offer(os.dup(descriptor), size)
            self.written = Memory(descriptor, size)

    def place(self, dtype: np.dtype[Any], shape: Sequence[int]) -> tuple[list[Any], NDArray[Any]]:
        """The next array of a message: as the message names it, and to be written to."""
        assert self.written is not None, "begin() comes first"
        array, offset = self.written.array(dtype, shape, self.end), self.end
        self.end += room(array.nbytes)
        return [dtype.str, list(shape), self.number, offset], array

    def array(self, place: Sequence[Any]) -> NDArray[Any]:
        """The array of a message of the other end's. Raises KeyError or TypeError if there is none."""
        dtype, shape, number, offset = place
        return self.memory[number].array(dtype, shape, offset)


def room(size: int) -> int:
    """The bytes that an array of `size` bytes takes in a piece of memory."""
    return -(-size // ALIGNED) * ALIGNED
