"""Inference requests as they come from the wire (KServe's protocol, version 2), checked before Triton sees them.

Source: https://github.com/triton-inference-server/common/blob/main/protobuf/grpc_service.proto
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import TypeVar

import numpy as np
from google.protobuf import text_format
from google.protobuf.message import DecodeError, Message
from tritonclient.grpc import model_config_pb2, service_pb2

from ditforge.triton_repo.config import LIMITS_PARAMETER, MEMBER_PARAMETER
from ditforge.triton_repo.limits import (
    DTYPES,
    ITEM_BYTES,
    Axis,
    BadRequest,
    InputLimits,
    Limits,
    check_batches,
    is_finite,
    shown,
)

M = TypeVar("M", bound=Message)
UNBOUNDED = 64 << 20  # bytes of a request to a model that somebody else made, which says nothing of its largest
MOST_FIELDS = 200  # parts of a message: inputs, outputs, parameters, raw contents
ENVELOPE = 64 << 10  # bytes of a message beside its tensors
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
PARAMETERS = {"timeout", "priority"}  # of a request; all others of Triton's reach into the server


def read_limits(repository: Path) -> dict[str, Limits]:
    """The limits of each model of a repository, by name. Models that were not made by ditforge have those of Triton."""
    found = {}
    for file in sorted(repository.glob("*/config.pbtxt")):
        config = text_format.Parse(file.read_text(), model_config_pb2.ModelConfig())
        name = config.name or file.parent.name
        if LIMITS_PARAMETER in config.parameters:
            found[name] = Limits.model_validate_json(config.parameters[LIMITS_PARAMETER].string_value)
        else:
            found[name] = generic_limits(config)
    return found


def read_spoiling(repository: Path) -> frozenset[str]:
    """The models whose failures are outputs that are not numbers: members of ensembles, and the ensembles."""
    found = set()
    for file in sorted(repository.glob("*/config.pbtxt")):
        config = text_format.Parse(file.read_text(), model_config_pb2.ModelConfig())
        if MEMBER_PARAMETER in config.parameters or config.platform == "ensemble":
            found.add(config.name or file.parent.name)
    return frozenset(found)


def is_spoilt(data: bytes) -> bool:
    """Whether an output in the ModelInferResponse `data` has a NaN or an infinity in it."""
    response = service_pb2.ModelInferResponse.FromString(data)
    kinds = [DTYPES.get(tensor.datatype, np.uint8) for tensor in response.outputs]
    pairs = zip(kinds, response.raw_output_contents, strict=False)
    return not all(is_finite(np.frombuffer(raw, dtype)) for dtype, raw in pairs if np.issubdtype(dtype, np.floating))


def generic_limits(config: model_config_pb2.ModelConfig) -> Limits:
    """What a configuration alone says of a model's inputs."""
    inputs = {}
    for tensor in config.input:
        dtype = model_config_pb2.DataType.Name(tensor.data_type).removeprefix("TYPE_").replace("STRING", "BYTES")
        axes = tuple(Axis(least=max(dim, 0), most=dim if dim >= 0 else UNBOUNDED) for dim in tensor.dims)
        inputs[tensor.name] = InputLimits(dtype=dtype, shapes=(axes,))
    return Limits(max_batch=config.max_batch_size, inputs=inputs)


def message_limit(models: dict[str, Limits]) -> int:
    """The most bytes of a message that any of the models takes: that of the largest picture served."""
    sizes = [UNBOUNDED if is_generic(limits) else limits.request_bytes for limits in models.values()]
    return max(sizes) + ENVELOPE


def is_generic(limits: Limits) -> bool:
    """Whether a model says nothing of the sizes that it takes."""
    return any(axis.most >= UNBOUNDED for one in limits.inputs.values() for shape in one.shapes for axis in shape)


def parse(data: bytes, kind: type[M]) -> M:
    """The message of that kind in `data`. Raises BadRequest if there is none, or one of absurdly many parts."""
    check_fields(data)
    try:
        return kind.FromString(data)
    except DecodeError:
        raise BadRequest(f"the message is not a {kind.DESCRIPTOR.name}") from None


