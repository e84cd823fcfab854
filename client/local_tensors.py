"""Large tensors that a server on this machine gets and gives in files in its folder, and not through the connection.

The server has to run as the same user, since nobody else can open the folder. If it cannot be opened, because the
server is on another machine or in a container, tensors are sent.
"""

from __future__ import annotations

import contextlib
import os
import stat
import uuid
import weakref
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2 as pb

from ditforge.client.answer import DTYPES, Output, WrongAnswer
from ditforge.shared_memory import FOLDER, LARGE, SHM, aligned, extend, refer

MOST_IDLE = 16  # files that wait for the next call; more, of many calls at once, are removed


class LocalTensors:
    """The files of one client in a server's folder: one for each call that is under way. Any thread can use it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.idle: list[TensorFile] = []
        self.closed = False

    @contextlib.contextmanager
    def file(self) -> Iterator[TensorFile | None]:
        """A file for one call; None if none can be made. After an error it is removed: the server may still write."""
        file = self.take()
        try:
            yield file
        except BaseException:
            if file is not None:
                file.remove()
            raise
        if file is not None:
            if len(self.idle) < MOST_IDLE:
                file.end = 0
                self.idle.append(file)
            else:
                file.remove()
            if self.closed:
                self.close()

    def take(self) -> TensorFile | None:
        """An idle file, or a new one."""
        with contextlib.suppress(IndexError):  # another thread may take the last one
            while True:
                file = self.idle.pop()
                if file.process == os.getpid():
                    return file  # others are those of the process that this one is a fork of
        with contextlib.suppress(OSError):
            return TensorFile(self.folder)
        return None

    def close(self) -> None:
        """Remove the files. Those of calls under way are removed when these have ended."""
        self.closed = True
        with contextlib.suppress(IndexError):
            while True:
                self.idle.pop().remove()


class TensorFile:
    """A file that holds tensors of one call after the other. Raises OSError if it cannot be made.

    It is removed when nobody refers to it any more, and at the end of the process. A fork of the process has it too,
    but must not use it, and closes it only.
    """

    def __init__(self, folder: Path) -> None:
        import fcntl  # which only Unix has, as it has /dev/shm

        self.path = folder / uuid.uuid4().hex
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        self.descriptor = os.open(self.path, flags, 0o600)
        self.process = os.getpid()
        self.remove = weakref.finalize(self, remove, self.path, self.descriptor, self.process)
        fcntl.lockf(self.descriptor, fcntl.LOCK_EX)  # the server removes files that no process has locked
        self.size = 0  # bytes that have memory
        self.end = 0  # of what this call has in it

    def place(self, parameters: MutableMapping[str, pb.InferParameter], size: int) -> int | None:
        """Find room for a tensor of so many bytes, and have its parameters say where. None if it is to be sent."""
        start, end = self.end, aligned(self.end + size)
        if size < LARGE or (end > self.size and not extend(self.descriptor, self.size, end)):
            return None
        self.size, self.end = max(self.size, end), end
        refer(parameters, self.path.name, start, size)
        return start

    def put(self, parameters: MutableMapping[str, pb.InferParameter], array: NDArray[Any]) -> bool:
        """Write an input into the file, and have its parameters say where. Returns whether it is there."""
        start = self.place(parameters, array.nbytes)
        if start is None:
            return False
        try:
            written = os.pwrite(self.descriptor, np.ascontiguousarray(array).data, start)
        except OSError:
            written = 0
        if written != array.nbytes:
            parameters.clear()
            return False
        return True

    def read(self, start: int, output: Output) -> NDArray[Any]:
        """Read an output that begins there. Raises WrongAnswer if the file has become shorter."""
        array = np.empty(output.shape, DTYPES[output.dtype])
        if os.preadv(self.descriptor, [array.data], start) != array.nbytes:
            raise WrongAnswer(f"expected {output} in shared memory, got less")
        return array


def remove(path: Path, descriptor: int, process: int) -> None:
    """Close a file, and remove it if this is the process that made it."""
    if process == os.getpid():
        with contextlib.suppress(OSError):
            path.unlink()
    os.close(descriptor)


def find(name: str) -> LocalTensors | None:
    """The folder which a server says is called `name` in /dev/shm, if it is there, and this user's alone."""
    if not FOLDER.fullmatch(name):
        return None
    folder = SHM / name
    try:
        found = folder.lstat()
    except OSError:
        return None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        return None
    return LocalTensors(folder)
