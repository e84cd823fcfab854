"""Tensors of one request and its answer that go to Triton and come back in shared memory, and not through the socket.

Through the socket, a mebibyte takes two milliseconds or more: it is cut into frames of 16 KiB and copied several times.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from tritonclient.grpc import service_pb2 as pb

from ditforge.shared_memory import LARGE, OFFSET, REGION
from ditforge.triton_repo import wire
from ditforge.triton_repo.arena import Arena
from ditforge.triton_repo.limits import ITEM_BYTES

MOST_BYTES = 64 << 20  # of all that is lent at a time; what finds no room is sent


class LentTensors:
    """Lends parts of the new file `file` of /dev/shm to requests; without a file, nothing is lent."""

    def __init__(self, file: Path | None = None) -> None:
        self.arena = Arena(MOST_BYTES, file)

    def lend_inputs(self, request: pb.ModelInferRequest, raw: list[wire.Raw], held: ExitStack) -> None:
        """Move the large ones of the raw contents into shared memory, which is given back when `held` is closed."""
        sent = [tensor for tensor in request.inputs if REGION not in tensor.parameters]
        if len(raw) != len(sent) or not self.arena.shared:
            return  # they were sent as lists of numbers, or Triton cannot see the memory
        small = []
        for tensor, content in zip(sent, raw, strict=True):
            start = self.taken(len(content), held)
            if start is None:
                small.append(content)
            else:
                self.arena.memory[start : start + len(content)] = content
                self.arena.refer(tensor.parameters, start, len(content))
        raw[:] = small

    def lend_output(self, request: pb.ModelInferRequest, name: str, size: int, held: ExitStack) -> None:
        """Have Triton write the output `name`, which the request names and which has `size` bytes, there."""
        for output in request.outputs:
            if output.name == name and self.arena.shared and (start := self.taken(size, held)) is not None:
                self.arena.refer(output.parameters, start, size)

    def taken(self, size: int, held: ExitStack) -> int | None:
        """Take a part of so many bytes for a large tensor. Returns where it begins, or None if it is not to be lent."""
        start = self.arena.take(size) if size >= LARGE else None
        if start is not None:
            held.callback(self.arena.free, start)
        return start

    def complete(self, request: pb.ModelInferRequest, response: pb.ModelInferResponse, raw: list[wire.Raw]) -> None:
        """Put the outputs that are in shared memory among the raw contents of Triton's answer, without copying them.

        Triton says nothing of them; the outputs of the `request` say where they are.
        """
        places = {one.name: one.parameters[OFFSET].int64_param for one in request.outputs if REGION in one.parameters}
        view = memoryview(self.arena.memory)
        for number, output in enumerate(response.outputs):
            if output.name in places:
                start = places[output.name]
                raw[number] = view[start : start + wire.count(output) * ITEM_BYTES[output.datatype]]
