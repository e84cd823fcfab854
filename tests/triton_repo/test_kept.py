"""What the front keeps of a picture's inputs: as much as there is room for, and each picture's apart."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import numpy as np
import pytest
from hostile import dit_inputs, output, request, said, stub
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


def message(size: int, *names: str) -> tuple[pb.ModelInferRequest, list[bytes]]:
    made = pb.ModelInferRequest(model_name="dit")
    for name in names:
        made.inputs.add(name=name, datatype="UINT8", shape=(1, size))
    return made, [bytes(size)] * len(names)


def keep(store: KeptInputs, size: int, picture: str = "picture", label: str = "label") -> None:
    store.keep(*message(size, "latents", *NAMES), (picture, label), NAMES)


def names_filled(store: KeptInputs, picture: str = "picture", label: str = "label") -> list[str]:
    made, raw = message(5, "latents")
    assert store.fill(made, raw, (picture, label), NAMES)
    assert len(raw) == len(made.inputs)
    return [tensor.name for tensor in made.inputs]


def test_what_is_kept_is_filled_in() -> None:
    store = KeptInputs()
    keep(store, 10)
    assert names_filled(store) == ["latents", *NAMES]
    assert store.bytes == 20
    for place in (("picture", "other"), ("other", "label")):
        with pytest.raises(Refused, match="send it again"):
            names_filled(store, *place)
    assert not store.fill(*message(5, "latents", NAMES[0]), ("picture", "label"), NAMES)
    store.forget("picture")
    store.forget(None)
    assert (store.bytes, len(store.pictures)) == (0, 0)


def test_there_is_a_limit_to_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "MOST_BYTES", 100)
    store = KeptInputs()
    for number in range(4):
        keep(store, 20, f"picture {number}")
        assert names_filled(store, "picture 0")  # which is used, and so stays
    assert list(store.pictures) == ["picture 3", "picture 0"]
    keep(store, 60, "too large for all the room")
    assert (store.bytes, len(store.pictures)) == (0, 0)
    for number in range(kept.MOST_LABELS + 5):
        keep(store, 0, label=str(number))
    assert len(store.pictures["picture"]) == kept.MOST_LABELS
    keep(store, 10, label="7")
    keep(store, 15, label="7")
    assert store.bytes == 30


@pytest.mark.parametrize("place", [("", "label"), ("picture", ""), ("p" * 65, "label"), ("picture", "l" * 65)])
def test_names_are_short(place: tuple[str, str]) -> None:
    with pytest.raises(BadRequest, match="names of 1 to 64 characters"):
        KeptInputs().fill(*message(5, "latents"), place, NAMES)


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
