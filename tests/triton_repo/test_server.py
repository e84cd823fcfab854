"""A real tritonserver on small repositories of Python models: its start, its end, and what it leaves behind."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from python_models import ADD_ONE, SLEEP, infer, write_models
from tritonclient.grpc import InferenceServerClient
from tritonclient.utils import InferenceServerException

import ditforge
from ditforge.errors import DitforgeError, UserError
from ditforge.triton_repo import installation, server, tritonserver
from ditforge.triton_repo.server import start
from ditforge.triton_repo.tritonserver import PREFIX, SHM

BROKEN = ADD_ONE + '    def initialize(self, args):\n        raise ValueError("no plan for sm_00")\n'
WHERE = """
import json, os, sys
import numpy, ditforge, ditforge.triton_repo.server, tritonclient, elsewhere
import triton_python_backend_utils as pb_utils
class TritonPythonModel:
    def execute(self, requests):
        text = json.dumps([ditforge.__file__, ditforge.triton_repo.server.__file__, numpy.__file__, elsewhere.__file__])
        y = numpy.frombuffer(text.encode(), numpy.uint8).astype(numpy.float32)
        return [pb_utils.InferenceResponse([pb_utils.Tensor("y", y)]) for _ in requests]
"""


@pytest.fixture
def repository(tmp_path: Path) -> Callable[..., Path]:
    """Writes a repository of Python models, given as NAME=SOURCE: x FP32 [-1] in, y FP32 [-1] out."""
    return lambda folder="repo", **models: write_models(tmp_path / folder, **models)


@pytest.fixture(autouse=True)
def nothing_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Fails a test of whose servers shared memory or processes remain; logs go where pytest removes them.

    Gives the process ids of the servers that the test started.
    """
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    started: list[int] = []
    make = server.Server.__init__

    def noted(self: server.Server, *args: Any) -> None:
        make(self, *args)
        started.append(self.pid)

    monkeypatch.setattr(server.Server, "__init__", noted)
    yield started
    for pid in started:
        assert own_entries(pid) == []
        assert eventually(lambda pid=pid: not processes_of(pid))  # one that was killed takes a moment to die


def own_entries(owner: int) -> list[str]:
    """What a server has in shared memory."""
    return [path.name for path in SHM.glob(f"{PREFIX}*-{owner}-*")]


def processes_of(owner: int) -> list[int]:
    """A server, its Triton and the models' processes; all of them name the server's folder, or are the server."""
    return [pid for pid in processes() if command(pid) and (pid == owner or f"-{owner}-".encode() in command(pid))]


