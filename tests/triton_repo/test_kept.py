"""What the front keeps of a picture's inputs: as much as there is room for, and each picture's apart."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from command_line import eventually
from hostile import dit_inputs, output, request, said, stub
from python_models import tritonserver
from tritonclient.grpc import service_pb2 as pb

from ditforge.client import Client
from ditforge.client.replica import Replica
from ditforge.triton_repo import kept
from ditforge.triton_repo.kept import KeptInputs
from ditforge.triton_repo.limits import BadRequest
from ditforge.triton_repo.refusal import Refused
from ditforge.triton_repo.server import Server, start

NAMES = ("prompt_embeds", "pooled_embeds")
WHOLE = dit_inputs()
SHORT = {name: array for name, array in WHOLE.items() if name not in NAMES}


@pytest.fixture(scope="module")
def server(tiny) -> Iterator[Server]:
    with start(tiny.repository, port=0) as server:
        yield server


def message(size: int, *names: str) -> tuple[pb.ModelInferRequest, list[bytes | memoryview]]:
    made = pb.ModelInferRequest(model_name="dit")
    for name in names:
        made.inputs.add(name=name, datatype="UINT8", shape=(1, size))
    return made, [bytes([number]) * size for number, _ in enumerate(names)]


def keep(store: KeptInputs, size: int, picture: str = "picture", label: str = "label") -> None:
    store.keep(*message(size, "latents", *NAMES), (picture, label), NAMES)


def found(store: KeptInputs, picture: str = "picture", label: str = "label") -> list[bytes]:
    """The contents that are filled into a request."""
    made, raw = message(5, "latents")
    entry = store.find(made, (picture, label), NAMES)
    assert entry
    store.fill(made, raw, entry)
    assert [tensor.name for tensor in made.inputs] == ["latents", *NAMES]
    contents = [bytes(content) for content in raw[1:]]
    store.release(entry)
    return contents


def taken(store: KeptInputs) -> int:
    return sum(end - start for start, end in store.arena.used)


def test_what_is_kept_is_filled_in() -> None:
    store = KeptInputs()
    keep(store, 10)
    assert found(store) == [b"\1" * 10, b"\2" * 10]
    assert taken(store) == 64
    for place in (("picture", "other"), ("other", "label")):
        with pytest.raises(Refused, match="send it again"):
            found(store, *place)
    assert store.find(message(5, "latents", NAMES[0])[0], ("picture", "label"), NAMES) is None
    store.forget("picture")
    store.forget(None)
    assert (taken(store), len(store.pictures)) == (0, 0)


def test_there_is_a_limit_to_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "MOST_BYTES", 640)
    store = KeptInputs()
    for number in range(4):
        keep(store, 100, f"picture {number}")
        assert found(store, "picture 0")  # which is used, and so stays
    assert list(store.pictures) == ["picture 3", "picture 0"]
    keep(store, 400, "too large for all the room")
    assert (taken(store), len(store.pictures)) == (0, 0)
    monkeypatch.setattr(kept, "MOST_LABELS", 3)
    for label in "abcdc":
        keep(store, 10, label=label)
    assert [*store.pictures["picture"]] == ["b", "d", "c"]
    assert taken(store) == 3 * 64


def test_what_a_request_refers_to_stays_until_it_is_released(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "MOST_BYTES", 256)
    store = KeptInputs()
    keep(store, 60)
    entry = store.find(message(5, "latents")[0], ("picture", "label"), NAMES)
    assert entry
    store.forget("picture")
    keep(store, 70, "other")  # for which there would be room only where the other is
    assert not store.pictures
    keep(store, 60, "other")
    start = entry.start
    assert bytes(store.arena.memory[start : start + 60]) == b"\1" * 60
    store.release(entry)
    assert taken(store) == 128


def test_triton_reads_what_is_kept_from_the_file(tmp_path: Path) -> None:
    store = KeptInputs(tmp_path / "kept")
    keep(store, 60)
    made, raw = message(5, "latents")
    entry = store.find(made, ("picture", "label"), NAMES)
    assert entry
    store.fill(made, raw, entry)
    store.refer(made, raw, entry)
    assert len(raw) == 3  # no Triton was told of the file
    store.arena.shared = True
    store.refer(made, raw, entry)
    assert len(raw) == 1
    content = (tmp_path / "kept").read_bytes()
    for number, tensor in enumerate(made.inputs[1:], 1):
        start = tensor.parameters["shared_memory_offset"].int64_param
        size = tensor.parameters["shared_memory_byte_size"].int64_param
        assert content[start : start + size] == bytes([number]) * 60
    sent, raw = message(60, "latents", *NAMES)
    store.keep(sent, raw, ("picture", "other"), NAMES)
    sent.inputs[1].parameters["shared_memory_region"].string_param = "of this request"
    assert not store.find(message(5, *NAMES)[0], ("picture", "other"), NAMES)
    assert not store.pictures["picture"]["other"].tensors[0][0].parameters  # what refers to a file is a request's own


def test_where_the_file_has_no_room_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = KeptInputs(tmp_path / "kept")

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    keep(store, 10)
    assert (taken(store), len(store.pictures)) == (0, 0)


@pytest.mark.parametrize("place", [("", "label"), ("picture", ""), ("p" * 65, "label"), ("picture", "l" * 65)])
def test_names_are_short(place: tuple[str, str]) -> None:
    with pytest.raises(BadRequest, match="names of 1 to 64 characters"):
        KeptInputs().find(message(5, "latents")[0], place, NAMES)


def infer(server: Server, arrays: dict[str, np.ndarray], picture: str, label: str) -> pb.ModelInferResponse:
    metadata = [("ditforge-picture", picture), ("ditforge-kept", label)]
    return stub(server.url).ModelInfer(request("dit", arrays), timeout=60, metadata=metadata)


def refused(server: Server, status: str, *arguments) -> str:
    with pytest.raises(grpc.RpcError) as caught:
        infer(server, *arguments)
    return said(caught.value, status)


def test_a_step_without_embeddings_is_that_with_them(server: Server) -> None:
    expected = output(infer(server, WHOLE, "one", "a"))
    assert output(infer(server, SHORT, "one", "a")) == expected
    other = dit_inputs(seed=7)
    assert output(infer(server, other, "two", "a")) != expected
    assert output(infer(server, SHORT, "one", "a")) == expected
    assert "embeddings are sent to Triton" not in server.log.read_text()  # it reads them from the file
    later = {**SHORT, "timestep": np.full((1, 1), 0.25, np.float32)}
    assert output(infer(server, later, "one", "a")) == output(infer(server, {**WHOLE, **later}, "three", "a"))


def test_what_is_not_kept_is_asked_for(server: Server) -> None:
    assert "send it again" in refused(server, "ABORTED", SHORT, "nobody", "a")
    broken = {**WHOLE, "prompt_embeds": np.full_like(WHOLE["prompt_embeds"], np.nan)}
    assert "prompt_embeds" in refused(server, "INVALID_ARGUMENT", broken, "nobody", "a")
    assert "send it again" in refused(server, "ABORTED", SHORT, "nobody", "a")  # what is broken is not kept
    half = {name: array for name, array in WHOLE.items() if name != "pooled_embeds"}
    assert "pooled_embeds" in refused(server, "INVALID_ARGUMENT", half, "nobody", "a")
    infer(server, WHOLE, "somebody", "a")
    two = {name: np.concatenate([array] * 2) for name, array in SHORT.items()}
    assert refused(server, "INVALID_ARGUMENT", two, "somebody", "a")  # two latents, and kept embeddings of one
    picture = stub(server.url).ModelInfer(
        request("vae_decoder", {"latents": WHOLE["latents"]}), timeout=60, metadata=[("ditforge-picture", "somebody")]
    )
    assert output(picture)
    assert "send it again" in refused(server, "ABORTED", SHORT, "somebody", "a")  # the picture is finished


def test_the_client_sends_embeddings_once(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[set[str]] = []
    call = Replica._call

    def noting(self: Replica, name: str, inputs: dict, *arguments):
        if name == "dit":
            sent.append(set(inputs))
        return call(self, name, inputs, *arguments)

    monkeypatch.setattr(Replica, "_call", noting)
    with Client(server.url) as client:
        first = client.generate("a large red circle", seed=0, steps=4)
        assert [NAMES[0] in names for names in sent] == [True, False, False, False]
        sent.clear()
        batch = client.generate(["a large red circle"] * 10, seed=0, steps=2)  # in two parts, of 8 and of 2
        assert [NAMES[0] in names for names in sent] == [True, True, False, False]
    assert first.size == batch[0].size


def test_what_is_kept_outlives_triton(tiny) -> None:
    """A Triton that is started again is told of the file anew."""
    with start(tiny.repository, port=0) as server:
        expected = output(infer(server, WHOLE, "one", "a"))
        first = tritonserver(server)
        first.kill()
        first.wait()

        def answered() -> bool:
            try:
                return output(infer(server, SHORT, "one", "a")) == expected
            except grpc.RpcError as error:
                if error.code().name != "UNAVAILABLE":
                    raise
                return False

        eventually(answered)
        assert tritonserver(server).pid != first.pid


def test_nothing_is_kept_of_a_request_that_is_refused(tiny) -> None:
    """While there is no Triton, it would take the room that the next one needs."""
    with start(tiny.repository, port=0) as server:
        infer(server, WHOLE, "before", "a")
        tritonserver(server).kill()
        refusals = 0

        def again() -> bool:
            nonlocal refusals
            try:
                infer(server, WHOLE, f"picture {refusals}", "a")
            except grpc.RpcError as error:
                refusals += "starting" in said(error, "UNAVAILABLE")
                return False
            return True

        eventually(again)
        assert refusals > 1
        for number in range(1, refusals):  # the first one may have been under way when Triton died
            assert "send it again" in refused(server, "ABORTED", SHORT, f"picture {number - 1}", "a")
