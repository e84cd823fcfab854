"""Requests that hypothesis makes up, good ones among them: every good picture is right, and nothing else happens.

`make fuzz` sends twenty times as many, of a seed that it prints; FUZZ_REQUESTS says how many there are.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import grpc
import numpy as np
import psutil
import pytest
from hostile import dit_inputs, prompt, request, said, stub
from hypothesis import HealthCheck, Phase, given, settings, strategies as st
from python_models import engine_process, model_processes, tritonserver
from tritonclient.grpc import service_pb2 as pb

from ditforge.client import Client
from ditforge.triton_repo.server import Server, start

REQUESTS = int(os.environ.get("FUZZ_REQUESTS", "500"))
TOGETHER = 25  # requests in one example of the test with eight threads
THREADS = 8
GROWTH = 300 << 20  # bytes: arenas of the engines, which the largest requests fill once, and no more
REFUSALS = (
    "INVALID_ARGUMENT",
    "NOT_FOUND",
    "PERMISSION_DENIED",
    "UNIMPLEMENTED",
    "RESOURCE_EXHAUSTED",
    "DEADLINE_EXCEEDED",
    "CANCELLED",
)

SOUND = {
    "dit": dit_inputs(8, 8),
    "vae_decoder": {"latents": dit_inputs(8, 8)["latents"]},
    "vae_encoder": {"image": np.zeros((1, 64, 64, 3), np.uint8)},
    "t5": {"t5_ids": np.ones((1, 64), np.int32)},
    "clip": {"clip_ids": np.ones((1, 77), np.int32)},
    "tokenizer": prompt(b"a red circle"),
    "text_encoders": prompt(b"a red circle"),
}
SIZES = st.one_of(
    st.integers(-2, 70),
    st.sampled_from([2**31 - 1, 2**31, 2**32, 2**33, 2**55 + 8, 2**62, 2**63 - 1, -(2**63)]),
)
NUMBERS = st.floats(width=32) | st.sampled_from([np.nan, np.inf, -np.inf, 1e38, -0.0])


def change_shape(draw: st.DrawFn, made: pb.ModelInferRequest) -> None:
    shape = draw(st.sampled_from(list(made.inputs))).shape
    if draw(st.booleans()) and shape:
        shape[draw(st.integers(0, len(shape) - 1))] = draw(SIZES)
    else:
        shape[:] = draw(st.lists(SIZES, max_size=9))


def change_bytes(draw: st.DrawFn, made: pb.ModelInferRequest) -> None:
    if not made.raw_input_contents:
        return
    index = draw(st.integers(0, len(made.raw_input_contents) - 1))
    raw = made.raw_input_contents[index]
    made.raw_input_contents[index] = draw(
        st.sampled_from([b"", raw[:-1], raw + b"\0", raw * 2, b"\xff" * len(raw), bytes(len(raw))])
        | st.binary(max_size=200)
    )


def change_names(draw: st.DrawFn, made: pb.ModelInferRequest) -> None:
    tensor = draw(st.sampled_from(list(made.inputs)))
    tensor.name = draw(st.sampled_from(["", "latents", "prompt", "x" * 10_000]) | st.text(max_size=20))


def change_dtype(draw: st.DrawFn, made: pb.ModelInferRequest) -> None:
    tensor = draw(st.sampled_from(list(made.inputs)))
    tensor.datatype = draw(st.sampled_from(["", "FP64", "BYTES", "FP16", "BF16", "INT64", "BOOL", "fp32", "x"]))


def change_inputs(draw: st.DrawFn, made: pb.ModelInferRequest) -> None:
    if draw(st.booleans()):
        made.inputs.append(draw(st.sampled_from(list(made.inputs))))
    elif len(made.inputs) > 1:
        del made.inputs[draw(st.integers(0, len(made.inputs) - 1))]


def change_contents(draw: st.DrawFn, made: pb.ModelInferRequest) -> None:
    contents = draw(st.sampled_from(list(made.inputs))).contents
    contents.fp32_contents.extend(draw(st.lists(NUMBERS, max_size=5)))
    contents.int_contents.extend(draw(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=2)))
    if draw(st.booleans()):
        made.ClearField("raw_input_contents")


def change_parameters(draw: st.DrawFn, made: pb.ModelInferRequest) -> None:
    owner = draw(st.sampled_from([made, *made.inputs, *made.outputs]))
    keys = ["timeout", "priority", "sequence_id", "shared_memory_region", "classification", "triton_x"]
    parameter = owner.parameters[draw(st.sampled_from(keys) | st.text(max_size=8))]
    if draw(st.booleans()):
        parameter.int64_param = draw(st.integers(-(2**63), 2**63 - 1))
    else:
        parameter.string_param = draw(st.text(max_size=20))


def change_model(draw: st.DrawFn, made: pb.ModelInferRequest) -> None:
    made.model_name = draw(st.sampled_from([*SOUND, "", "../dit"]) | st.text(max_size=20))
    made.model_version = draw(st.sampled_from(["", "1", "2", "-1", "x"]))


def change_outputs(draw: st.DrawFn, made: pb.ModelInferRequest) -> None:
    made.outputs.add(name=draw(st.sampled_from(["velocity", "image", "", "nothing"])))


def change_values(draw: st.DrawFn, made: pb.ModelInferRequest) -> None:
    if made.raw_input_contents and made.model_name in SOUND:
        index = draw(st.integers(0, len(made.raw_input_contents) - 1))
        array = np.frombuffer(made.raw_input_contents[index][: len(made.raw_input_contents[index]) // 4 * 4], "<f4")
        if len(array):
            array = array.copy()
            array[draw(st.integers(0, len(array) - 1))] = draw(NUMBERS)
            made.raw_input_contents[index] = array.tobytes()


CHANGES = [
    change_shape,
    change_bytes,
    change_names,
    change_dtype,
    change_inputs,
    change_contents,
    change_parameters,
    change_model,
    change_outputs,
    change_values,
]


@dataclass(frozen=True)
class Attempt:
    """A call: the method, its message, the seconds that it waits, and whether it is cancelled at once."""

    method: str
    message: bytes
    timeout: float
    cancelled: bool


@st.composite
def attempts(draw: st.DrawFn) -> Attempt:
    """Requests that differ from a sound one, and a few that are none at all."""
    method = draw(st.sampled_from(["ModelInfer"] * 12 + [m.name for m in METHODS]))
    timeout, cancelled = draw(st.sampled_from([20.0] * 8 + [0.001, 0.02])), draw(st.integers(0, 9)) == 0
    if method != "ModelInfer" or draw(st.integers(0, 9)) == 0:
        return Attempt(method, draw(st.binary(max_size=300)), timeout, cancelled)
    model = draw(st.sampled_from(list(SOUND)))
    made = request(model, SOUND[model])
    for change in draw(st.lists(st.sampled_from(CHANGES), max_size=3)):
        if made.inputs:
            change(draw, made)
    return Attempt(method, made.SerializeToString(), timeout, cancelled)


METHODS = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods


@pytest.fixture(scope="module")
def server(tiny) -> Iterator[Server]:
    with start(tiny.repository, port=0) as server:
        yield server


@pytest.fixture(scope="module")
def channel(server: Server) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.url) as channel:
        yield channel


def picture(client: Client, seed: int) -> np.ndarray:
    return np.asarray(client.generate("a large red circle", seed=seed, steps=2, height=64, width=64))


def send(channel: grpc.Channel, attempt: Attempt) -> None:
    """Send it; whatever it is, it is answered, or refused in words."""
    call = channel.unary_unary(f"/inference.GRPCInferenceService/{attempt.method}")
    answer = call.future(attempt.message, timeout=attempt.timeout)
    if attempt.cancelled:
        answer.cancel()
    try:
        answer.result()
    except grpc.FutureCancelledError:
        assert attempt.cancelled
    except grpc.RpcError as error:
        said(error, *REFUSALS)


class Watch:
    """A server's processes and memory, and its good pictures, as they were when nothing had happened yet."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.client = Client(server.url)
        self.pictures = [picture(self.client, seed) for seed in range(THREADS)]
        images = {"image": np.zeros((8, 512, 512, 3), np.uint8)}
        stub(server.url).ModelInfer(request("vae_encoder", images), timeout=120)  # the largest there is
        self.pids, self.memory = self.processes()

    def processes(self) -> tuple[set[int], int]:
        models = {process.pid: process for process in model_processes(self.server).values()}
        behind = [tritonserver(self.server), engine_process(self.server)]
        all_of_them = [psutil.Process(self.server.pid), *behind, *models.values()]
        return {process.pid for process in all_of_them}, sum(process.memory_info().rss for process in all_of_them)

    def check(self) -> None:
        pids, memory = self.processes()
        assert pids == self.pids, "a process was started again"
        assert memory < self.memory + GROWTH
        assert "the front failed" not in self.server.log.read_text()


