"""The inputs of a picture that the front keeps for its later steps: the prompt's embeddings, which stay the same.

They are by far the most of what travels in a step (4 MiB for FLUX.1, where latents of 1024 x 1024 pixels are 1 MiB).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from tritonclient.grpc import service_pb2 as pb

from ditforge.triton_repo.limits import BadRequest
from ditforge.triton_repo.refusal import Refused, Status

MOST_BYTES = 256 << 20  # of everything that is kept; who was used longest ago is forgotten first
MOST_LABELS = 64  # of one picture, whose batch may be sent in several parts
LONGEST_NAME = 64  # of a picture or a label

Raw = bytes | memoryview
Tensor = tuple[pb.ModelInferRequest.InferInputTensor, bytes]


class KeptInputs:
    """What is kept, by picture and label."""

    def __init__(self) -> None:
        self.pictures: OrderedDict[str, dict[str, list[Tensor]]] = OrderedDict()
        self.bytes = 0

    def fill(self, request: pb.ModelInferRequest, raw: list[Raw], place: tuple[str, str], names: Sequence[str]) -> bool:
        """Add what is kept in `place` to a request that has none of the inputs `names`. Returns whether it did.

        Raises Refused if nothing is kept there, and BadRequest if the place has no valid name.
        """
        if any(not name or len(name) > LONGEST_NAME for name in place):
            raise BadRequest(f"a picture and what is kept for it have names of 1 to {LONGEST_NAME} characters")
        if {tensor.name for tensor in request.inputs} & set(names):
            return False
        picture, label = place
        tensors = self.pictures.get(picture, {}).get(label)
        if tensors is None or len(raw) != len(request.inputs):
            raise Refused(Status.ABORTED, "the server does not have what was kept for the picture; send it again")
        self.pictures.move_to_end(picture)
        for tensor, content in tensors:
            request.inputs.append(tensor)
            raw.append(content)
        return True

    def keep(
        self, request: pb.ModelInferRequest, raw: Sequence[Raw], place: tuple[str, str], names: Sequence[str]
    ) -> None:
        """Keep the inputs `names` of a request that was checked."""
        if len(raw) != len(request.inputs):
            return  # they were sent as lists of numbers, which are not kept
        picture, label = place
        pairs = zip(request.inputs, raw, strict=True)
        tensors = [(tensor, bytes(content)) for tensor, content in pairs if tensor.name in names]
        labels = self.pictures.setdefault(picture, {})
        self.pictures.move_to_end(picture)
        self.bytes += size_of(tensors) - size_of(labels.pop(label, []))
        labels[label] = tensors
        while len(labels) > MOST_LABELS:
            self.bytes -= size_of(labels.pop(next(iter(labels))))
        while self.bytes > MOST_BYTES:
            self.forget(next(iter(self.pictures)))

    def forget(self, picture: str | None) -> None:
        """Forget what is kept for a picture."""
        for tensors in self.pictures.pop(picture or "", {}).values():
            self.bytes -= size_of(tensors)


def size_of(tensors: Sequence[Tensor]) -> int:
    """The bytes of the contents."""
    return sum(len(content) for _, content in tensors)
