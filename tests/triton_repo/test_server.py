"""A real tritonserver on small repositories of Python models: its start, its end, and what it leaves behind."""

import contextlib
import json
import os
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

import numpy as np
import pytest
from google.protobuf import text_format
from tritonclient.grpc import InferenceServerClient, InferInput, model_config_pb2 as pb

import ditforge
from ditforge.errors import DitforgeError, UserError
from ditforge.triton_repo import installation, server
from ditforge.triton_repo.server import SHM, start

ADD_ONE = """
import numpy as np
import triton_python_backend_utils as pb_utils
class TritonPythonModel:
    def execute(self, requests):
        x = [pb_utils.get_input_tensor_by_name(request, "x").as_numpy() for request in requests]
        return [pb_utils.InferenceResponse([pb_utils.Tensor("y", x + np.float32(1))]) for x in x]
"""
SLEEP = ADD_ONE.replace("        return", "        import time; time.sleep(float(x[0][0]))\n        return")
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

    def write(folder: str = "repo", **models: str) -> Path:
        for name, source in models.items():
            config = pb.ModelConfig(name=name, backend="python")
            config.input.add(name="x", data_type=pb.TYPE_FP32, dims=[-1])
            config.output.add(name="y", data_type=pb.TYPE_FP32, dims=[-1])
            config.instance_group.add(kind=pb.ModelInstanceGroup.KIND_CPU)
            model = tmp_path / folder / name / "1" / "model.py"
            model.parent.mkdir(parents=True)
            model.write_text(source)
            (model.parents[1] / "config.pbtxt").write_text(text_format.MessageToString(config))
        return tmp_path / folder

    return write


@pytest.fixture(autouse=True)
def nothing_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fails a test of which shared memory or processes remain; logs go where pytest removes them.

    Servers that other tests share with the whole session may run beside it. Names in shared memory begin differently
    from those of other processes' servers, which would sweep up what a test leaves there on purpose.
    """
    monkeypatch.setattr(server, "PREFIX", f"{server.PREFIX}{os.getpid()}-test-")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    entries, servers = own_entries(os.getpid()), own_processes()
    yield
    assert set(own_entries(os.getpid())) <= set(entries)
    assert eventually(lambda: set(own_processes()) <= set(servers))  # one that was killed takes a moment to die


def own_entries(owner: int) -> list[str]:
    return [path.name for path in SHM.glob(f"{server.PREFIX}*-{owner}-*")]


def own_processes() -> list[int]:
    """Of servers that this process started, and of their models."""
    return [pid for pid in processes() if f"-{os.getpid()}-".encode() in command(pid)]


def processes() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def command(pid: int) -> bytes:
    """The command line; empty for one that ended, reaped or not."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def group(leader: int) -> list[int]:
    """The live processes of a process group."""
    members = []
    for pid in processes():
        with contextlib.suppress(ProcessLookupError):
            if os.getpgid(pid) == leader and command(pid):
                members.append(pid)
    return members


def infer(url: str, model: str, *x: float) -> np.ndarray:
    tensor = InferInput("x", [len(x)], "FP32")
    tensor.set_data_from_numpy(np.array(x, np.float32))
    with InferenceServerClient(url) as client:
        return client.infer(model, [tensor]).as_numpy("y")


