"""No request ends the server, and a stranger's is answered in words: a real Triton behind the front, with flux-tiny."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import grpc
import numpy as np
import psutil
import pytest
from command_line import PATIENCE, eventually
from hostile import dit_inputs, output, prompt, refused, request, said, stub
from python_models import (
    ADD_ONE,
    CAREFUL,
    engine_process,
    infer,
    model_processes,
    socket_of,
    tensor,
    tritonserver,
    write_models,
)
from tritonclient.grpc import InferenceServerClient, service_pb2 as pb

from ditforge.client import Client
from ditforge.triton_repo import wire
from ditforge.triton_repo.capacity import ARRIVAL, Capacity
from ditforge.triton_repo.front import Front
from ditforge.triton_repo.metrics import Metrics
from ditforge.triton_repo.refusal import Refused
from ditforge.triton_repo.served import read_models
from ditforge.triton_repo.server import Server, start
from ditforge.triton_repo.tritonserver import SHARED

GOOD = request("dit", dit_inputs())


@pytest.fixture(scope="module")
def server(tiny) -> Iterator[Server]:
    with start(tiny.repository, port=0) as server:
        yield server


@pytest.fixture(autouse=True)
def nothing_died(server: Server) -> Iterator[None]:
    """After each test the same processes run, and a good request is answered as before it."""
    before, answer = pids(server), output(stub(server.url).ModelInfer(GOOD, timeout=60))
    yield
    assert output(stub(server.url).ModelInfer(GOOD, timeout=60)) == answer
    assert pids(server) == before


def pids(server: Server) -> set[int]:
    models = {process.pid for process in model_processes(server).values()}
    return {tritonserver(server).pid, engine_process(server).pid, *models}


IMAGE = {"image": np.zeros((1, 64, 64, 3), np.uint8)}
LATENTS = {"latents": np.zeros((1, 16, 8, 8), np.float32)}
TOKENS = {"t5_ids": np.zeros((1, 64), np.int32)}


@pytest.mark.parametrize(
    ("model", "arrays", "shape"),
    [
        ("dit", dit_inputs(), (1, 16, 2**31, 2**33)),
        ("dit", dit_inputs(8, 8), (1, 16, 8, 8 + 2**55)),
        ("dit", dit_inputs(), (2**62, 16, 16, 16)),
        ("vae_decoder", LATENTS, (1, 16, 2**31, 2**33)),
        ("vae_decoder", LATENTS, (1, 16, 8, 8 + 2**55)),
        ("vae_decoder", LATENTS, (-1, 16, 8, 8)),
        ("vae_encoder", IMAGE, (1, 2**31, 2**33, 3)),
        ("t5", TOKENS, (2**58, 64)),
        ("text_encoders", prompt(b"a"), (2**62, 4)),
        ("tokenizer", prompt(b"a"), (2**40, 1)),
        ("dit", dit_inputs(), (0, 16, 16, 16)),
        ("dit", dit_inputs(), (1, 16, -16, -16)),
        ("dit", dit_inputs(), (1,) * 500),
        ("dit", dit_inputs(), ()),
    ],
)
@pytest.mark.parametrize("empty", [True, False])
def test_shapes_that_overflow(server: Server, model: str, arrays: dict, shape: tuple[int, ...], empty: bool) -> None:
    """Element counts that are 0, or as many as there are bytes, in 64 bits; with no bytes and with some."""
    name = next(iter(arrays))
    made = request(model, arrays, **{name: shape})
    if empty:
        made.raw_input_contents[0] = b""
    assert name in refused(server.url, made)


@pytest.mark.parametrize("size", [(66, 64), (64, 66), (260, 260), (130, 130)])
def test_pictures_larger_than_any_served(server: Server, size: tuple[int, int]) -> None:
    before = memory(server)
    assert "2 to 64 in steps of 2" in refused(server.url, request("dit", dit_inputs(*size)))
    assert memory(server) < before + (64 << 20)


@pytest.mark.parametrize("size", [(7, 8), (8, 7), (1, 2)])
def test_sizes_that_are_no_multiple(server: Server, size: tuple[int, int]) -> None:
    assert "latents has the shape [batch, 16, 2 to 64 in steps of 2" in refused(
        server.url, request("dit", dit_inputs(*size))
    )


def test_two_bad_requests_at_once(server: Server) -> None:
    """They shared one batch and one error object, which ended Triton."""
    bad = request("dit", dit_inputs(7, 8))
    for url in (server.url, socket_of(server)):  # before Triton, and in the model
        with ThreadPoolExecutor(2) as pool:
            words = list(pool.map(lambda _, url=url: refused(url, bad), range(100)))
        assert all("latents" in word for word in words)


def test_a_bad_request_among_good_ones(server: Server) -> None:
    """Straight to a text encoder, and past the front too: the bad one alone fails."""
    good = request("t5", TOKENS)
    bad = request("t5", {"t5_ids": np.full((1, 64), 30_000, np.int32)})
    for url in (server.url, socket_of(server)):
        call = stub(url).ModelInfer
        expected = np.frombuffer(output(call(good, timeout=60)), np.float32)
        with ThreadPoolExecutor(16) as pool:
            answers = [pool.submit(call, bad if i % 4 == 0 else good, timeout=60) for i in range(48)]
        for i, answer in enumerate(answers):
            if i % 4 == 0:
                error = answer.exception()
                assert isinstance(error, grpc.RpcError)
                assert "t5_ids is from 0 to 292, got 30000" in said(error, "INVALID_ARGUMENT")
            else:  # other samples in the batch round differently
                np.testing.assert_allclose(np.frombuffer(output(answer.result()), np.float32), expected, atol=1e-4)


@pytest.mark.parametrize("length", [32_001, 1_000_000])
def test_prompts_that_are_too_long(server: Server, length: int) -> None:
    begun = time.monotonic()
    for model in ("text_encoders", "tokenizer"):
        words = refused(server.url, request(model, prompt(b"a " * (length // 2) + b"a" * (length % 2))))
        assert f"prompt has at most 32,000 characters, got {length:,}" in words
    assert time.monotonic() - begun < 2


def test_the_longest_prompt(server: Server) -> None:
    """Characters are counted, not bytes."""
    assert stub(server.url).ModelInfer(request("text_encoders", prompt("ä".encode() * 32_000)), timeout=60)


def test_a_prompt_that_is_no_text(server: Server) -> None:
    assert "prompt is not UTF-8" in refused(server.url, request("text_encoders", prompt(b"caf\xe9")))


def test_messages_larger_than_any_picture(server: Server) -> None:
    """They are refused before they are read: six of 300 MB at once took 2.2 GB, for good."""
    large = request("text_encoders", prompt(b"a" * 300_000_000))
    before = memory(server)
    with ThreadPoolExecutor(6) as pool:
        answers = [pool.submit(stub(server.url).ModelInfer, large, timeout=60) for _ in range(6)]
    for answer in answers:
        error = answer.exception()
        assert isinstance(error, grpc.RpcError)
        said(error, "RESOURCE_EXHAUSTED", "UNAVAILABLE")  # the connection can be closed while it is still sent
    assert memory(server) < before + (64 << 20)


def test_the_largest_request_is_taken(server: Server) -> None:
    """A batch of eight pictures of 512 pixels, to the network with the largest input."""
    images = {"image": np.zeros((8, 512, 512, 3), np.uint8)}
    assert stub(server.url).ModelInfer(request("vae_encoder", images), timeout=120)
    assert "the batch of image is from 1 to 8, got 9" in refused(
        server.url, request("vae_encoder", {"image": np.zeros((9, 64, 64, 3), np.uint8)})
    )


def memory(server: Server) -> int:
    """Bytes that the server's processes hold."""
    processes = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
    return sum(process.memory_info().rss for process in processes)