def check_fields(data: bytes) -> None:
    """Raise BadRequest if the message `data` has more than MOST_FIELDS parts: millions of empty ones take gigabytes.

    Source: https://protobuf.dev/programming-guides/encoding
    """
    position = 0
    for _ in range(MOST_FIELDS):
        if position >= len(data):
            return
        tag, position = varint(data, position)
        if (kind := tag & 7) == 0:
            _, position = varint(data, position)
        elif kind == 2:
            length, position = varint(data, position)
            position += length
        elif kind in (1, 5):
            position += 8 if kind == 1 else 4
        else:
            return  # it is no message, which the parser finds out
    if position < len(data):
        raise BadRequest(f"a message has at most {MOST_FIELDS} inputs, outputs and parameters")


def varint(data: bytes, position: int) -> tuple[int, int]:
    """The number of variable length at `position`, and the position after it."""
    value = shift = 0
    while position < len(data) and shift < 70:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
    return value, len(data)


def check(request: service_pb2.ModelInferRequest, limits: Limits) -> None:
    """Raise BadRequest unless the request is one that the model with these limits takes."""
    if refused := sorted(set(request.parameters) - PARAMETERS):
        raise BadRequest(f"parameters of a request are {', '.join(sorted(PARAMETERS))}, got {shown(refused[0])}")
    for tensor in (*request.inputs, *request.outputs):
        if tensor.parameters:
            name = sorted(tensor.parameters)[0]
            raise BadRequest(f"{shown(tensor.name)} has the parameter {shown(name)}: tensors travel in the message")
    limits.check_names([tensor.name for tensor in request.inputs])
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise BadRequest(f"there are {len(request.inputs)} inputs and {len(raw)} raw contents")
    batches = set()
    for number, tensor in enumerate(request.inputs):
        shape = tuple(tensor.shape) if limits.max_batch else (1, *tensor.shape)
        limits_with_batch(limits).check_shape(tensor.name, tensor.datatype, shape)
        batches.add(shape[0])
        if raw and tensor.HasField("contents"):
            raise BadRequest(f"{tensor.name} has contents of both kinds, raw and typed")
        array = from_raw(tensor, raw[number]) if raw else from_typed(tensor)
        if array is not None:
            limits.check_finite(tensor.name, array)
            limits.check_values(tensor.name, array)
    check_batches(batches)


def limits_with_batch(limits: Limits) -> Limits:
    """Of a model that takes no batches, the limits as if it took batches of one."""
    return limits if limits.max_batch else limits.model_copy(update={"max_batch": 1})


def count(tensor: service_pb2.ModelInferRequest.InferInputTensor) -> int:
    """How many elements a tensor has by its shape. Python's integers do not overflow."""
    elements = 1
    for size in tensor.shape:
        elements *= size
    return elements


def from_raw(tensor: service_pb2.ModelInferRequest.InferInputTensor, raw: bytes) -> np.ndarray | None:
    """The values of a tensor that came as raw bytes, not copied; None for BF16. Raises BadRequest if they are wrong."""
    elements = count(tensor)
    if tensor.datatype == "BYTES":
        return np.array(split_texts(tensor.name, raw, elements), np.object_)
    if len(raw) != elements * ITEM_BYTES[tensor.datatype]:
        wanted = elements * ITEM_BYTES[tensor.datatype]
        raise BadRequest(f"{tensor.name} of the shape {list(tensor.shape)} has {wanted} bytes, got {len(raw)}")
    if tensor.datatype not in DTYPES:
        return None
    return np.frombuffer(raw, DTYPES[tensor.datatype])


def split_texts(name: str, raw: bytes, elements: int) -> list[bytes]:
    """The texts in `raw`: each has its length before it, in four bytes, little-endian."""
    texts: list[bytes] = []
    start = 0
    while start < len(raw) and len(texts) <= elements:
        if len(raw) - start < 4:
            break
        (length,) = struct.unpack_from("<I", raw, start)
        if start + 4 + length > len(raw):
            break
        texts.append(raw[start + 4 : start + 4 + length])
        start += 4 + length
    if start != len(raw) or len(texts) != elements:
        raise BadRequest(f"{name} does not hold {elements} texts, each after its length in four bytes")
    return texts


def from_typed(tensor: service_pb2.ModelInferRequest.InferInputTensor) -> np.ndarray:
    """The values of a tensor that came as a list of numbers or texts. Raises BadRequest if they do not fit."""
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