def eventually(condition: Callable[[], object], seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_serves_and_leaves_nothing(repository: Callable[..., Path], tmp_path: Path) -> None:
    log = tmp_path / "logs" / "triton.log"
    cache = ["--cache-config=local,size=1048576"]
    before = len(own_entries(os.getpid()))
    with start(repository("a repo; of models", add=ADD_ONE), port=0, log=log, extra_args=cache) as running:
        np.testing.assert_array_equal(infer(running.url, "add", 1, 2), [2, 3])
        large = np.zeros(5 << 20, np.float32)  # 20 MiB: more shared memory than a model starts with
        np.testing.assert_array_equal(infer(running.url, "add", *large), large + 1)
        assert running.url == f"127.0.0.1:{running.ports.grpc}"
        assert len(group(running.pid)) == 2  # tritonserver and the model's process
        assert len(own_entries(os.getpid())) == before + 2  # the folder of links and the model's shared memory
    running.stop()
    assert running.wait() == 0
    assert group(running.pid) == []
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


def test_port_in_use(repository: Callable[..., Path]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(UserError, match=rf"port {port} \(HTTP\) is in use(.|\n)*--port"):
            start(repository(add=ADD_ONE), port=0, http_port=port)


def test_port_taken_while_the_models_load(repository: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        ports = server._claim("127.0.0.1", {"gRPC": 0, "HTTP": 0, "metrics": 0})[1]
        monkeypatch.setattr(server, "_claim", lambda *_: ("127.0.0.1", server.Ports(ports.grpc, port, ports.metrics)))
        with pytest.raises(UserError, match=f"port {port} was taken"):
            start(repository(add=ADD_ONE))


@pytest.mark.parametrize(("host", "port"), [("no.such.host.invalid", 0), ("192.0.2.1", 0), ("127.0.0.1", 70000)])
def test_address_that_cannot_be(repository: Callable[..., Path], host: str, port: int) -> None:
    with pytest.raises(UserError, match=f"{host}.*{port}"):
        start(repository(add=ADD_ONE), host=host, port=port)


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
    with pytest.raises(UserError, match="cannot write the log"):
        start(repository(add=ADD_ONE), port=0, log=tmp_path)


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
        running.stop(grace=1)
        assert running.wait() == -signal.SIGKILL
        assert group(running.pid) == []
        assert answer.exception() is not None


def test_wait_returns_when_the_server_dies(repository: Callable[..., Path]) -> None:
    with start(repository(add=ADD_ONE), port=0) as running:
        threading.Timer(0.2, os.kill, (running.pid, signal.SIGKILL)).start()
        assert running.wait() == -signal.SIGKILL
        assert group(running.pid) == []


def test_ends_with_a_killed_owner(repository: Callable[..., Path]) -> None:
    repo = repository(sleep=SLEEP)
    program = """
import sys, time
from pathlib import Path
from ditforge.triton_repo import server
server.PREFIX = sys.argv[2]
running = server.start(Path(sys.argv[1]), port=0)
print(running.pid, running.url, flush=True)
time.sleep(600)
"""
    command = [sys.executable, "-c", program, str(repo), server.PREFIX]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as owner:
        try:
            assert owner.stdout is not None
            pid, url = owner.stdout.readline().split()
            with ThreadPoolExecutor() as pool:
                answer = pool.submit(infer, url, "sleep", 60)  # even one that would keep a drain from ending
                time.sleep(0.5)
                assert len(group(int(pid))) == 2
                owner.kill()
                assert eventually(lambda: not group(int(pid)))
                assert answer.exception() is not None
        finally:
            owner.kill()
    assert own_entries(owner.pid)
    start(repo, port=0).stop()
    assert own_entries(owner.pid) == []


def test_sweeps_only_what_has_no_owner(repository: Callable[..., Path], tmp_path: Path) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    here = os.stat("/proc/self/ns/pid").st_ino  # elsewhere, in a container, the same process id may be in use
    owners = (f"{here}-{dead.pid}", f"{here}-{os.getpid()}", f"1-{dead.pid}")
    left, mine, foreign = paths = [SHM / f"{server.PREFIX}{owner}-a_region" for owner in owners]
    try:
        for path in paths:
            path.touch()
        with pytest.raises(UserError):  # even a start that fails
            start(repository(add=ADD_ONE), port=0, log=tmp_path)
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
        with pytest.raises(UserError, match=r"no Triton(.|\n)*pip install 'ditforge\[serve\]'"):
            start(repo, port=0)
    with monkeypatch.context() as newer:
        newer.setattr(sysconfig, "get_python_version", lambda: "3.99")
        with pytest.raises(UserError, match=r"in Python 3\..*, 3\.13; this is Python 3\.99"):
            start(repo, port=0)
