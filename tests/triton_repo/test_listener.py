"""The gRPC port: what strangers write there that is no gRPC, and that it is opened again where gRPC fails."""

from __future__ import annotations

import asyncio
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import http2
import pytest
from command_line import COMMAND
from hypothesis import HealthCheck, given, settings, strategies as st
from python_models import ADD_ONE, below, infer, write_models

from ditforge.triton_repo.front import Front
from ditforge.triton_repo.listener import Listener
from ditforge.triton_repo.metrics import LISTENER, Metrics
from ditforge.triton_repo.serve_options import make_options
from ditforge.triton_repo.served import read_models
from ditforge.triton_repo.server import Server, start


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("listener") / "repo", add=ADD_ONE)


@pytest.fixture(scope="module")
def events() -> list[str]:
    """What the server tells, of which there is another one where a worker gets tests of this file once more."""
    return []


@pytest.fixture(scope="module")
def server(repository: Path, events: list[str]) -> Iterator[Server]:
    with start(repository, events.append, port=0) as server:
        yield server
    assert server.wait() == 0


@pytest.fixture(autouse=True)
def nothing_happens(server: Server, events: list[str]) -> Iterator[None]:
    """To the server, which answers as before."""
    yield
    assert infer(server.url, "add", 1) == 2
    assert events == []


@pytest.mark.parametrize("name", [*http2.CALL, b"authorization", b"grpc-timeout", b"grpc-encoding", b"x-bin", b"x"])
@pytest.mark.parametrize("value", [b"/\xff", b"", b"\0", b"/\xed\xa0\x80/x", b"9" * 5000])
def test_a_header_that_is_no_text(server: Server, name: bytes, value: bytes) -> None:
    http2.call(server.url, http2.CALL | {name: value})


NAMES = st.sampled_from([*http2.CALL, b"authorization", b"grpc-timeout", b"ditforge-picture"]) | st.binary(max_size=20)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.dictionaries(NAMES, st.binary(max_size=300), max_size=20), st.sets(st.sampled_from(sorted(http2.CALL))))
def test_headers_of_any_bytes(server: Server, headers: dict[bytes, bytes], left_out: set[bytes]) -> None:
    usual = {name: value for name, value in http2.CALL.items() if name not in left_out}
    http2.call(server.url, usual | headers)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.sampled_from([b"", http2.PREFACE, b"GET / HTTP/1.1\r\n", b"\x16\x03\x01"]), st.binary(max_size=2000))
def test_bytes_that_are_no_http2(server: Server, begin: bytes, rest: bytes) -> None:
    host, port = server.url.split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(begin + rest)


def test_the_log_grows_only_so_fast(server: Server) -> None:
    before = server.log.stat().st_size
    for _ in range(300):
        http2.call(server.url, http2.CALL | {b"x": b"\xff" * 7000})
    assert server.log.stat().st_size < before + 200_000  # it grew by 8 MB, for 2 MB that were sent


def test_connections_leave_room_to_start_triton_again(repository: Path, tmp_path: Path) -> None:
    command = ["prlimit", "--nofile=200", *COMMAND, "serve", repository, "--port", "0", "--log", "log"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as running, ExitStack() as stack:
        stack.callback(running.kill)
        assert running.stdout is not None
        url = running.stdout.readline().split(" at ")[1].split()[0]
        port = int(url.split(":")[1])
        for _ in range(400):
            stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))
        below(running.pid, "tritonserver")[0].kill()
        assert "starting again" in running.stdout.readline()
        assert running.stdout.readline() == "ready again\n"
        stack.close()


def test_the_port_is_opened_again(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where grpc.aio's own loop fails, its server is over; no request is known that does this to the one installed."""
    monkeypatch.setattr("ditforge.triton_repo.listener.AGAIN", 0)
    models, _ = read_models(repository)
    reported: list[str] = []

    async def fail_and_go_on() -> None:
        front = Front(models, "", None, Metrics(models), tmp_path)
        listener = Listener(front, make_options(repository, {"port": 0}))
        port, first = await listener.start(), listener.server

        async def fails() -> None:
            raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")

        monkeypatch.setattr(first, "wait_for_termination", fails)
        keeping = asyncio.create_task(listener.keep(lambda event, message: reported.append(message)))
        while listener.server is first or listener.port != port:
            await asyncio.sleep(0.01)
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                break
            except ConnectionRefusedError:
                await asyncio.sleep(0.01)
        writer.close()
        assert not keeping.done()
        assert front.metrics.restarts.labels(LISTENER)._value.get() == 1
        await listener.stop()
        await keeping

    asyncio.run(asyncio.wait_for(fail_and_go_on(), 60))
    assert len(reported) == 1
    assert "UnicodeDecodeError" in reported[0]