def test_one_port_and_no_other(server: Server) -> None:
    """Nothing but gRPC listens, and on loopback."""
    processes = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
    listening = [c for p in processes for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN]
    (only,) = [connection.laddr for connection in listening]
    assert (only.ip.removeprefix("::ffff:"), only.port) == ("127.0.0.1", server.ports.grpc)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("latents", np.nan, "latents holds values that are not finite"),
        ("latents", np.inf, "latents holds values that are not finite"),
        ("prompt_embeds", -np.inf, "prompt_embeds holds values that are not finite"),
        ("pooled_embeds", np.nan, "pooled_embeds holds values that are not finite"),
        ("timestep", np.nan, "timestep holds values that are not finite"),
        ("timestep", 1.5, "timestep is from 0 to 1, got 1.5"),
        ("timestep", -0.5, "timestep is from 0 to 1, got -0.5"),
        ("guidance", -1, "guidance is at least 0, got -1"),
        ("guidance", np.inf, "guidance holds values that are not finite"),
    ],
)
def test_values_without_a_meaning(server: Server, name: str, value: float, words: str) -> None:
    inputs = dit_inputs()
    inputs[name].ravel()[-1] = value
    assert words in refused(server.url, request("dit", inputs))
    typed = request("dit", inputs)  # the same as numbers in a list
    typed.ClearField("raw_input_contents")
    for tensor_, array in zip(typed.inputs, inputs.values(), strict=True):
        tensor_.contents.fp32_contents.extend(array.ravel().tolist())
    assert words in refused(server.url, typed)


