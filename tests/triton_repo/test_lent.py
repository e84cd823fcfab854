"""Large tensors that go to Triton and come back in shared memory: what they are, and that they are given back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import grpc
import numpy as np
import pytest
from hostile import dit_inputs, output, request, stub
from tritonclient.grpc import service_pb2 as pb

from ditforge.shared_memory import LARGE, OFFSET, REGION
from ditforge.triton_repo import wire
from ditforge.triton_repo.lent import LentTensors
from ditforge.triton_repo.server import Server, start


@pytest.fixture(scope="module")
def server(tiny) -> Iterator[Server]:
    with start(tiny.repository, port=0) as server:
        yield server


@pytest.fixture
def lent(tmp_path: Path) -> LentTensors:
    """As if Triton had been told of the file."""
    made = LentTensors(tmp_path / "lent")
    made.arena.shared = True
    return made


def message(*sizes: int) -> tuple[pb.ModelInferRequest, list[wire.Raw]]:
    made = pb.ModelInferRequest(model_name="dit")
    for number, size in enumerate(sizes):
        made.inputs.add(name=str(number), datatype="UINT8", shape=(1, size))
    made.outputs.add(name="out")
    return made, [bytes([number + 1]) * size for number, size in enumerate(sizes)]


def test_large_contents_are_lent_and_small_ones_sent(lent: LentTensors, tmp_path: Path) -> None:
    made, raw = message(10, LARGE, LARGE - 1, LARGE + 5)
    with ExitStack() as held:
        lent.lend_inputs(made, raw, held)
        assert [content[0] for content in raw] == [1, 3]
        there = {t.name: t.parameters[OFFSET].int64_param for t in made.inputs if REGION in t.parameters}
        assert set(there) == {"1", "3"}
        file = (tmp_path / "lent").read_bytes()
        assert file[there["1"] : there["1"] + LARGE] == b"\2" * LARGE
        assert file[there["3"] : there["3"] + LARGE + 5] == b"\4" * (LARGE + 5)
        assert len(lent.arena.used) == 2
    assert not lent.arena.used


def test_what_is_elsewhere_in_shared_memory_stays_there(lent: LentTensors) -> None:
    made, raw = message(LARGE, LARGE, 10)
    made.inputs[1].parameters[REGION].string_param = "other"
    del raw[1]
    with ExitStack() as held:
        lent.lend_inputs(made, raw, held)
    assert [tensor.parameters[REGION].string_param for tensor in made.inputs[:2]] == ["lent", "other"]
    assert raw == [b"\3" * 10]


@pytest.mark.parametrize("why", ["no Triton was told", "no room", "numbers in lists"])
def test_what_cannot_be_lent_is_sent(lent: LentTensors, why: str) -> None:
    made, raw = message(LARGE, 10)
    if why != "numbers in lists":
        answered(lent, made, LARGE)
    lent.arena.shared = why != "no Triton was told"
    if why == "no room":
        lent.arena.take(lent.arena.size)
    if why == "numbers in lists":
        raw.clear()
    before = list(raw)
    with ExitStack() as held:
        lent.lend_inputs(made, raw, held)
        lent.lend_outputs(made, held)
    assert raw == before
    assert not any(REGION in tensor.parameters for tensor in (*made.inputs, *made.outputs))
    answer, contents = pb.ModelInferResponse(), [b"as it is"]
    answer.outputs.add(name="out", datatype="UINT8", shape=(1, 8))
    lent.complete(made, answer, contents)
    assert contents == [b"as it is"]


def answered(lent: LentTensors, made: pb.ModelInferRequest, size: int) -> None:
    """Have it see an answer to this request, whose output has so many bytes."""
    answer = pb.ModelInferResponse()
    answer.outputs.add(name="out", datatype="UINT8", shape=(1, size))
    lent.complete(made, answer, [bytes(size)])


def lent_output(lent: LentTensors, made: pb.ModelInferRequest) -> bool:
    """Whether the output of this request is lent."""
    with ExitStack() as held:
        lent.lend_outputs(made, held)
        found = REGION in made.outputs[0].parameters
    made.outputs[0].parameters.clear()
    assert not lent.arena.used
    return found


def test_an_output_is_lent_once_its_size_is_known(lent: LentTensors, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as the inputs have the same shapes, and nothing failed; the least used of too many is forgotten."""
    monkeypatch.setattr("ditforge.triton_repo.lent.MOST_KNOWN", 3)
    made, other = message(LARGE, 10)[0], message(LARGE, 11)[0]
    assert not lent_output(lent, made)
    answered(lent, made, LARGE)
    assert lent_output(lent, made) and not lent_output(lent, other)
    answered(lent, made, LARGE - 1)
    assert not lent_output(lent, made)
    answered(lent, made, LARGE)
    lent.forget(made)
    assert not lent_output(lent, made)
    lent.forget(made)
    one, *others = (message(size)[0] for size in (1, 2, 3, 4))
    for asked in (one, made, *others[:2]):
        answered(lent, asked, LARGE)
    assert lent_output(lent, made) and not lent_output(lent, one)
    answered(lent, others[2], LARGE)
    assert not lent_output(lent, made) and lent_output(lent, others[0])


