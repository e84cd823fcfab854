"""Large tensors in shared memory, as a client has them: pictures are the same, and nothing is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from command_line import eventually
from hostile import clients_folder, dit_inputs
from tritonclient.grpc import service_pb2 as pb

from ditforge import shared_memory
from ditforge.client import AsyncClient, Client, local_tensors
from ditforge.client.answer import Output, WrongAnswer
from ditforge.client.connection import Connection
from ditforge.client.local_tensors import MOST_IDLE, LocalTensors, TensorFile, find
from ditforge.client.replica import INFER, Replica
from ditforge.client.settings import ConnectionSettings
from ditforge.shared_memory import LARGE
from ditforge.triton_repo.server import Server, start

PROMPT = "a large red circle"


@pytest.fixture(scope="module")
def server(tiny) -> Iterator[Server]:
    with start(tiny.repository, port=0) as server:
        yield server


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of each request for a model."""
    sizes: list[int] = []
    answer = Replica._answer

    def noting(self: Replica, method: str, request: bytes, *arguments):
        if method == INFER:
            sizes.append(len(request))
        return answer(self, method, request, *arguments)

    monkeypatch.setattr(Replica, "_answer", noting)
    return sizes


@pytest.fixture
def through_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on another machine."""
    monkeypatch.setattr("ditforge.client.replica.find", lambda name: None)


def pictures(url: str) -> list[np.ndarray]:
    """One of 256 x 256, whose latents are 64 KiB, and a batch of small ones."""
    with Client(url) as client:
        large = client.generate(PROMPT, seed=1, steps=3, width=256, height=256)
        small = client.generate([PROMPT] * 3, seed=2, steps=2)
        return [np.asarray(picture) for picture in (large, *small)]


@pytest.fixture(scope="module")
def expected(server: Server) -> list[np.ndarray]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ditforge.client.replica.find", lambda name: None)
        return pictures(server.url)


def test_pictures_are_the_same_and_nothing_is_left(server: Server, expected: list[np.ndarray], sent: list[int]) -> None:
    found = pictures(server.url)
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    assert max(sent) < LARGE
    assert not list(clients_folder(server).iterdir())


def test_elsewhere_tensors_are_sent(server: Server, through_messages: None, sent: list[int]) -> None:
    pictures(server.url)
    assert max(sent) > LARGE


def test_many_pictures_at_once(server: Server, expected: list[np.ndarray]) -> None:
    with Client(server.url) as client, ThreadPoolExecutor(8) as pool:

        def make(number: int) -> np.ndarray:
            return np.asarray(client.generate(PROMPT, seed=1, steps=3, width=256, height=256))

        made = list(pool.map(make, range(16)))
        assert 0 < len(list(clients_folder(server).iterdir())) <= 8  # they are used again
    # pictures that Triton batches may be rounded otherwise
    assert all(np.abs(picture.astype(int) - expected[0].astype(int)).max() <= 1 for picture in made)
    assert not list(clients_folder(server).iterdir())


def test_an_async_client(server: Server, expected: list[np.ndarray], sent: list[int]) -> None:
    async def make() -> np.ndarray:
        async with AsyncClient(server.url) as client:
            return np.asarray(await client.generate(PROMPT, seed=1, steps=3, width=256, height=256))

    assert np.array_equal(asyncio.run(make()), expected[0])
    assert max(sent) < LARGE and not list(clients_folder(server).iterdir())


@pytest.mark.parametrize("lost", ["file", "folder"])
def test_a_file_that_the_server_does_not_have(server: Server, sent: list[int], lost: str, tmp_path: Path) -> None:
    """As where a proxy sends calls to several servers."""
    other = tmp_path / "other"
    other.mkdir(mode=0o700)
    inputs = dit_inputs(32, 32)
    inputs |= {name: inputs[name][:, 0] for name in ("timestep", "guidance")}
    with contextlib.closing(Connection(ConnectionSettings((server.url,)))) as connection:
        velocity = connection.infer("dit", inputs)["velocity"]
        local = connection._replicas[0]._local
        assert local is not None and max(sent) < LARGE
        if lost == "folder":
            local.folder = other
            local.idle.clear()
        for path in clients_folder(server).iterdir():
            path.unlink()
        again = connection.infer("dit", inputs)["velocity"]
        np.testing.assert_array_equal(again, velocity)
        assert sent[-2] < LARGE < sent[-1]
        connection.infer("dit", inputs)
        assert sent[-1] < LARGE  # the server was asked again what it has
        for path in clients_folder(server).iterdir():
            path.unlink()
        for _ in range(2):
            connection.infer("dit", inputs)
        assert sent[-1] > LARGE  # somebody at this address does not keep it
    assert not list(other.iterdir()) and not list(clients_folder(server).iterdir())


def test_where_there_is_no_room_tensors_are_sent(
    server: Server, expected: list[np.ndarray], sent: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_memory, "SPARED", 1 << 60)
    found = pictures(server.url)
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    assert max(sent) > LARGE


def test_a_call_that_fails_leaves_its_file_to_nobody(tmp_path: Path) -> None:
    """The server may still write into it."""
    local = LocalTensors(tmp_path)
    failing = local.file()
    file = failing.__enter__()
    assert file is not None and list(tmp_path.iterdir()) == [file.path]
    assert not failing.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert not list(tmp_path.iterdir())
    with local.file() as other:
        assert other is not None and other is not file
    with local.file() as again:
        assert again is other
        local.close()
        assert list(tmp_path.iterdir()) == [again.path]  # it is under way
    assert not list(tmp_path.iterdir())


def test_an_output_that_is_not_there(tmp_path: Path) -> None:
    file = TensorFile(tmp_path)
    output = Output("FP16", (1, LARGE))
    tensor = pb.ModelInferRequest().outputs.add(name="out")
    start = file.place(tensor.parameters, output.bytes)
    assert start is not None
    os.truncate(file.path, LARGE)
    with pytest.raises(WrongAnswer, match="in shared memory, got less"):
        file.read(start, output)
    file.remove()


@pytest.mark.parametrize(
    "name", ["", "ditforge-none", "../dev/shm/ditforge-x", "ditforge-../x", "DITFORGE-X", "ditforge-" + "x" * 200]
)
def test_a_name_that_is_no_folder(name: str) -> None:
    assert find(name) is None


@pytest.mark.parametrize("wrong", ["mode", "user", "link", "file"])
def test_a_folder_that_others_can_open_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    monkeypatch.setattr(local_tensors, "SHM", tmp_path)
    place = tmp_path / "ditforge-x"
    place.mkdir(mode=0o700)
    assert find("ditforge-x") is not None
    if wrong == "mode":
        place.chmod(0o750)
    elif wrong == "user":
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    else:
        place.rmdir()
        place.symlink_to(tmp_path) if wrong == "link" else place.touch(0o700)
    assert find("ditforge-x") is None


KILLED = """
import os, sys
from ditforge.client import Client
client, end = Client(sys.argv[1]), lambda step: step.index and os.kill(os.getpid(), 9)
client.generate("x", seed=0, steps=2, width=256, height=256, callback=end)
"""


def test_what_a_killed_client_leaves_is_not_locked(server: Server) -> None:
    """And so is removed by the server later (tests/triton_repo/test_local_tensors.py)."""
    import fcntl

    subprocess.run([sys.executable, "-c", KILLED, server.url], check=False, timeout=120)
    eventually(lambda: list(clients_folder(server).iterdir()))
    (left,) = clients_folder(server).iterdir()
    with left.open("r+b") as file:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    left.unlink()


def test_a_server_that_is_started_again(tiny, expected: list[np.ndarray], sent: list[int]) -> None:
    """Its folder has another name; the client finds it at the next picture."""
    with start(tiny.repository, port=0) as first:
        port = int(first.url.rpartition(":")[2])
        with Client(first.url) as client:
            client.generate(PROMPT, seed=1, steps=1, width=256, height=256)
            first.stop()
            with start(tiny.repository, port=port) as second:
                sent.clear()
                picture = client.generate(PROMPT, seed=1, steps=3, width=256, height=256)
                assert np.array_equal(np.asarray(picture), expected[0]) and max(sent) < LARGE
                assert list(clients_folder(second).iterdir())


def in_a_fork(work: Callable[[], object]) -> int:
    """Call a function in a fork of this process, and return its exit code."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_fork_has_files_of_its_own(tmp_path: Path) -> None:
    """It would write into those of its parent, at the same places at the same time."""
    local = LocalTensors(tmp_path)
    with local.file() as file:
        assert file is not None
        path = file.path
    del file

    def work() -> None:
        with local.file() as own:
            assert own is not None and own.path != path and not own.path.samefile(path)
        local.close()
        assert list(tmp_path.iterdir()) == [path]

    assert in_a_fork(work) == 0
    assert in_a_fork(local.close) == 0
    with local.file() as same:
        assert same is not None and same.path == path and list(tmp_path.iterdir()) == [path]


