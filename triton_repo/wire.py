"""Reads and checks inference requests of KServe's protocol, version 2, before Triton sees them.

Source: https://github.com/triton-inference-server/common/blob/main/protobuf/grpc_service.proto
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
from google.protobuf.message import DecodeError, Message
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2 as pb

from ditforge.triton_repo.limits import DTYPES, ITEM_BYTES, BadRequest, Limits, check_batches, is_finite, shown
from ditforge.triton_repo.served import ModelSignature

M = TypeVar("M", bound=Message)
Raw = bytes | memoryview  # the content of a tensor
MOST_FIELDS = 200  # parts of a message: inputs, outputs, parameters, raw contents
LARGEST_HEAD = 1 << 20  # bytes of a message beside its raw contents
RAW_INPUT, RAW_OUTPUT = 7 << 3 | 2, 6 << 3 | 2  # the tags of raw_input_contents and raw_output_contents
CONTENTS = {
    "FP64": "fp64_contents",
    "FP32": "fp32_contents",
    "INT64": "int64_contents",
    "INT32": "int_contents",
    "INT16": "int_contents",
    "INT8": "int_contents",
    "UINT64": "uint64_contents",
    "UINT32": "uint_contents",
    "UINT16": "uint_contents",
    "UINT8": "uint_contents",
    "BOOL": "bool_contents",
    "BYTES": "bytes_contents",
}
VERSIONS = {"", "1"}  # of a model: the one that a repository has
PARAMETERS = {"timeout", "priority"}  # of a request; all others of Triton's reach into the server


def is_spoilt(response: pb.ModelInferResponse, raw: Sequence[Raw]) -> bool:
    """Return whether an output with the raw contents `raw` contains a NaN or an infinity. Copies no tensor."""
    kinds = [DTYPES.get(tensor.datatype, np.uint8) for tensor in response.outputs]
    pairs = zip(kinds, raw, strict=False)
    return not all(is_finite(np.frombuffer(data, dtype)) for dtype, data in pairs if np.issubdtype(dtype, np.floating))


def serialised(message: Message) -> bytes:
    """Return the bytes of a message."""
    data: bytes = message.SerializeToString()
    return data


def parse(data: bytes, kind: type[M]) -> M:
    """Read a message of that kind. Raises BadRequest if `data` is no such message."""
    try:
        result: M = kind.FromString(data)
        return result
    except DecodeError:
        raise BadRequest(f"the message is not a {kind.DESCRIPTOR.name}") from None


def parse_infer(data: bytes) -> tuple[pb.ModelInferRequest, list[Raw]]:
    """Read a ModelInferRequest. Returns it without its raw contents, and the raw contents, which are not copied.

    Raises BadRequest if `data` is no such message.
    """
    head, raw = split(data, RAW_INPUT)
    request = parse(head, pb.ModelInferRequest)
    if request.raw_input_contents:  # by a tag that is written in another way than ours
        raise BadRequest("the message is not a ModelInferRequest")
    return request, raw


def parse_answer(data: bytes) -> tuple[pb.ModelInferResponse, list[Raw]]:
    """Read Triton's ModelInferResponse. Returns it without its raw contents, and these, which are not copied."""
    head, raw = split(data, RAW_OUTPUT)
    return parse(head, pb.ModelInferResponse), raw


def split(data: bytes, raw_tag: int) -> tuple[bytes, list[Raw]]:
    """Split a message into its bytes without the raw contents, and the raw contents, which are not copied.

    `raw_tag` is the tag of a raw content. Raises BadRequest if the message is damaged, or has far too many or too large
    parts: a parser would need gigabytes for millions of empty ones.
    Source: https://protobuf.dev/programming-guides/encoding
    """
    view, head, raw = memoryview(data), bytearray(), list[Raw]()
    for number, (tag, start, content, end) in enumerate(parts(data)):
        if number == MOST_FIELDS:
            raise BadRequest(f"a message has at most {MOST_FIELDS} inputs, outputs and parameters")
        if tag == raw_tag:
            raw.append(view[content:end])
        else:
            head += view[start:end]
        if len(head) > LARGEST_HEAD:
            raise BadRequest(
                f"a message has at most {LARGEST_HEAD} bytes beside its raw contents:"
                " send large tensors in raw_input_contents"
            )
    return bytes(head), raw


def message(head: pb.ModelInferRequest | pb.ModelInferResponse, raw: Sequence[Raw], raw_tag: int = RAW_INPUT) -> bytes:
    """Write a message with its raw contents anew, so that nothing is forwarded as a stranger wrote it."""
    written: list[Raw] = [head.SerializeToString()]
    for content in raw:
        written += [bytes([raw_tag]), as_varint(len(content)), content]
    return b"".join(written)


def as_varint(value: int) -> bytes:
    """Encode a number as a varint: seven bits in each byte, the lowest first; the eighth bit says that more follow."""
    written = bytearray()
    while value > 0x7F:
        written.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*written, value])


def parts(data: bytes) -> Iterator[tuple[int, int, int, int]]:
    """Yield (tag, start, content, end) for each part of a message. The last three are positions in `data`.

    `start` is where the part begins, `content` where its content begins, and `end` where the next part begins. Raises
    BadRequest if `data` is no message.
    """
    start = 0
    while start < len(data):
        tag, content = varint(data, start)
        if (kind := tag & 7) == 0:
            _, end = varint(data, content)
        elif kind == 2:
            length, content = varint(data, content)
            end = content + length
        elif kind in (1, 5):
            end = content + (8 if kind == 1 else 4)
        else:
            end = len(data) + 1
        if end > len(data):
            raise BadRequest("the message is not a ModelInferRequest")
        yield tag, start, content, end
        start = end