@pytest.fixture(scope="module")
def watch(server: Server) -> Watch:
    return Watch(server)


# What fails is shown as it was sent: making it smaller takes as many requests again.
PHASES = [Phase.explicit, Phase.reuse, Phase.generate]
SETTINGS = {"deadline": None, "suppress_health_check": list(HealthCheck), "phases": PHASES}


@settings(max_examples=REQUESTS, **SETTINGS)  # type: ignore[arg-type]
@given(attempt=attempts())
def test_one_after_the_other(channel: grpc.Channel, watch: Watch, attempt: Attempt) -> None:
    send(channel, attempt)
    watch.count = getattr(watch, "count", 0) + 1  # type: ignore[attr-defined]
    if watch.count % 20 == 0:  # type: ignore[attr-defined]
        seed = watch.count % THREADS  # type: ignore[attr-defined]
        assert np.array_equal(picture(watch.client, seed), watch.pictures[seed])
        watch.check()


@settings(max_examples=max(REQUESTS // TOGETHER, 1), **SETTINGS)  # type: ignore[arg-type]
@given(together=st.lists(attempts(), min_size=TOGETHER, max_size=TOGETHER))
def test_eight_at_once(channel: grpc.Channel, watch: Watch, together: list[Attempt]) -> None:
    """They share batches with good ones, whose pictures come out as they do alone."""
    with ThreadPoolExecutor(THREADS) as pool:
        running: list[Future[object]] = []
        for number, attempt in enumerate(together):
            running.append(pool.submit(send, channel, attempt))
            if number % 5 == 0:
                running.append(pool.submit(check_picture, watch, number % THREADS))
        for future in running:
            future.result()
    watch.check()


def check_picture(watch: Watch, seed: int) -> None:
    """A picture is the one that was made alone, but for a last bit, which another sample in the batch can round."""
    difference = picture(watch.client, seed).astype(int) - watch.pictures[seed]
    assert np.abs(difference).max() <= 1