def test_a_client_that_is_dropped_leaves_nothing(tmp_path: Path) -> None:
    local = LocalTensors(tmp_path)
    with local.file() as file:
        assert file is not None
        descriptor = file.descriptor
    del local, file
    gc.collect()
    assert not list(tmp_path.iterdir())
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


DROPPED = """
import sys
from ditforge.client import Client
Client(sys.argv[1]).generate("x", seed=0, steps=1, width=256, height=256)
kept = Client(sys.argv[1])
kept.generate("x", seed=0, steps=1, width=256, height=256)
"""


def test_a_process_that_closes_no_client_leaves_nothing(server: Server) -> None:
    subprocess.run([sys.executable, "-c", DROPPED, server.url], check=True, timeout=120)
    assert not list(clients_folder(server).iterdir())


def test_no_more_files_wait_than_are_of_use(tmp_path: Path) -> None:
    local = LocalTensors(tmp_path)
    with contextlib.ExitStack() as calls:
        for _ in range(3 * MOST_IDLE):
            calls.enter_context(local.file())
    assert len(list(tmp_path.iterdir())) == MOST_IDLE


def test_a_file_that_somebody_cut_short(server: Server, expected: list[np.ndarray]) -> None:
    """The tensors are sent then."""
    with Client(server.url) as client:
        client.generate(PROMPT, seed=1, steps=1, width=256, height=256)
        for path in clients_folder(server).iterdir():
            os.truncate(path, 0)
        picture = client.generate(PROMPT, seed=1, steps=3, width=256, height=256)
    assert np.array_equal(np.asarray(picture), expected[0])