def test_numbers_in_a_list_are_taken(server: Server) -> None:
    inputs = dit_inputs()
    typed = request("dit", inputs)
    typed.ClearField("raw_input_contents")
    for tensor_, array in zip(typed.inputs, inputs.values(), strict=True):
        tensor_.contents.fp32_contents.extend(array.ravel().tolist())
    call = stub(server.url).ModelInfer
    assert output(call(typed, timeout=60)) == output(call(GOOD, timeout=60))


def changed(change) -> pb.ModelInferRequest:
    made = request("dit", dit_inputs())
    change(made)
    return made


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r.inputs[0].parameters["shared_memory_region"].MergeFromString(b"\x1a\x01x"), "send the tensors"),
        (lambda r: r.outputs.add(name="velocity").parameters["classification"].MergeFromString(b"\x10\x05"), "travel"),
        (lambda r: r.parameters["sequence_id"].MergeFromString(b"\x10\x05"), "got 'sequence_id'"),
        (lambda r: r.inputs.add(name="latents", datatype="FP32", shape=[1]), "the inputs are latents, timestep"),
        (lambda r: r.inputs.pop(), "the inputs are latents, timestep"),
        (lambda r: setattr(r.inputs[1], "name", "x" * 1000), "got 'latents', 'xxx"),
        (lambda r: setattr(r.inputs[0], "datatype", "FP64"), "latents is FP32, got 'FP64'"),
        (lambda r: setattr(r.inputs[0], "datatype", "BYTES"), "latents is FP32, got 'BYTES'"),
        (lambda r: r.raw_input_contents.pop(), "5 inputs and 4 raw contents"),
        (lambda r: r.raw_input_contents.append(b""), "5 inputs and 6 raw contents"),
        (lambda r: r.inputs[0].contents.fp32_contents.append(1), "contents of both kinds"),
        (lambda r: setattr(r, "model_version", "2"), "the version is 1, got '2'"),
        (lambda r: setattr(r.parameters["priority"], "string_param", "x"), "the parameter priority is a whole number"),
        (lambda r: r.outputs.add(name="nothing"), "the outputs are velocity, each at most once, got 'nothing'"),
        (lambda r: [r.outputs.add(name="velocity") for _ in range(2)], "each at most once, got 'velocity', 'velocity'"),
    ],
)
def test_requests_that_contradict_themselves(server: Server, change, words: str) -> None:
    made = changed(change)
    with pytest.raises(grpc.RpcError) as caught:
        stub(server.url).ModelInfer(made, timeout=10)
    assert words in said(caught.value, "INVALID_ARGUMENT", "NOT_FOUND", "UNAVAILABLE")


def test_texts_that_are_no_texts(server: Server) -> None:
    for raw in (b"", b"\xff\xff\xff\xff", b"\x01\x00\x00\x00", b"\x01\x00\x00\x00a\x00", b"\x00" * 400):
        made = request("text_encoders", prompt(b"a"))
        made.raw_input_contents[0] = raw
        assert "prompt does not hold 1 texts" in refused(server.url, made)