def processes() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def command(pid: int) -> bytes:
    """The command line; empty for one that ended, reaped or not."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def eventually(condition: Callable[[], object], seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_serves_and_leaves_nothing(repository: Callable[..., Path], tmp_path: Path) -> None:
    log = tmp_path / "logs" / "triton.log"
    cache = ("--cache-config=local,size=1048576",)
    with start(repository("a repo; of models", add=ADD_ONE), port=0, log=log, extra_args=cache) as running:
        np.testing.assert_array_equal(infer(running.url, "add", 1, 2), [2, 3])
        large = np.zeros(5 << 20, np.float32)  # 20 MiB: more shared memory than a model starts with
        np.testing.assert_array_equal(infer(running.url, "add", *large), large + 1)
        assert running.url == f"127.0.0.1:{running.ports.grpc}"
        assert len(processes_of(running.pid)) == 3  # the front, tritonserver and the model's process
        assert len(own_entries(running.pid)) == 2  # the folder of links and the model's shared memory
    running.stop()
    assert running.wait() == 0
    assert processes_of(running.pid) == []
    assert "successfully loaded 'add'" in log.read_text()


def test_models_import_what_this_process_imports(
    repository: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "elsewhere.py").touch()
    (tmp_path / "cwd" / "numpy").mkdir(parents=True)
    (tmp_path / "cwd" / "numpy" / "__init__.py").write_text("raise ImportError('of the working directory')")
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setenv("PYTHONPATH", "../path")
    with start(repository(where=WHERE), port=0) as running:
        files = bytes(infer(running.url, "where", 0).astype(np.uint8)).decode()
    wanted = [ditforge.__file__, server.__file__, np.__file__, str(tmp_path / "path" / "elsewhere.py")]
    assert json.loads(files) == wanted


def test_two_servers_at_once(repository: Callable[..., Path]) -> None:
    repo = repository(add=ADD_ONE)
    with ThreadPoolExecutor() as pool:  # whose threads end before the servers do
        servers = list(pool.map(lambda _: start(repo, port=0), range(2)))
    with servers[0], servers[1]:
        servers[0].stop()
        assert infer(servers[1].url, "add", 1) == [2]


@pytest.mark.parametrize("option", ["port", "http_port", "metrics_port"])
def test_port_in_use(repository: Callable[..., Path], option: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(UserError, match=rf"^{option}={port} is in use(.|\n)*{option}=0 (.|\n)*ss -ltnp"):
            start(repository(add=ADD_ONE), **{"port": 0, option: port})  # type: ignore[arg-type]


@pytest.mark.parametrize(("option", "words"), [("port", "cannot listen on"), ("metrics_port", "cannot listen on")])
def test_port_taken_in_between(
    repository: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, option: str, words: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        monkeypatch.setattr(server, "claim", lambda host, number, name: number)
        with pytest.raises(UserError, match=f"{words} 127.0.0.1, port {port}"):
            start(repository(add=ADD_ONE), **{"port": 0, option: port})  # type: ignore[arg-type]


def test_the_port_answers_while_the_models_load(repository: Callable[..., Path]) -> None:
    """It is not ready; a load balancer is told, and clients are told to come again."""
    slow = ADD_ONE + "    def initialize(self, args):\n        import time; time.sleep(4)\n"
    port = server.claim("127.0.0.1", 0, "port")
    with ThreadPoolExecutor() as pool:
        starting = pool.submit(start, repository(slow=slow), port=port)
        with InferenceServerClient(f"127.0.0.1:{port}") as client:

            def lives() -> bool:
                with contextlib.suppress(InferenceServerException):
                    return client.is_server_live(client_timeout=1)
                return False

            assert eventually(lives)
            assert not client.is_server_ready() and not client.is_model_ready("slow")
            with pytest.raises(InferenceServerException, match=r"UNAVAILABLE.*the models are starting"):
                infer(f"127.0.0.1:{port}", "slow", 1)
            with starting.result():
                assert client.is_server_ready()
                assert infer(f"127.0.0.1:{port}", "slow", 1) == [2]


@pytest.mark.parametrize(("host", "port"), [("no.such.host.invalid", 0), ("192.0.2.1", 0), ("127.0.0.1", 70000)])
def test_address_that_cannot_be(repository: Callable[..., Path], host: str, port: int) -> None:
    with pytest.raises(UserError, match=rf"({host}.*)?{port}"):
        start(repository(add=ADD_ONE), host=host, port=port, insecure=True)


@pytest.mark.parametrize("host", ["a b", "a\tb", "a\0b", "ä" * 80, "\u202ea"])
def test_a_host_that_is_no_name(repository: Callable[..., Path], host: str) -> None:
    with pytest.raises(UserError, match=r"cannot listen on '(.|\n)*fix: +an IPv4 address of this machine"):
        start(repository(add=ADD_ONE), host=host, port=0, insecure=True)


@pytest.mark.parametrize(
    ("most", "problem"), [(8, "at a time"), (100, "a server needs 144 open files, and may have 100")]
)
def test_too_few_open_files(repository: Callable[..., Path], most: int, problem: str) -> None:
    served = ["ditforge", "serve", str(repository(add=ADD_ONE)), "--port", "0"]
    done = subprocess.run(
        ["prlimit", f"--nofile={most}", sys.executable, "-m", *served], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert re.fullmatch(rf"error: .*{problem}.*\nfix:   ulimit -n .*\n", done.stderr)


def test_broken_model(repository: Callable[..., Path], tmp_path: Path) -> None:
    log = tmp_path / "triton.log"
    with pytest.raises(DitforgeError) as raised:
        start(repository(add=ADD_ONE, broken=BROKEN), port=0, log=log)
    assert not isinstance(raised.value, UserError)
    assert "failed to load 'broken' version 1: Internal: ValueError: no plan for sm_00" in raised.value.problem
    assert "broken/1/model.py(" in raised.value.problem
    assert not any(line.startswith("|") for line in raised.value.problem.splitlines())
    assert str(log) in raised.value.fix


def test_not_ready_in_time(repository: Callable[..., Path]) -> None:
    slow = ADD_ONE + "    def initialize(self, args):\n        import time; time.sleep(60)\n"
    with pytest.raises(DitforgeError, match="not ready after 3 s"):
        start(repository(slow=slow), port=0, timeout=3)


def test_repository_without_models(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not a folder\nfix: +ditforge repo"):
        start(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"holds no model .*\nfix: +ditforge repo"):
        start(tmp_path)


def test_log_that_cannot_be_written(repository: Callable[..., Path], tmp_path: Path) -> None:
    repo = repository(add=ADD_ONE)
    with pytest.raises(UserError, match="cannot write the log"):
        start(repo, port=0, log=tmp_path)
    with pytest.raises(UserError, match="cannot write the log /dev/full: No space left on device"):
        start(repo, port=0, log=Path("/dev/full"))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"timeout": 0}, "timeout must be above 0 and up to 604800 seconds, got 0"),
        ({"grace": -1}, "grace must be from 0 to 604800 seconds, got -1"),
        ({"host": ""}, "host must be an IPv4 address or name of this machine, got ''"),
    ],
)
def test_options_that_cannot_be(repository: Callable[..., Path], options: dict[str, Any], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        start(repository(add=ADD_ONE), **options)


def test_stop_lets_a_request_finish(repository: Callable[..., Path]) -> None:
    running = start(repository(sleep=SLEEP), port=0)
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(infer, running.url, "sleep", 2)
        time.sleep(0.5)
        running.stop()
        assert running.wait() == 0
        assert answer.result() == [3]


def test_stop_kills_what_outlasts_the_grace(repository: Callable[..., Path]) -> None:
    running = start(repository(sleep=SLEEP), port=0)
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(infer, running.url, "sleep", 60)
        time.sleep(0.5)
        begun = time.monotonic()
        running.stop(grace=1)
        assert time.monotonic() < begun + 15, "60 s would be as long as the request takes"
        assert running.wait() == 0
        assert "UNAVAILABLE" in str(answer.exception())


def test_wait_returns_when_the_server_dies(repository: Callable[..., Path]) -> None:
    with start(repository(add=ADD_ONE), port=0) as running:
        threading.Timer(0.2, os.kill, (running.pid, signal.SIGKILL)).start()
        assert running.wait() == -signal.SIGKILL
        assert eventually(lambda: not processes_of(running.pid))


def test_ends_where_ditforge_is_replaced_meanwhile(
    repository: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is imported any more when the server ends."""
    running = start(repository(add=ADD_ONE), port=0)
    with monkeypatch.context() as replaced:
        replaced.setitem(sys.modules, "ditforge.triton_repo.tritonserver", None)
        running.stop()
    assert running.wait() == 0


