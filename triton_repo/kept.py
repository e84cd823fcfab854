"""The inputs of a picture that the front keeps for its later steps: the prompt's embeddings, which stay the same.

They are by far the most of what travels in a step (4 MiB for FLUX.1, where latents of 1024 x 1024 pixels are 1 MiB).
They are kept where Triton can read them, and so need not travel from the front to Triton either.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tritonclient.grpc import service_pb2 as pb

from ditforge.triton_repo.arena import Arena
from ditforge.triton_repo.limits import BadRequest
from ditforge.triton_repo.refusal import Refused, Status
from ditforge.triton_repo.wire import Raw

MOST_BYTES = 256 << 20  # of everything that is kept; who was used longest ago is forgotten first
MOST_LABELS = 64  # of one picture, whose batch may be sent in several parts
LONGEST_NAME = 64  # of a picture or a label


@dataclass
class Entry:
    """Inputs that are kept: each tensor, with where its content begins in the arena, and its bytes.

    `users` counts the requests that refer to them, and who finds them by their label.
    """

    start: int
    tensors: list[tuple[pb.ModelInferRequest.InferInputTensor, int, int]]
    users: int = 1


class KeptInputs:
    """What is kept, by picture and label, in the new file `file` of /dev/shm."""

    def __init__(self, file: Path | None = None) -> None:
        self.arena = Arena(MOST_BYTES, file)
        self.pictures: OrderedDict[str, dict[str, Entry]] = OrderedDict()

    def find(self, request: pb.ModelInferRequest, place: tuple[str, str], names: Sequence[str]) -> Entry | None:
        """What is kept in `place`, if the request has none of the inputs `names`. It is to be released.

        Raises Refused if nothing is kept there, and BadRequest if the place has no valid name.
        """
        if any(not name or len(name) > LONGEST_NAME for name in place):
            raise BadRequest(f"a picture and what is kept for it have names of 1 to {LONGEST_NAME} characters")
        if {tensor.name for tensor in request.inputs} & set(names):
            return None
        picture, label = place
        entry = self.pictures.get(picture, {}).get(label)
        if entry is None:
            raise Refused(Status.ABORTED, "the server does not have what was kept for the picture; send it again")
        self.pictures.move_to_end(picture)
        entry.users += 1
        return entry

    def fill(self, request: pb.ModelInferRequest, raw: list[Raw], entry: Entry) -> None:
        """Add the tensors and their contents to a request. Raises Refused if it has no raw contents itself."""
        if len(raw) != len(request.inputs):
            raise Refused(Status.ABORTED, "kept inputs need others as raw contents; send them all")
        for tensor, start, size in entry.tensors:
            request.inputs.append(tensor)
            raw.append(self.arena.view(start, size))

    def refer(self, request: pb.ModelInferRequest, raw: list[Raw], entry: Entry) -> None:
        """Have Triton read the contents of a filled request, which are the last ones, from the file."""
        if not self.arena.shared:
            return
        count = len(entry.tensors)
        del raw[-count:]
        for tensor, (_, start, size) in zip(request.inputs[-count:], entry.tensors, strict=True):
            self.arena.refer(tensor.parameters, start, size)

    def release(self, entry: Entry) -> None:
        """Note that a request does not refer to it any more."""
        entry.users -= 1
        if not entry.users:
            self.arena.free(entry.start)

    def keep(
        self, request: pb.ModelInferRequest, raw: Sequence[Raw], place: tuple[str, str], names: Sequence[str]
    ) -> None:
        """Keep the inputs `names` of a request that was checked, if there is room."""
        if len(raw) != len(request.inputs):
            return  # they were sent as lists of numbers, which are not kept
        pairs = [(t, content) for t, content in zip(request.inputs, raw, strict=True) if t.name in names]
        if not pairs:
            return
        picture, label = place
        self.drop(picture, label)
        size = sum(len(content) for _, content in pairs)
        while (start := self.arena.take(size)) is None:
            if not self.pictures:
                return
            self.forget(next(iter(self.pictures)))
        entry, end = Entry(start, []), start
        for tensor, content in pairs:
            self.arena.memory[end : end + len(content)] = content
            own = pb.ModelInferRequest.InferInputTensor()
            own.CopyFrom(tensor)  # the request's own will say where Triton finds the content this time
            entry.tensors.append((own, end, len(content)))
            end += len(content)
        labels = self.pictures.setdefault(picture, {})
        self.pictures.move_to_end(picture)
        labels[label] = entry
        if len(labels) > MOST_LABELS:
            self.drop(picture, next(iter(labels)))

    def drop(self, picture: str, label: str) -> None:
        """Forget what is kept under one label."""
        if entry := self.pictures.get(picture, {}).pop(label, None):
            self.release(entry)

    def forget(self, picture: str | None) -> None:
        """Forget what is kept for a picture."""
        for entry in self.pictures.pop(picture or "", {}).values():
            self.release(entry)