def test_a_message_that_is_none(server: Server) -> None:
    call = grpc.insecure_channel(server.url).unary_unary("/inference.GRPCInferenceService/ModelInfer")
    with pytest.raises(grpc.RpcError) as caught:
        call(b"\xff" * 100, timeout=10)
    assert said(caught.value, "INVALID_ARGUMENT") == "the message is not a ModelInferRequest"


@pytest.mark.parametrize("part", [b"\x32\x00", b"\x2a\x00", b"\x3a\x00"], ids=["outputs", "inputs", "raw contents"])
def test_millions_of_empty_parts(server: Server, part: bytes) -> None:
    """Two million in 4 MB: they held everyone up for seconds, and took gigabytes."""
    before = memory(server)
    call = grpc.insecure_channel(server.url).unary_unary("/inference.GRPCInferenceService/ModelInfer")
    with pytest.raises(grpc.RpcError) as caught:
        call(GOOD.SerializeToString() + part * 2_000_000, timeout=60)
    assert "a message has at most 200 inputs, outputs and parameters" in said(caught.value, "INVALID_ARGUMENT")
    assert memory(server) < before + (64 << 20)


def test_large_tensors_as_lists_and_parts_within_parts(server: Server) -> None:
    """Millions of numbers in a list, or of parameters in one input: a second in which nobody else is answered."""
    typed = request("dit", dit_inputs())
    typed.ClearField("raw_input_contents")
    typed.inputs[0].contents.int_contents.extend([1] * 2_000_000)
    nested = pb.ModelInferRequest(model_name="dit").SerializeToString() + part_of(5, b"\x22\x00" * 2_000_000)
    call = grpc.insecure_channel(server.url).unary_unary("/inference.GRPCInferenceService/ModelInfer")
    before = memory(server)
    for data in (typed.SerializeToString(), nested):
        with pytest.raises(grpc.RpcError) as caught:
            call(data, timeout=60)
        assert "at most 1048576 bytes beside its raw contents: send large" in said(caught.value, "INVALID_ARGUMENT")
    assert memory(server) < before + (64 << 20)


def part_of(number: int, content: bytes) -> bytes:
    """A part of a message, with any content."""
    return bytes([number << 3 | 2]) + wire.as_varint(len(content)) + content


def test_a_tag_that_is_written_in_another_way(server: Server) -> None:
    """Seven bits of nothing before the end of the number: a parser takes the part for raw contents, and so must we."""
    made = request("dit", dit_inputs())
    raw = [bytes(content) for content in made.raw_input_contents]
    made.ClearField("raw_input_contents")
    written = b"".join(b"\xba\x00" + part_of(7, content)[1:] for content in raw)
    call = grpc.insecure_channel(server.url).unary_unary("/inference.GRPCInferenceService/ModelInfer")
    answer = pb.ModelInferResponse.FromString(call(made.SerializeToString() + written, timeout=60))
    assert output(answer) == output(stub(server.url).ModelInfer(GOOD, timeout=60))


@pytest.mark.parametrize("name", ["Stub process 'dit_0_0'", "\x1b[31m Stub process 'dit_0_0' is not healthy", "dit"])
def test_words_of_strangers_that_look_like_tritons(server: Server, name: str) -> None:
    """Triton's errors repeat them; they must not look like Triton's complaint of a process, which has it restarted."""
    asked, version = server.url, "Stub process 'dit_0_0' is not healthy"
    with pytest.raises(grpc.RpcError) as caught:
        stub(asked).ModelMetadata(pb.ModelMetadataRequest(name=name, version=version), timeout=10)
    said(caught.value, "NOT_FOUND")
    assert not stub(asked).ModelReady(pb.ModelReadyRequest(name=name, version=version), timeout=10).ready
    made = request(name, dit_inputs())
    made.model_version = made.id = version
    with pytest.raises(grpc.RpcError) as caught:
        stub(asked).ModelInfer(made, timeout=10)
    said(caught.value, "NOT_FOUND", "INVALID_ARGUMENT")
    time.sleep(3)  # after which a complaint counts