def test_whatever_fails_beside_the_server_ends_it(
    repository: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails() -> None:
        raise RuntimeError("out of threads")

    monkeypatch.setattr(tritonserver, "sweep", fails)
    running = start(repository(add=ADD_ONE), port=0)
    running.stop()
    with pytest.raises(DitforgeError, match=r"the server was lost: RuntimeError: out of threads(.|\n)*log"):
        running.wait()


@pytest.mark.parametrize("victim", ["owner", "server"])
def test_ends_with_whoever_is_killed(repository: Callable[..., Path], victim: str) -> None:
    """Even while a request is answered that would keep a drain from ending. The next server sweeps up."""
    repo = repository(sleep=SLEEP)
    program = """
import sys, time
from pathlib import Path
from ditforge.triton_repo.server import start
running = start(Path(sys.argv[1]), port=0)
print(running.pid, running.url, flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", program, str(repo)], stdout=subprocess.PIPE, text=True) as owner:
        try:
            assert owner.stdout is not None
            line = owner.stdout.readline().split()
            pid, url = int(line[0]), line[1]
            with ThreadPoolExecutor() as pool:
                answer = pool.submit(infer, url, "sleep", 60)
                time.sleep(0.5)
                assert len(processes_of(pid)) == 3
                os.kill(pid if victim == "server" else owner.pid, signal.SIGKILL)
                assert eventually(lambda: not processes_of(pid))
                assert answer.exception() is not None
        finally:
            owner.kill()
    start(repo, port=0).stop()
    assert own_entries(pid) == []


def test_a_model_that_does_not_see_the_end_is_ended(repository: Callable[..., Path]) -> None:
    """A model's process that waits for its Triton, which was killed, waits for ever; a stopped one does the same."""
    running = start(repository(add=ADD_ONE), port=0)
    (model,) = [pid for pid in processes_of(running.pid) if b"/model.py" in command(pid)]
    os.kill(model, signal.SIGSTOP)
    os.kill(running.pid, signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL
    assert eventually(lambda: not processes_of(running.pid))


def test_sweeps_only_what_has_no_owner(repository: Callable[..., Path]) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    here = os.stat("/proc/self/ns/pid").st_ino  # elsewhere, in a container, the same process id may be in use
    owners = (f"{here}-{dead.pid}", f"{here}-{os.getpid()}", f"1-{dead.pid}")
    left, mine, foreign = paths = [SHM / f"{PREFIX}{owner}-a_region" for owner in owners]
    try:
        for path in paths:
            path.touch()
        with pytest.raises(DitforgeError, match="failed to load 'broken'"):  # even a start that fails
            start(repository(broken=BROKEN), port=0)
        assert (left.exists(), mine.exists(), foreign.exists()) == (False, True, True)
    finally:
        for path in paths:
            path.unlink(missing_ok=True)


def test_tritonserver_on_path_comes_first(
    repository: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    binary = tmp_path / "opt" / "bin" / "tritonserver"
    binary.parent.mkdir(parents=True)
    binary.write_text('#!/bin/sh\necho "here with $*"\nexit 3\n')
    binary.chmod(0o755)
    monkeypatch.setenv("PATH", str(binary.parent), prepend=os.pathsep)
    repo = repository(add=ADD_ONE)
    with pytest.raises(DitforgeError, match=f"exit code 3\nhere with .*--model-repository={repo}"):
        start(repo, port=0)
    stub = tmp_path / "opt" / "backends" / "python" / installation.STUB
    stub.parent.mkdir(parents=True)
    stub.write_bytes(b"\x7fELF\0libpython3.99.so.1.0\0")
    with pytest.raises(UserError, match=r"Python 3\.99"):
        start(repo, port=0)


def test_no_triton(repository: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    repo = repository(add=ADD_ONE)
    monkeypatch.setenv("PATH", "")
    with monkeypatch.context() as hidden:
        hidden.setitem(sys.modules, "pytriton", None)
        with pytest.raises(UserError, match=r"no Triton(.|\n)* install .*\[serve\]'?"):
            start(repo, port=0)
    with monkeypatch.context() as newer:
        newer.setattr(sysconfig, "get_python_version", lambda: "3.99")
        with pytest.raises(UserError, match=r"in Python 3\..*, 3\.13; this is Python 3\.99"):
            start(repo, port=0)
