"""Requests as strangers send them: built by hand, beside what the client would send."""

from __future__ import annotations

import re
import socket
from pathlib import Path

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2 as pb, service_pb2_grpc

from ditforge.triton_repo.server import Server

DTYPES = {np.dtype(np.float32): "FP32", np.dtype(np.int32): "INT32", np.dtype(np.uint8): "UINT8"}
UNLIMITED = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
PATH = re.compile(r"(^|[\s'\"(:])/[\w.-]+/")


def stub(url: str) -> service_pb2_grpc.GRPCInferenceServiceStub:
    """The server's methods, with no client between."""
    return service_pb2_grpc.GRPCInferenceServiceStub(grpc.insecure_channel(url, UNLIMITED))


def clients_folder(server: Server) -> Path:
    """Where a server has clients on this machine place their tensors."""
    (found,) = Path("/dev/shm").glob(f"ditforge-triton-*-{server.pid}-*+clients")
    return found


def dit_inputs(height: int = 16, width: int = 16, seed: int = 0) -> dict[str, np.ndarray]:
    """A sound request for flux-tiny's DiT, of latents [1, 16, height, width]."""
    draw = np.random.default_rng(seed).standard_normal
    return {
        "latents": draw((1, 16, height, width)).astype(np.float32),
        "timestep": np.full((1, 1), 0.5, np.float32),
        "prompt_embeds": draw((1, 64, 128)).astype(np.float32),
        "pooled_embeds": draw((1, 128)).astype(np.float32),
        "guidance": np.full((1, 1), 3.5, np.float32),
    }


def request(model: str, arrays: dict[str, np.ndarray], **shapes: tuple[int, ...]) -> pb.ModelInferRequest:
    """A request with raw contents; `shapes` are claimed for inputs in place of their own."""
    made = pb.ModelInferRequest(model_name=model)
    for name, array in arrays.items():
        shape = shapes.get(name, array.shape)
        if array.dtype == np.object_:
            made.inputs.add(name=name, datatype="BYTES", shape=shape)
            made.raw_input_contents.append(b"".join(len(t).to_bytes(4, "little") + t for t in array.ravel()))
        else:
            made.inputs.add(name=name, datatype=DTYPES[array.dtype], shape=shape)
            made.raw_input_contents.append(array.tobytes())
    return made


def prompt(text: bytes) -> dict[str, np.ndarray]:
    """The input of the text encoders."""
    return {"prompt": np.array([[text]], np.object_)}


def output(response: pb.ModelInferResponse, number: int = 0) -> bytes:
    """The bytes of an output."""
    return response.raw_output_contents[number]


def refused(url: str, made: pb.ModelInferRequest, status: str = "INVALID_ARGUMENT", timeout: float = 10) -> str:
    """What the server says against a request: in words, and not where its files are."""
    with pytest.raises(grpc.RpcError) as caught:
        stub(url).ModelInfer(made, timeout=timeout)
    return said(caught.value, status)


def said(error: grpc.RpcError, *statuses: str) -> str:
    """The words of an error, which has one of these statuses and tells nothing of the machine."""
    assert error.code().name in statuses, error
    words = error.details() or ""
    assert words and "Traceback" not in words and socket.gethostname() not in words
    assert not PATH.search(words), words
    assert len(words) < 1000
    return words