def test_calls_without_a_message_hold_nobody_up_for_long(server: Server) -> None:
    """More calls than are answered at once, whose messages never come: probes are answered, and then all others."""
    alone = [("grpc.use_local_subchannel_pool", 1)]
    channels = [grpc.insecure_channel(server.url, alone) for _ in range(6)]
    release = threading.Event()
    method = "/inference.GRPCInferenceService/ModelInfer"
    silent = [
        channel.stream_unary(method).future(iter(release.wait, True), timeout=120)
        for channel in channels
        for _ in range(100)
    ]
    try:
        eventually(lambda: any(call.done() and call.code().name == "RESOURCE_EXHAUSTED" for call in silent))
        with InferenceServerClient(server.url) as client:
            assert client.is_server_live() and client.is_server_ready()
        for call in silent:
            assert call.exception(PATIENCE).code().name in ("RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED")
        words = {call.details() for call in silent}
        assert "the server answers as many requests as it can; ask again later" in words
        assert "the message arrives slowly, and others wait; repeat it" in words
    finally:
        release.set()
        for channel in channels:
            channel.close()


def test_too_many_messages_at_once_are_refused_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ditforge.triton_repo.capacity.ARRIVAL", 0.1)

    async def wait_for_a_place() -> None:
        capacity = Capacity(largest=100 << 20)
        while not capacity.readers.locked():
            await capacity.readers.acquire()
        with pytest.raises(Refused, match="reads as many messages as it can"):
            await capacity.receive(None)  # type: ignore[arg-type]  # it comes to no reading

    asyncio.run(wait_for_a_place())


