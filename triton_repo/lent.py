"""Tensors of one request and its answer that go to Triton and come back in shared memory, and not through the socket.

Through the socket, a mebibyte takes two milliseconds or more: it is cut into frames of 16 KiB and copied several times.
"""

from __future__ import annotations

from collections import OrderedDict
from contextlib import ExitStack
from pathlib import Path

from tritonclient.grpc import service_pb2 as pb

from ditforge.shared_memory import LARGE, OFFSET, REGION
from ditforge.triton_repo import wire
from ditforge.triton_repo.arena import Arena
from ditforge.triton_repo.limits import ITEM_BYTES

MOST_BYTES = 64 << 20  # of all that is lent at a time; what finds no room is sent
MOST_KNOWN = 256  # questions of which is known how large their answers are

Question = tuple[str, tuple[tuple[str, tuple[int, ...]], ...]]  # a model, and the names and shapes of its inputs


class LentTensors:
    """Lends parts of the new file `file` of /dev/shm to requests; without a file, nothing is lent."""

    def __init__(self, file: Path | None = None) -> None:
        self.arena = Arena(MOST_BYTES, file)
        self.known: OrderedDict[Question, dict[str, int]] = OrderedDict()  # the bytes of each output

    def part(self, held: ExitStack, size: int) -> memoryview | None:
        """Memory for a large content, which need not be moved later; None if it is not to be lent."""
        start = self.taken(size, held) if self.arena.shared else None
        return None if start is None else self.arena.view(start, size)

    def lend_inputs(self, request: pb.ModelInferRequest, raw: list[wire.Raw], held: ExitStack) -> None:
        """Move the large ones of the raw contents into shared memory, which is given back when `held` is closed."""
        sent = [tensor for tensor in request.inputs if REGION not in tensor.parameters]
        if len(raw) != len(sent) or not self.arena.shared:
            return  # they were sent as lists of numbers, or Triton cannot see the memory
        small = []
        for tensor, content in zip(sent, raw, strict=True):
            start = self.arena.find(content)
            if start is None and (start := self.taken(len(content), held)) is not None:
                self.arena.view(start, len(content))[:] = content
            if start is None:
                small.append(content)
            else:
                self.arena.refer(tensor.parameters, start, len(content))
        raw[:] = small

    def lend_outputs(self, request: pb.ModelInferRequest, held: ExitStack) -> None:
        """Have Triton write the large ones of the outputs that the request names into shared memory.

        It has to be known how large they will be: as large as when the model had inputs of the same shapes before.
        """
        sizes = self.known.get(question(request), {})
        for output in request.outputs:
            start = self.taken(sizes.get(output.name, 0), held) if self.arena.shared else None
            if start is not None:
                self.arena.refer(output.parameters, start, sizes[output.name])

    def forget(self, request: pb.ModelInferRequest) -> None:
        """Forget how large the answer to such a request is: one failed, and this may have been wrong."""
        self.known.pop(question(request), None)

    def taken(self, size: int, held: ExitStack) -> int | None:
        """Take a part of so many bytes for a large tensor. Returns where it begins, or None if it is not to be lent."""
        start = self.arena.take(size) if size >= LARGE else None
        if start is not None:
            held.callback(self.arena.free, start)
        return start

    def complete(self, request: pb.ModelInferRequest, response: pb.ModelInferResponse, raw: list[wire.Raw]) -> None:
        """Put the outputs that are in shared memory among the raw contents of Triton's answer, without copying them.

        Triton says nothing of them; the outputs of the `request` say where they are. Notes how large all outputs are.
        """
        places = {one.name: one.parameters[OFFSET].int64_param for one in request.outputs if REGION in one.parameters}
        sizes: dict[str, int] = {}
        for number, output in enumerate(response.outputs):
            if output.datatype in ITEM_BYTES:
                sizes[output.name] = wire.count(output) * ITEM_BYTES[output.datatype]
            if output.name in places:
                raw[number] = self.arena.view(places[output.name], sizes[output.name])
        asked = question(request)
        self.known[asked] = sizes
        self.known.move_to_end(asked)
        if len(self.known) > MOST_KNOWN:
            self.known.popitem(last=False)


def question(request: pb.ModelInferRequest) -> Question:
    """What determines how large a model's outputs are."""
    return request.model_name, tuple((tensor.name, tuple(tensor.shape)) for tensor in request.inputs)
