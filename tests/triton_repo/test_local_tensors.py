"""Tensors of clients on this machine, in files: what the front takes, what it refuses, and what it removes."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hostile import clients_folder, dit_inputs, output, refused, request, said, stub
from tritonclient.grpc import service_pb2 as pb

from ditforge.client import Client
from ditforge.shared_memory import OFFSET, REGION, refer
from ditforge.triton_repo import local_tensors
from ditforge.triton_repo.limits import BadRequest
from ditforge.triton_repo.local_tensors import LocalTensors
from ditforge.triton_repo.refusal import Refused
from ditforge.triton_repo.server import Server, start

SIZE = 4 * 16 * 16 * 16  # bytes of the latents of dit_inputs(), and of their velocity


@pytest.fixture(scope="module")
def server(tiny) -> Iterator[Server]:
    with start(tiny.repository, port=0) as server:
        yield server


@pytest.fixture
def file(server: Server) -> Iterator[Path]:
    """A file with latents, and room for a velocity behind them."""
    made = clients_folder(server) / uuid.uuid4().hex
    made.write_bytes(dit_inputs()["latents"].tobytes() + bytes(SIZE))
    yield made
    made.unlink(missing_ok=True)


def referring(region: str, start: int = 0, size: int = SIZE) -> pb.ModelInferRequest:
    """A request for a step whose latents are in a file, and whose velocity shall go there, behind them."""
    made = request("dit", dit_inputs())
    refer(made.inputs[0].parameters, region, start, size)
    del made.raw_input_contents[0]
    made.outputs.add(name="velocity")
    refer(made.outputs[0].parameters, region, SIZE, SIZE)
    return made


def test_a_step_in_a_file_is_that_in_messages(server: Server, file: Path) -> None:
    expected = output(stub(server.url).ModelInfer(request("dit", dit_inputs()), timeout=60))
    answer = stub(server.url).ModelInfer(referring(file.name), timeout=60)
    assert file.read_bytes()[SIZE:] == expected
    assert list(answer.raw_output_contents) == [b""]
    assert answer.outputs[0].name == "velocity" and not answer.outputs[0].parameters


@pytest.mark.parametrize("room", [SIZE - 4, SIZE + 4])
def test_an_output_of_another_size_is_sent(server: Server, file: Path, room: int) -> None:
    expected = output(stub(server.url).ModelInfer(request("dit", dit_inputs()), timeout=60))
    with file.open("ab") as more:
        more.write(bytes(64))
    made = referring(file.name)
    refer(made.outputs[0].parameters, file.name, SIZE, room)
    assert output(stub(server.url).ModelInfer(made, timeout=60)) == expected
    assert not any(file.read_bytes()[SIZE:])


def broken(change: Callable[[pb.ModelInferRequest], object]) -> Callable[[str], pb.ModelInferRequest]:
    def make(region: str) -> pb.ModelInferRequest:
        made = referring(region)
        change(made)
        return made

    return make


LATENTS = 0  # their place among the inputs
HOSTILE: dict[str, tuple[str, Callable[[str], pb.ModelInferRequest]]] = {
    "before the file": ("not in the", lambda region: referring(region, start=-4)),
    "behind the file": ("not in the", lambda region: referring(region, start=2 * SIZE)),
    "past its end": ("not in the", lambda region: referring(region, start=2 * SIZE - 4)),
    "no bytes": ("not in the", lambda region: referring(region, size=0)),
    "fewer than none": ("not in the", lambda region: referring(region, size=-SIZE)),
    "numbers that overflow": ("not in the", lambda region: referring(region, start=2**63 - 1, size=2**63 - 1)),
    "fewer bytes than the shape": ("has 16384 bytes, got 16380", lambda region: referring(region, size=SIZE - 4)),
    "more bytes than the shape": ("has 16384 bytes, got 16388", lambda region: referring(region, size=SIZE + 4)),
    "no offset": ("has the parameters", broken(lambda made: made.inputs[LATENTS].parameters.pop(OFFSET))),
    "an offset in words": (
        "has the parameters",
        broken(lambda made: setattr(made.inputs[LATENTS].parameters[OFFSET], "string_param", "0")),
    ),
    "one parameter more": (
        "has the parameters",
        broken(lambda made: setattr(made.inputs[LATENTS].parameters["classification"], "int64_param", 1)),
    ),
    "two files": (
        "in one file",
        broken(lambda made: setattr(made.outputs[0].parameters[REGION], "string_param", "0" * 32)),
    ),
    "contents as well": ("one for each", broken(lambda made: made.raw_input_contents.append(bytes(SIZE)))),
    "contents missing": ("one for each", broken(lambda made: made.raw_input_contents.pop())),
    "an output that is none": ("velocity", broken(lambda made: setattr(made.outputs[0], "name", "nothing"))),
    "a shape that overflows": ("latents", broken(lambda made: made.inputs[LATENTS].shape.append(2**62))),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_wrong_place_is_refused(server: Server, file: Path, case: str) -> None:
    said, make = HOSTILE[case]
    before = file.read_bytes()
    assert said in refused(server.url, make(file.name))
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    "region",
    ["", "..", "../model", "/etc/passwd", "0" * 32, "A" * 32, "x" * 10_000, "ä" * 32, "0" * 31 + "\0", "link", "pipe"],
)
def test_a_file_that_is_not_there_is_refused(server: Server, file: Path, region: str) -> None:
    """So that the client sends its tensors. Links are not followed, and what is no file is not opened for long."""
    if region == "link":
        region = uuid.uuid4().hex
        (clients_folder(server) / region).symlink_to(file)
    elif region == "pipe":
        region = uuid.uuid4().hex
        os.mkfifo(clients_folder(server) / region)
    assert "send the tensors" in refused(server.url, referring(region), "NOT_FOUND")


def test_values_are_checked_wherever_they_are(server: Server, file: Path) -> None:
    file.write_bytes(np.full(SIZE // 4, np.nan, np.float32).tobytes() + bytes(SIZE))
    assert "latents" in refused(server.url, referring(file.name))


def test_a_file_that_is_cut_short_meanwhile(server: Server, file: Path) -> None:
    """Whatever its owner does with it, the server answers, or refuses in words."""
    expected = output(stub(server.url).ModelInfer(request("dit", dit_inputs()), timeout=60))
    whole = file.read_bytes()
    stub_, outcomes = stub(server.url), set()
    for number in range(60):
        running = stub_.ModelInfer.future(referring(file.name), timeout=60)
        os.truncate(file, (0, SIZE, 2 * SIZE)[number % 3])
        if error := running.exception():
            outcomes.add(said(error, "INVALID_ARGUMENT"))
        else:
            outcomes.add("file" if output(running.result()) == b"" else "sent")
            assert output(running.result()) in (b"", expected)
        file.write_bytes(whole)
    assert (
        "file" in outcomes and output(stub(server.url).ModelInfer(request("dit", dit_inputs()), timeout=60)) == expected
    )


def test_no_more_is_read_than_a_message_may_have(tmp_path: Path) -> None:
    local, made = LocalTensors(tmp_path / "clients"), referring("0" * 32)
    (tmp_path / "clients" / ("0" * 32)).write_bytes(bytes(2 * SIZE))
    raw: list[bytes | memoryview] = [b""] * 4
    assert local.take(made, raw, SIZE)["velocity"].size == SIZE
    assert raw[0] == bytes(SIZE)
    with pytest.raises(BadRequest, match=f"at most {SIZE - 1} bytes"):
        local.take(referring("0" * 32), [b""] * 4, SIZE - 1)


def test_another_users_file_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local, name = LocalTensors(tmp_path / "clients"), "0" * 32
    (tmp_path / "clients" / name).touch()
    with local.open(name) as descriptor:
        assert os.fstat(descriptor).st_size == 0
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(Refused, match="send the tensors"), local.open(name):
        pass


HOLDING = """
import fcntl, sys
file = open(sys.argv[1], "r+b")
fcntl.lockf(file, fcntl.LOCK_EX)
print("locked", flush=True)
sys.stdin.read()
"""


def test_what_clients_leave_behind_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not what a process has locked, and not what was made just now, which is not locked yet."""
    monkeypatch.setattr(local_tensors, "SWEPT_EVERY", 0.0)
    local = LocalTensors(tmp_path / "clients")
    used, left, new = (tmp_path / "clients" / (digit * 32) for digit in "abc")
    for path in (used, left, new):
        path.touch()
    os.utime(used, (0, 0))
    os.utime(left, (0, 0))
    os.utime(new, (2**33, 2**33))
    command = [sys.executable, "-c", HOLDING, str(used)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout and holder.stdout.readline() == b"locked\n"
        local.sweep()
        assert used.exists() and not left.exists() and new.exists()
        holder.kill()
    local.sweep()
    assert not used.exists()


@pytest.mark.parametrize("becomes", [0, SIZE, 2 * SIZE - 1])
def test_a_file_never_grows(tmp_path: Path, becomes: int) -> None:
    """The answer is sent where its owner has cut the file short, or removed it."""
    local, made, name = LocalTensors(tmp_path / "clients"), referring("0" * 32), "0" * 32
    file = tmp_path / "clients" / name
    file.write_bytes(bytes(2 * SIZE))
    places = local.take(made, [b""] * 4, SIZE)
    answer = pb.ModelInferResponse()
    answer.outputs.add(name="velocity")
    os.truncate(file, becomes)
    raw: list[bytes | memoryview] = [b"\1" * SIZE]
    local.give(answer, raw, places)
    assert raw == [b"\1" * SIZE] and file.stat().st_size == becomes
    file.unlink()
    local.give(answer, raw, places)
    assert raw == [b"\1" * SIZE] and not file.exists()


def test_without_the_folder_tensors_are_sent(tiny) -> None:
    """Somebody may clean /dev/shm while the server runs."""
    with start(tiny.repository, port=0) as server:
        place = clients_folder(server)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(local_tensors, "SWEPT_EVERY", 0.0)
            local = LocalTensors(place.with_name(place.name + "-other"))
            assert local.folder is not None
            local.folder.rmdir()
            local.sweep()
        place.rmdir()
        assert "send the tensors" in refused(server.url, referring("0" * 32), "NOT_FOUND")
        with Client(server.url) as client:
            assert client.generate("a large red circle", seed=0, steps=2, width=256, height=256).size == (256, 256)


def test_only_the_user_can_open_the_folder(server: Server) -> None:
    assert clients_folder(server).stat().st_mode & 0o077 == 0