def varint(data: bytes, position: int) -> tuple[int, int]:
    """Read the varint at `position`. Returns its value and the position after it, past the end if it is cut off."""
    value = shift = 0
    while position < len(data) and shift < 70:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
    return value, len(data) + 1


def check(request: pb.ModelInferRequest, raw: Sequence[Raw], served: ModelSignature, known: Sequence[str] = ()) -> None:
    """Raise BadRequest unless the model `served` takes the request with the raw contents `raw`.

    The values of the inputs `known` were checked before.
    """
    if refused := sorted(set(request.parameters) - PARAMETERS):
        raise BadRequest(f"parameters of a request are {', '.join(sorted(PARAMETERS))}, got {shown(refused[0])}")
    for name, value in request.parameters.items():
        if value.WhichOneof("parameter_choice") not in ("int64_param", "uint64_param"):
            raise BadRequest(f"the parameter {name} is a whole number")
    if request.model_version not in VERSIONS:
        raise BadRequest(f"the version is 1, got {shown(request.model_version)}")
    for tensor in (*request.inputs, *request.outputs):
        if tensor.parameters:
            name = sorted(tensor.parameters)[0]
            raise BadRequest(f"{shown(tensor.name)} has the parameter {shown(name)}: tensors travel in the message")
    limits = served.limits
    limits.check_names([tensor.name for tensor in request.inputs])
    served.check_outputs([tensor.name for tensor in request.outputs])
    if raw and len(raw) != len(request.inputs):
        raise BadRequest(f"there are {len(request.inputs)} inputs and {len(raw)} raw contents")
    batches = set()
    for number, tensor in enumerate(request.inputs):
        shape = tuple(tensor.shape) if limits.max_batch else (1, *tensor.shape)
        limits_with_batch(limits).check_shape(tensor.name, tensor.datatype, shape)
        batches.add(shape[0])
        if raw and tensor.HasField("contents"):
            raise BadRequest(f"{tensor.name} has contents of both kinds, raw and typed")
        if tensor.name in known:
            continue
        array = from_raw(tensor, raw[number]) if raw else from_typed(tensor)
        if array is not None:
            limits.check_finite(tensor.name, array)
            limits.check_values(tensor.name, array)
    check_batches(batches)


def limits_with_batch(limits: Limits) -> Limits:
    """Return the limits of a model that takes no batches as if it took batches of one."""
    return limits if limits.max_batch else limits.model_copy(update={"max_batch": 1})


def count(tensor: pb.ModelInferRequest.InferInputTensor | pb.ModelInferResponse.InferOutputTensor) -> int:
    """Return the number of elements of a tensor of this shape. Python's integers do not overflow."""
    elements = 1
    for size in tensor.shape:
        elements *= size
    return elements


def from_raw(tensor: pb.ModelInferRequest.InferInputTensor, raw: Raw) -> NDArray[Any] | None:
    """Return the values of a tensor that was sent as raw bytes, which are not copied, or None for BF16.

    Raises BadRequest if the bytes do not fit the tensor's dtype and shape.
    """
    elements = count(tensor)
    if tensor.datatype == "BYTES":
        return np.array(split_texts(tensor.name, raw, elements), np.object_)
    if len(raw) != elements * ITEM_BYTES[tensor.datatype]:
        wanted = elements * ITEM_BYTES[tensor.datatype]
        raise BadRequest(f"{tensor.name} of the shape {list(tensor.shape)} has {wanted} bytes, got {len(raw)}")
    if tensor.datatype not in DTYPES:
        return None
    return np.frombuffer(raw, DTYPES[tensor.datatype])


def split_texts(name: str, raw: Raw, elements: int) -> list[bytes]:
    """Split `raw` into its texts. Before each text stands its length, in four bytes, little-endian.

    Raises BadRequest unless there are as many texts as `elements`. `name` is what the error calls the tensor.
    """
    texts: list[bytes] = []
    start = 0
    while start < len(raw) and len(texts) <= elements:
        if len(raw) - start < 4:
            break
        (length,) = struct.unpack_from("<I", raw, start)
        if start + 4 + length > len(raw):
            break
        texts.append(bytes(raw[start + 4 : start + 4 + length]))
        start += 4 + length
    if start != len(raw) or len(texts) != elements:
        raise BadRequest(f"{name} does not hold {elements} texts, each after its length in four bytes")
    return texts


def from_typed(tensor: pb.ModelInferRequest.InferInputTensor) -> NDArray[Any]:
    """Return the values of a tensor that was sent as a list of numbers or texts.

    Raises BadRequest if they do not fit the tensor's dtype and shape.
    """
    field = CONTENTS.get(tensor.datatype)
    if field is None:
        raise BadRequest(f"{tensor.name} is {tensor.datatype}, which travels in raw_input_contents only")
    filled = [described.name for described, _ in tensor.contents.ListFields()]
    values = getattr(tensor.contents, field)
    if filled not in ([field], []) or len(values) != count(tensor):
        got = f"{len(values)} in {field}" if filled in ([field], []) else f"contents in {', '.join(filled)}"
        raise BadRequest(f"{tensor.name} of the shape {list(tensor.shape)} has {count(tensor)} {field}, got {got}")
    if tensor.datatype == "BYTES":
        return np.array([*values, None], np.object_)[:-1]
    return np.array(values)
