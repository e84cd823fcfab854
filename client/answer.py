"""Reads the answers of servers, and checks them against the request: names, dtypes, shapes, and numbers of bytes.

No answer is trusted without a check: the server may be another program, another version, or broken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError
from tritonclient.grpc import model_config_pb2, service_pb2 as pb

from ditforge.contract import DIT, POOLED_EMBEDS, PROMPT_EMBEDS, VAE_DECODER
from ditforge.model import Model

Arrays = dict[str, npt.NDArray[Any]]
Inputs = Mapping[str, npt.NDArray[Any]]

DTYPES = {"FP32": np.float32, "FP16": np.float16, "INT32": np.int32, "UINT8": np.uint8}
EMBEDDINGS = {PROMPT_EMBEDS: True, POOLED_EMBEDS: False}  # name → whether every model has it
SPARE = 64 << 10  # bytes that an answer may have beside its tensors, for names, shapes and parameters


class WrongAnswer(Exception):
    """A server's answer does not fit the request. The message says what was expected and what came."""


@dataclass(frozen=True)
class Output:
    """An expected output: Triton's name of its dtype, such as FP32, and its shape, with the batch dimension first."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(DTYPES[self.dtype]).itemsize

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


Read = Callable[[Output], npt.NDArray[Any]]  # reads an output from where it is
NOWHERE: Mapping[str, Read] = MappingProxyType({})


def embeddings_of(config: model_config_pb2.ModelConfig) -> dict[str, Output]:
    """The dtypes and shapes, [1, …], of one prompt's embeddings, read from the inputs in the DiT's configuration.

    Raises WrongAnswer if prompt_embeds is missing, or if an embedding has no fixed size or an unknown dtype.
    """
    found = {}
    for name, everywhere in EMBEDDINGS.items():
        (tensor,) = [tensor for tensor in config.input if tensor.name == name] or [None]
        if tensor is None and not everywhere:
            continue
        dtype = model_config_pb2.DataType.Name(tensor.data_type).removeprefix("TYPE_") if tensor else ""
        if tensor is None or dtype not in DTYPES or not tensor.dims or min(tensor.dims) < 1:
            raise WrongAnswer(f"its dit has no input {name} of fixed size in {' or '.join(DTYPES)}")
        found[name] = Output(dtype, (1, *tensor.dims))
    return found


def expected_outputs(name: str, inputs: Inputs, model: Model, embeddings: Mapping[str, Output]) -> dict[str, Output]:
    """The outputs that the model `name` gives for `inputs`, by the contract in docs/design.md.

    All tensors have the batch dimension first. dit: velocity, float32, of the latents' shape [B, C, h, w]. vae_decoder:
    image, uint8 [B, H, W, 3]. text_encoders and text_encoders_clip: the `embeddings` for B prompts, and prompt_tokens,
    int32 [B, number of text encoders].
    """
    batch = len(next(iter(inputs.values())))
    if name == DIT:
        return {"velocity": Output("FP32", inputs["latents"].shape)}
    if name == VAE_DECODER:
        height, width = (size * model.vae_factor for size in inputs["latents"].shape[2:])
        return {"image": Output("UINT8", (batch, height, width, 3))}
    outputs = {key: Output(output.dtype, (batch, *output.shape[1:])) for key, output in embeddings.items()}
    return {**outputs, "prompt_tokens": Output("INT32", (batch, len(model.max_tokens)))}


def read_answer(data: bytes, expected: Mapping[str, Output], elsewhere: Mapping[str, Read] = NOWHERE) -> Arrays:
    """Read the output tensors from `data`, the bytes of a ModelInferResponse.

    An output without contents is read by its function of `elsewhere`, if it has one. Raises WrongAnswer if `data`
    cannot be read, or if its outputs differ from `expected` in a name, dtype, shape or number of bytes.
    """
    most = sum(output.bytes for output in expected.values()) + SPARE
    if len(data) > most:  # checked first, because parsing a message of many small parts takes many times its size
        raise WrongAnswer(f"{_listed(expected)} is at most {most} bytes, got {len(data)}")
    try:
        answer = pb.ModelInferResponse.FromString(data)
    except DecodeError:
        raise WrongAnswer(f"the {len(data)} bytes that came are no ModelInferResponse") from None
    names = [output.name for output in answer.outputs]
    if sorted(names) != sorted(expected):
        raise WrongAnswer(f"expected {_listed(expected)}, got {_shown(names)}")
    if len(answer.raw_output_contents) != len(names):
        came = len(answer.raw_output_contents)
        raise WrongAnswer(f"expected the contents of {len(names)} outputs ({_listed(expected)}), got {came}")
    arrays = {}
    for output, raw in zip(answer.outputs, answer.raw_output_contents, strict=True):
        wanted = expected[output.name]
        if (output.datatype, tuple(output.shape)) != (wanted.dtype, wanted.shape):
            shape = _shown(list(output.shape))
            raise WrongAnswer(f"{output.name}: expected {wanted}, got {output.datatype[:20]!a} {shape}")
        if not raw and output.name in elsewhere:
            arrays[output.name] = elsewhere[output.name](wanted)
            continue
        if len(raw) != wanted.bytes:
            raise WrongAnswer(f"{output.name}: expected {wanted}, which is {wanted.bytes} bytes, got {len(raw)} bytes")
        arrays[output.name] = np.frombuffer(raw, DTYPES[wanted.dtype]).reshape(wanted.shape)
    return arrays


def _listed(expected: Mapping[str, Output]) -> str:
    return ", ".join(f"{name} {output}" for name, output in expected.items())


def _shown(values: list[str] | list[int]) -> str:
    """The first few of the values that a server sent, without characters that a terminal would act on."""
    return ascii([value[:40] if isinstance(value, str) else value for value in values[:8]]) + " …" * (len(values) > 8)