def test_a_few_calls_without_a_message_hold_nobody_up(server: Server) -> None:
    """As many as are read at once: whoever waits gets one of their places before they have to end."""
    release, method = threading.Event(), "/inference.GRPCInferenceService/ModelInfer"
    with grpc.insecure_channel(server.url, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        try:
            silent = [channel.stream_unary(method).future(iter(release.wait, True), timeout=120) for _ in range(60)]
            assert stub(server.url).ModelInfer(GOOD, timeout=ARRIVAL - 5)
            assert any(not call.done() for call in silent)
        finally:
            release.set()


class Details(NamedTuple):
    """What gRPC tells of a call before its message is read."""

    method: str
    invocation_metadata: tuple[tuple[str, str], ...] = ()


class Gone:
    """The context of a call whose client has gone, before gRPC knows: its reads and writes fail, done() does not."""

    @staticmethod
    def done() -> bool:
        return False

    async def read(self) -> bytes:
        raise grpc.aio.InternalError('Failed "execute_batch"')

    async def write(self, answer: bytes) -> None:
        raise grpc.aio.InternalError('Failed "execute_batch"')

    async def abort(self, status: grpc.StatusCode, message: str) -> None:
        raise grpc.aio.InternalError('Failed "execute_batch"')


@pytest.mark.parametrize("method", ["ModelInfer", "ServerLive", "RepositoryIndex", "LogSettings"])
@pytest.mark.parametrize("token", [None, b"secret"])
def test_clients_that_go_while_they_are_answered(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, method: str, token: bytes | None
) -> None:
    """One in ten thousand requests of the fuzzer was logged as a failure of the front."""
    models, _ = read_models(write_models(tmp_path / "repo", add=ADD_ONE))

    async def answer() -> None:
        front = Front(models, "", token, Metrics(models), tmp_path)
        handler = front.service(Details(f"/inference.GRPCInferenceService/{method}"))
        with pytest.raises(asyncio.CancelledError):
            await handler.stream_stream(None, Gone())
        assert (front.capacity.calls, front.capacity.held) == (0, 0)

    asyncio.run(answer())
    assert not caplog.records


def test_many_large_requests_at_once(server: Server) -> None:
    """A hundred of six megabytes took 2.7 GB: each was there several times."""
    large = request("vae_encoder", {"image": np.zeros((8, 512, 512, 3), np.uint8)})
    before, calls = memory_of_the_front(server), [stub(server.url) for _ in range(8)]
    with ThreadPoolExecutor(100) as pool:
        answers = [pool.submit(calls[i % 8].ModelInfer, large, timeout=2) for i in range(100)]
        most = 0
        while not all(answer.done() for answer in answers):
            most = max(most, memory_of_the_front(server))
            time.sleep(0.02)
    assert most < before + (1 << 30)


def memory_of_the_front(server: Server) -> int:
    return psutil.Process(server.pid).memory_info().rss


def test_a_model_that_is_not_there(server: Server) -> None:
    words = refused(server.url, request("../../etc/passwd" * 1000, dit_inputs()), "NOT_FOUND")
    assert "there are clip, dit, " in words


CLOSED = {
    "RepositoryModelLoad": pb.RepositoryModelLoadRequest(model_name="dit"),
    "RepositoryModelUnload": pb.RepositoryModelUnloadRequest(model_name="dit"),
    "SystemSharedMemoryStatus": pb.SystemSharedMemoryStatusRequest(),
    "SystemSharedMemoryRegister": pb.SystemSharedMemoryRegisterRequest(name="x", key="/x", byte_size=1),
    "SystemSharedMemoryUnregister": pb.SystemSharedMemoryUnregisterRequest(),
    "CudaSharedMemoryStatus": pb.CudaSharedMemoryStatusRequest(),
    "CudaSharedMemoryRegister": pb.CudaSharedMemoryRegisterRequest(name="x"),
    "CudaSharedMemoryUnregister": pb.CudaSharedMemoryUnregisterRequest(),
    "TraceSetting": pb.TraceSettingRequest(),
    "LogSettings": pb.LogSettingsRequest(),
}


@pytest.mark.parametrize("method", CLOSED)
def test_methods_that_change_the_server_are_closed(server: Server, method: str) -> None:
    for url, status in ((server.url, "PERMISSION_DENIED"), (socket_of(server), "UNAVAILABLE")):
        with pytest.raises(grpc.RpcError) as caught:
            getattr(stub(url), method)(CLOSED[method], timeout=10)
        said(caught.value, status)


def test_methods_that_are_not_there(server: Server) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        list(stub(server.url).ModelStreamInfer(iter([GOOD]), timeout=10))
    said(caught.value, "PERMISSION_DENIED")
    with pytest.raises(grpc.RpcError) as caught:
        grpc.insecure_channel(server.url).unary_unary("/x.Y/Z")(b"", timeout=10)
    said(caught.value, "UNIMPLEMENTED")


def test_what_may_be_asked(server: Server) -> None:
    """Load balancers, and clients of Triton's of any kind."""
    with InferenceServerClient(server.url) as client:
        assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("dit")
        assert not client.is_model_ready("nothing")
        assert client.get_server_metadata().name == "triton"
        assert [tensor_.name for tensor_ in client.get_model_metadata("dit").outputs] == ["velocity"]
        assert client.get_model_config("dit").config.name == "dit"
        assert {model.name for model in client.get_model_repository_index().models} >= {"dit", "text_encoders"}
        assert client.get_inference_statistics("dit").model_stats
    health = grpc.insecure_channel(server.url).unary_unary("/grpc.health.v1.Health/Check")
    assert health(b"", timeout=10) == b"\x08\x01"


def test_only_this_user_reaches_what_is_behind(server: Server) -> None:
    """Sockets, and the models' and clients' shared memory, in which requests lie."""
    found = list(Path("/dev/shm").glob(f"*-{server.pid}-*"))
    assert len(found) == len(model_processes(server)) + len(SHARED) + 1
    assert sum(path.is_dir() for path in found) == 2
    assert all(path.stat().st_mode & 0o077 == 0 for path in found)


def test_a_picture_begun_with_other_engines(server: Server) -> None:
    metadata = [("ditforge-engines", "0" * 64)]
    with pytest.raises(grpc.RpcError) as caught:
        stub(server.url).ModelInfer(GOOD, timeout=10, metadata=metadata)
    assert "not '000000000000' with which the picture was begun" in said(caught.value, "FAILED_PRECONDITION")


def test_the_client_is_served(server: Server) -> None:
    with Client(server.url) as client:
        assert client.generate("a large red circle", seed=0, steps=2).size == (128, 128)


# What engines do, whatever they compute


@pytest.fixture(scope="module")
def careful(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    repository = write_models(tmp_path_factory.mktemp("careful") / "repo", max_batch=8, queue=12, careful=CAREFUL)
    with start(repository, port=0) as server:
        yield server


def test_a_batch_that_fails_is_run_one_by_one(careful: Server) -> None:
    values = [1, 13, 2, 13, 3, 4, 5, 6]
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(infer, careful.url, "careful", x, batched=True) for x in values]
    failed = [answer.exception() for answer in answers]
    assert [error is None for error in failed] == [x != 13 for x in values]
    assert [a.result()[0, 0] for a, x in zip(answers, values, strict=True) if x != 13] == [2, 3, 4, 5, 6, 7]
    for error in filter(None, failed):
        assert "the engine of careful failed (RuntimeError); the server's log says why" in str(error)
    log = careful.log.read_text()
    assert "no kernel in /opt/build/onnxruntime/core/provider.cc for 13" in log


def test_what_clients_do_not_wait_for_is_not_executed(careful: Server) -> None:
    """Ten that were cancelled, behind one that takes a while: the next one waits for that one only."""
    before = infer(careful.url, "careful", 0, batched=True)[0, 1]
    with ThreadPoolExecutor(1) as pool, InferenceServerClient(careful.url) as client:
        busy = pool.submit(infer, careful.url, "careful", 62, batched=True)
        time.sleep(0.8)  # it was alone in its batch
        calls = [client.async_infer("careful", [tensor(61, batched=True)], lambda *_: None) for _ in range(10)]
        time.sleep(0.5)
        for call in calls:
            call.cancel()
        after = infer(careful.url, "careful", 0, batched=True)[0, 1]
        busy.result()
    assert after - before == 2


def test_a_request_waits_no_longer_than_its_deadline(careful: Server) -> None:
    before = infer(careful.url, "careful", 0, batched=True)[0, 1]
    with ThreadPoolExecutor(1) as pool:
        busy = pool.submit(infer, careful.url, "careful", 62, batched=True)
        time.sleep(0.8)
        with pytest.raises(Exception, match=r"(?i)deadline"):
            infer(careful.url, "careful", 1, batched=True, timeout=0.5)
        busy.result()
    assert infer(careful.url, "careful", 0, batched=True)[0, 1] - before == 2


def test_a_full_queue_refuses_at_once(careful: Server) -> None:
    with ThreadPoolExecutor(40) as pool:
        busy = pool.submit(infer, careful.url, "careful", 63, batched=True)
        time.sleep(0.8)
        waiting = [pool.submit(infer, careful.url, "careful", 1, batched=True) for _ in range(30)]
        begun = time.monotonic()
        while sum(answer.done() for answer in waiting) < 30 - 12 and time.monotonic() < begun + 10:
            time.sleep(0.02)
        assert not busy.done(), "they waited"
        refusals = [answer for answer in waiting if answer.done()]
        assert len(refusals) == 30 - 12
        for answer in refusals:
            assert "RESOURCE_EXHAUSTED" in str(answer.exception())
        assert all(answer.exception() is None for answer in waiting if answer not in refusals)


LARGE_ANSWERS = ADD_ONE.replace("x + np.float32(1)", "np.zeros(2_000_000, np.float32)")


def test_answers_that_nobody_takes(tmp_path: Path) -> None:
    """A client that does not read its answers: those of 8 MB piled up in the front until there was no more memory."""
    with start(write_models(tmp_path / "repo", large=LARGE_ANSWERS), port=0) as server:
        ask = request("large", {"x": np.zeros(1, np.float32)}).SerializeToString()
        # A client of gRPC's own would else make room for whole answers, as it finds the connection fast.
        narrow = [
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.http2.bdp_probe", 0),
            ("grpc.http2.lookahead_bytes", 65536),
        ]
        with grpc.insecure_channel(server.url, narrow) as channel:
            method = channel.stream_stream("/inference.GRPCInferenceService/ModelInfer")
            unread = [method(iter([ask])) for _ in range(100)]
            eventually(lambda: any(call.done() for call in unread))
            refusals = [call for call in unread if call.done()]
            assert all(call.code().name == "RESOURCE_EXHAUSTED" for call in refusals)
        eventually(lambda: infer(server.url, "large", 0).shape == (2_000_000,))
