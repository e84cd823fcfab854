"""Tensors of clients on this machine: they come and go in files of the clients, and not through the connection.

Through a connection, a mebibyte takes milliseconds: it is cut into frames of 16 KiB and copied several times. The files
are read and written, and never mapped, because a client may cut its file short at any time.
"""

from __future__ import annotations

import fcntl
import os
import stat
import time
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tritonclient.grpc import service_pb2 as pb

from ditforge.shared_memory import BYTES, FILE, OFFSET, REGION
from ditforge.triton_repo.limits import BadRequest, shown
from ditforge.triton_repo.refusal import Refused, Status
from ditforge.triton_repo.wire import Raw

SWEPT_EVERY = 60.0  # seconds; also how old a file is at least that is removed, as it is locked soon after it is made
OPENING = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
PARAMETERS = {REGION: "string_param", OFFSET: "int64_param", BYTES: "int64_param"}

Memory = Callable[[int], memoryview | None]  # gives memory of so many bytes, or None


def nowhere(size: int) -> None:
    """No memory."""


@dataclass(frozen=True)
class Place:
    """A part of the file of this name: where it begins, and its bytes."""

    file: str
    start: int
    size: int


class LocalTensors:
    """The files of clients in the new folder `folder`, if there is to be one."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self.name = folder.name if folder else ""  # which clients are told
        self.swept = time.monotonic()
        if self.folder is not None:
            self.folder.mkdir(mode=0o700)

    def take(
        self, request: pb.ModelInferRequest, raw: list[Raw], most: int, memory: Memory = nowhere
    ) -> dict[str, Place]:
        """Read the inputs of a request that are in a file, and put them among the raw contents.

        They have at most `most` bytes in all, and are read into what `memory` returns for a number of bytes, or into
        new memory if that is None. Returns where outputs are to be written, by name. Nothing in the request speaks of
        the file afterwards, and it is not kept open, since many requests can be under way. Raises BadRequest where the
        request is wrong, and Refused where there is no such file.
        """
        tensors = [tensor for tensor in (*request.inputs, *request.outputs) if REGION in tensor.parameters]
        if not tensors or self.folder is None:
            return {}  # parameters are refused later, as all others are
        (name, *others) = {tensor.parameters[REGION].string_param for tensor in tensors}
        if others:
            raise BadRequest("all tensors of a request that are in shared memory are in one file")
        with self.open(name) as descriptor:
            size = os.fstat(descriptor).st_size
            places = [taken(tensor.name, tensor.parameters, size) for tensor in tensors]
            count = sum(REGION in tensor.parameters for tensor in request.inputs)
            if len(raw) + count != len(request.inputs):
                raise BadRequest("inputs are in shared memory or in raw_input_contents, one for each")
            if sum(place.size for place in places[:count]) > most:
                raise BadRequest(f"the inputs of a request have at most {most} bytes in shared memory")
            found, sent = (read(descriptor, place, memory) for place in places[:count]), iter(list(raw))
            raw[:] = [next(found) if REGION in tensor.parameters else next(sent) for tensor in request.inputs]
        for tensor in tensors:
            tensor.parameters.clear()
        return {tensor.name: place for tensor, place in zip(tensors[count:], places[count:], strict=True)}

    @contextmanager
    def open(self, name: str) -> Iterator[int]:
        """Open the file of this name for the duration of the block. Raises Refused if there is none of this user's."""
        assert self.folder is not None
        missing = Refused(Status.NOT_FOUND, "this server has no such file in shared memory; send the tensors")
        if not FILE.fullmatch(name):
            raise missing
        try:
            descriptor = os.open(self.folder / name, OPENING)
        except OSError:
            raise missing from None
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode) or found.st_uid != os.getuid():
                raise missing
            yield descriptor
        finally:
            os.close(descriptor)

    def give(self, response: pb.ModelInferResponse, raw: list[Raw], places: dict[str, Place]) -> None:
        """Write the contents of outputs to their places, and leave nothing of these to be sent.

        What finds no room, or has another size than was asked for, is sent. A file never becomes larger.
        """
        if not places:
            return
        (name,) = {place.file for place in places.values()}
        with suppress(Refused), self.open(name) as descriptor:  # where the client has gone, the answer is lost anyway
            size = os.fstat(descriptor).st_size
            for number, output in enumerate(response.outputs):
                place = places.get(output.name)
                if place is None or len(raw[number]) != place.size or place.start + place.size > size:
                    continue
                if write(descriptor, place, raw[number]):
                    raw[number] = b""

    def sweep(self) -> None:
        """Remove the files of clients that have ended without doing so, now and then. The others hold a lock."""
        if self.folder is None or time.monotonic() - self.swept < SWEPT_EVERY:
            return
        self.swept = time.monotonic()
        with suppress(OSError):  # somebody else may have removed the folder; then tensors are sent
            for path in self.folder.iterdir():
                with suppress(OSError):
                    if time.time() - path.lstat().st_mtime > SWEPT_EVERY:
                        remove_unlocked(path)


def taken(name: str, parameters: MutableMapping[str, pb.InferParameter], size: int) -> Place:
    """Where the parameters of the tensor `name` say that it is, in a file of `size` bytes."""
    kinds = {key: value.WhichOneof("parameter_choice") for key, value in parameters.items()}
    if kinds != PARAMETERS:
        raise BadRequest(f"{shown(name)} has the parameters {', '.join(PARAMETERS)}, or none")
    start, count = parameters[OFFSET].int64_param, parameters[BYTES].int64_param
    if not 0 <= start <= start + count <= size or not count:
        where = f"{count} bytes from {start} on"
        raise BadRequest(f"{shown(name)} is not in the {size} bytes of its file in shared memory: {where}")
    return Place(parameters[REGION].string_param, start, count)


def read(descriptor: int, place: Place, memory: Memory) -> Raw:
    """Read a tensor. Raises BadRequest if the file has become shorter meanwhile."""
    if (there := memory(place.size)) is None:
        content: Raw = os.pread(descriptor, place.size, place.start)
        size = len(content)
    else:
        content, size = there, os.preadv(descriptor, [there], place.start)
    if size != place.size:
        raise BadRequest("the file in shared memory was cut short")
    return content


def write(descriptor: int, place: Place, content: Raw) -> bool:
    """Write a tensor. Returns whether there was room for all of it."""
    try:
        return os.pwrite(descriptor, content, place.start) == place.size
    except OSError:
        return False


def remove_unlocked(path: Path) -> None:
    """Remove a file unless somebody holds a lock on it. Raises OSError if somebody does."""
    descriptor = os.open(path, OPENING)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
    finally:
        os.close(descriptor)