def test_what_was_read_into_it_is_not_moved(lent: LentTensors, tmp_path: Path) -> None:
    made, raw = message(LARGE, LARGE)
    with ExitStack() as held:
        (there := lent.part(held, LARGE))[:] = b"\5" * LARGE
        raw[1] = there
        lent.lend_inputs(made, raw, held)
        assert not raw and len(lent.arena.used) == 2
        start = made.inputs[1].parameters[OFFSET].int64_param
        assert (tmp_path / "lent").read_bytes()[start : start + LARGE] == b"\5" * LARGE
    assert not lent.arena.used and lent.part(ExitStack(), LARGE - 1) is None


def test_an_answer_is_put_together(lent: LentTensors) -> None:
    """Of outputs that are in shared memory, Triton's answer has an empty content; they may be smaller than reserved."""
    made, _ = message(1)
    made.outputs.add(name="other")
    answer = pb.ModelInferResponse(model_name="dit", id="mine", raw_output_contents=[b"abc", b""])
    answer.outputs.add(name="other", datatype="UINT8", shape=(1, 3))
    answer.outputs.add(name="out", datatype="FP32", shape=(1, LARGE // 4 - 1))
    answered(lent, made, LARGE)
    with ExitStack() as held:
        lent.lend_outputs(made, held)
        start = made.outputs[0].parameters[OFFSET].int64_param
        lent.arena.memory[start : start + LARGE] = b"\7" * LARGE
        response, contents = wire.parse_answer(answer.SerializeToString())
        lent.complete(made, response, contents)
        assert contents == [b"abc", b"\7" * (LARGE - 4)]
    assert (response.id, [one.name for one in response.outputs]) == ("mine", ["other", "out"])


def test_a_large_step_is_that_of_small_ones(server: Server) -> None:
    """Four latents of 16 KiB are sent alone, and lent as a batch. Batches may be summed in another order."""
    parts = [dit_inputs(seed=number) for number in range(4)]
    small = [output(stub(server.url).ModelInfer(request("dit", part), timeout=60)) for part in parts]
    (file,) = Path("/dev/shm").glob(f"ditforge-triton-*-{server.pid}-*+lent")
    assert file.stat().st_blocks == 0
    batch = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    answer = stub(server.url).ModelInfer(request("dit", batch), timeout=60)
    assert file.stat().st_blocks > 0
    assert not any(one.parameters for one in answer.outputs)
    velocities = [np.frombuffer(data, np.float32) for data in (output(answer), b"".join(small))]
    np.testing.assert_allclose(*velocities, rtol=0, atol=1e-4)
    assert "large tensors are sent" not in server.log.read_text()


def tensors(answer: pb.ModelInferResponse) -> dict[str, tuple[str, list[int], bytes]]:
    """The outputs of an answer."""
    pairs = zip(answer.outputs, answer.raw_output_contents, strict=True)
    return {one.name: (one.datatype, list(one.shape), content) for one, content in pairs}


def test_pictures_and_embeddings_come_back_as_before(server: Server) -> None:
    """The first answer is sent, and the next one lent, whether a model gives it or an ensemble of several."""
    prompts = np.array([[b"a red circle"], [b"a blue square"], [b"two green stars"], [b""]], np.object_)
    latents = dit_inputs(48, 48)["latents"]
    for asked in (request("text_encoders", {"prompt": prompts}), request("vae_decoder", {"latents": latents})):
        first, *others = (tensors(stub(server.url).ModelInfer(asked, timeout=60)) for _ in range(3))
        assert max(len(content) for _, _, content in first.values()) >= LARGE
        assert others == [first, first]


def test_memory_is_given_back_whatever_becomes_of_a_request(server: Server) -> None:
    """In the end all of it has been lent many times over, and the answers are still right."""
    whole = request("dit", dit_inputs(32, 32))
    expected = output(stub(server.url).ModelInfer(whole, timeout=60))
    (file,) = Path("/dev/shm").glob(f"ditforge-triton-*-{server.pid}-*+lent")
    broken = request("dit", dit_inputs(32, 32) | {"latents": np.full((1, 16, 32, 32), np.nan, np.float32)})
    for number in range(60):
        with pytest.raises(grpc.RpcError):
            stub(server.url).ModelInfer(broken if number % 2 else whole, timeout=0.002)
    assert output(stub(server.url).ModelInfer(whole, timeout=60)) == expected
    assert file.stat().st_blocks * 512 < 16 << 20
