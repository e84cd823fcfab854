"""A process that dies is noticed and comes back, and what is short while serving costs one request: the real server."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import grpc
import numpy as np
import psutil
import pytest
from command_line import eventually, popen, tree
from hostile import dit_inputs, output, prompt, request, said, stub
from python_models import ADD_ONE, SLEEP, engine_process, infer, model_processes, tritonserver, write_models
from tritonclient.grpc import InferenceServerClient
from tritonclient.utils import InferenceServerException

from ditforge.client import Client
from ditforge.engines.runtime import rendezvous
from ditforge.errors import DitforgeError
from ditforge.triton_repo import server as starting
from ditforge.triton_repo.config import ENGINES_VARIABLE
from ditforge.triton_repo.serve_options import make_options
from ditforge.triton_repo.server import Server, start
from ditforge.triton_repo.tritonserver import EARLY, needs_gpu, prepare, remove

GOOD = request("dit", dit_inputs())
NOTICED = 2.0  # seconds within which a death shows in the readiness


@pytest.fixture(scope="module")
def events() -> list[str]:
    """What the server tells people."""
    return []


@pytest.fixture(scope="module")
def server(tiny, events: list[str]) -> Iterator[Server]:
    """The disk of its log is full by the time that it begins."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        full = Path("/dev/full").open("ab")  # noqa: SIM115 - start() closes it
        monkeypatch.setattr(starting, "appended", lambda file, line: full)
        server = start(tiny.repository, events.append, port=0, metrics_port=0)
    with server:
        yield server


def is_ready(server: Server, model: str = "dit") -> bool:
    with InferenceServerClient(server.url) as client:
        try:
            return client.is_server_ready(client_timeout=5) and client.is_model_ready(model, client_timeout=5)
        except InferenceServerException:
            return False


def metrics(server: Server) -> dict[str, float]:
    """The metrics' values by name and labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{server.ports.metrics}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}


@pytest.mark.parametrize(
    ("victim", "number"),
    [("dit", signal.SIGKILL), ("tokenizer", signal.SIGSEGV), ("vae_decoder", signal.SIGABRT), ("", signal.SIGKILL)],
)
def test_a_process_that_dies_comes_back(server: Server, events: list[str], victim: str, number: signal.Signals) -> None:
    """In the middle of a picture. It is told, counted, and shows in the readiness; the picture is the same again."""
    expected = output(stub(server.url).ModelInfer(GOOD, timeout=60))
    before, told = metrics(server), len(events)
    process = model_processes(server)[victim] if victim else tritonserver(server)
    with ThreadPoolExecutor(1) as pool:
        busy = pool.submit(lambda: [stub(server.url).ModelInfer(GOOD, timeout=60) for _ in range(1000)])
        time.sleep(0.3)
        process.send_signal(number)
        begun = time.monotonic()
        eventually(lambda: not is_ready(server), NOTICED)
        assert time.monotonic() - begun < NOTICED
        error = busy.exception(30)
        assert isinstance(error, grpc.RpcError)
        said(error, "UNAVAILABLE")  # which tells clients to try again
    eventually(lambda: is_ready(server), 60)
    assert output(stub(server.url).ModelInfer(GOOD, timeout=60)) == expected
    name = f"the process of the model {victim}" if victim else "tritonserver"
    assert re.match(rf"{name} has died: it was ended by {number.name}\b.*; starting again", events[told])
    eventually(lambda: len(events) > told + 1)
    assert events[told + 1] == "ready again"
    counter = f'ditforge_restarts_total{{process="{victim or "tritonserver"}"}}'
    assert metrics(server)[counter] == before[counter] + 1
    assert metrics(server)["ditforge_ready"] == 1


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_an_engine_process_that_dies_comes_back(server: Server, events: list[str], number: signal.Signals) -> None:
    """In the middle of a picture; all of its models notice, and one of them starts another one, without Triton."""
    expected = output(stub(server.url).ModelInfer(GOOD, timeout=60))
    text = output(stub(server.url).ModelInfer(request("text_encoders", prompt(b"a red circle")), timeout=60))
    before, told, triton, first = metrics(server), len(events), tritonserver(server).pid, engine_process(server)
    slow = request("dit", {name: np.repeat(array, 8, 0) for name, array in dit_inputs(64, 64).items()})
    with ThreadPoolExecutor(1) as pool:
        busy = pool.submit(lambda: [stub(server.url).ModelInfer(slow, timeout=60) for _ in range(100)])
        time.sleep(0.5)
        first.send_signal(number)
        error = busy.exception(30)
        assert isinstance(error, grpc.RpcError)
        said(error, "UNAVAILABLE")  # which tells clients to try again
    assert output(stub(server.url).ModelInfer(GOOD, timeout=60)) == expected
    assert output(stub(server.url).ModelInfer(request("text_encoders", prompt(b"a red circle")), timeout=60)) == text
    assert (tritonserver(server).pid, is_ready(server)) == (triton, True)
    second = engine_process(server)
    assert second != first
    eventually(lambda: not first.is_running() or first.status() == psutil.STATUS_ZOMBIE)
    eventually(lambda: len(events) > told)
    assert re.match("the engine process has died: it (was )?ended.*; it was started again", events[told])
    counter = 'ditforge_restarts_total{process="engines"}'
    assert metrics(server)[counter] == before.get(counter, 0) + 1
    assert len([p for p in psutil.process_iter() if is_engine_process(p, server)]) == 1


def is_engine_process(process: psutil.Process, server: Server) -> bool:
    """Whether it is a server's engine process, of which there is one."""
    try:
        return f"-{server.pid}-" in (line := " ".join(process.cmdline())) and "ditforge.engines.runtime" in line
    except psutil.Error:
        return False


def test_text_that_is_encoded_while_the_engine_process_dies(server: Server) -> None:
    """A text encoder cannot answer with an error, so it asks again by itself."""
    asked = request("text_encoders", prompt(b"a red circle"))
    expected = output(stub(server.url).ModelInfer(asked, timeout=60))
    with ThreadPoolExecutor(1) as pool:
        busy = pool.submit(lambda: {output(stub(server.url).ModelInfer(asked, timeout=60)) for _ in range(100)})
        time.sleep(0.2)
        engine_process(server).kill()
        assert busy.result(120) == {expected}


def test_the_engine_process_is_started_beside_triton(tiny) -> None:
    """It imports what it needs while Triton starts, and is not started by a model that is loaded."""
    with start(tiny.repository, port=0) as other:
        starter = engine_process(other).parent()
        assert starter is not None and EARLY in starter.cmdline()
        assert os.getpgid(starter.pid) == tritonserver(other).pid  # so it ends with Triton, whatever becomes of it


def test_only_the_engine_process_sees_gpus(server: Server) -> None:
    """Triton would set CUDA up for itself, which takes memory that the plan does not count."""
    assert tritonserver(server).environ()["CUDA_VISIBLE_DEVICES"] == ""
    engines = engine_process(server).environ()
    assert engines.get("CUDA_VISIBLE_DEVICES") == os.environ.get("CUDA_VISIBLE_DEVICES")
    assert rendezvous.HIDDEN not in engines


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("kind: KIND_CPU", "kind: KIND_GPU"),
        ("kind: KIND_CPU", ""),
        ('backend: "python"', 'backend: "tensorrt"'),
        ("{", "no configuration"),
    ],
)
def test_a_model_that_triton_runs_by_itself_may_have_a_gpu(tiny, tmp_path: Path, before: str, after: str) -> None:
    repository = shutil.copytree(tiny.repository, tmp_path / "repository")
    assert not needs_gpu(repository)
    config = repository / "dit" / "config.pbtxt"
    assert before in config.read_text()
    config.write_text(config.read_text().replace(before, after, 1))
    assert needs_gpu(repository)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_tritonserver_without_ditforge_serve(tiny, tmp_path: Path, number: signal.Signals) -> None:
    """Its models start an engine process by themselves, which ends with it."""
    folder = Path(tempfile.mkdtemp(dir="/dev/shm", prefix="ditforge-test-"))
    command, env = prepare(make_options(tiny.repository, {}), folder, "key")
    del env[ENGINES_VARIABLE]
    with (tmp_path / "log").open("wb") as log:
        running = subprocess.Popen(command, env=env, cwd="/", stdout=log, stderr=log)
    try:
        url = f"unix://{folder}/grpc:1"
        eventually(lambda: running.poll() is not None or answered(url), 120)
        assert answered(url), (tmp_path / "log").read_text()
        place = rendezvous.folder_of(running.pid)
        process = psutil.Process(int((place / "pid").read_text()))
        models = psutil.Process(running.pid).children()
        running.send_signal(number)
        running.wait(60)
        process.wait(60)
        for model in models:  # a busy one can wait for its Triton for ever
            with suppress(psutil.NoSuchProcess):
                model.kill()
    finally:
        running.kill()
        running.wait()
        remove(folder)  # and the memory of its models
    rendezvous.sweep()
    assert not place.exists()


def answered(url: str) -> bool:
    """Whether a server answers a good request."""
    with suppress(grpc.RpcError):
        return bool(stub(url).ModelInfer(GOOD, timeout=60))
    return False


def test_a_model_that_is_stopped_is_started_again(server: Server, events: list[str]) -> None:
    """Its process lives, and Triton says for ever that it is not healthy."""
    told = len(events)
    model_processes(server)["dit"].send_signal(signal.SIGSTOP)
    with pytest.raises(grpc.RpcError) as caught:
        stub(server.url).ModelInfer(GOOD, timeout=60)
    said(caught.value, "UNAVAILABLE")
    eventually(lambda: len(events) > told + 1)
    assert re.match(r"the process of the model dit does not answer any more; starting again\b", events[told])
    assert events[told + 1 :] == ["ready again"]
    assert stub(server.url).ModelInfer(GOOD, timeout=60)


def test_a_triton_that_is_stopped_is_started_again(server: Server, events: list[str]) -> None:
    told = len(events)
    tritonserver(server).send_signal(signal.SIGSTOP)
    eventually(lambda: not is_ready(server))
    with InferenceServerClient(server.url) as client:
        assert client.is_server_live()
    eventually(lambda: len(events) > told + 1)
    assert re.fullmatch(r"tritonserver did not answer for 30 s; starting again( in .* s)?", events[told])
    assert stub(server.url).ModelInfer(GOOD, timeout=60)


def test_metrics_are_tritons_too(server: Server) -> None:
    stub(server.url).ModelInfer(GOOD, timeout=60)
    found = metrics(server)
    assert found['ditforge_requests_total{model="dit",status="OK"}'] >= 1
    assert found['ditforge_request_seconds_count{model="dit"}'] >= 1
    assert any(name.startswith("nv_inference_request_success") for name in found)


def test_a_model_that_dies_again_and_again(tmp_path: Path) -> None:
    """The server ends with an error instead of spinning."""
    dying = ADD_ONE + "    def initialize(self, args):\n        import os, threading\n"
    dying += "        threading.Timer(1.5, os._exit, [7]).start()\n"
    events: list[str] = []
    running = start(write_models(tmp_path / "repo", dying=dying), events.append, port=0)
    with pytest.raises(DitforgeError, match="6th death in a row, and it is not started again") as caught:
        running.wait()
    assert "the process of the model dying has died: it ended with exit code 7" in caught.value.problem
    waits = [re.search(r"starting again(?: in (\S+) s)?", event) for event in events if "died" in event]
    assert [float(found[1] or 0) for found in waits if found] == [0, 0.5, 1, 2, 4]


def test_a_process_that_dies_while_it_is_loaded(tmp_path: Path) -> None:
    """At the second start: Triton, which starts a model's process anew, would wait for it for ever."""
    slow = ADD_ONE + "    def initialize(self, args):\n        import time; time.sleep(3)\n"
    events: list[str] = []
    with start(write_models(tmp_path / "repo", slow=slow), events.append, port=0) as running:
        first = model_processes(running)["slow"]
        first.kill()
        eventually(lambda: model_processes(running).get("slow", first).pid != first.pid)
        model_processes(running)["slow"].kill()
        eventually(lambda: answers(running.url, "slow"), 60)
    # Triton notices some such deaths itself, and ends.
    assert re.search(r"tritonserver (lost the process of (a|the) model|was not ready)", "".join(events))


def test_it_stops_at_once_while_it_is_starting_again(tmp_path: Path) -> None:
    slow = SLEEP + "    def initialize(self, args):\n        import time; time.sleep(2)\n"
    running = start(write_models(tmp_path / "repo", slow=slow), port=0)
    model_processes(running)["slow"].kill()
    time.sleep(0.5)
    begun = time.monotonic()
    running.stop()
    assert time.monotonic() < begun + 10
    assert running.wait() == 0


def test_a_dead_model_does_not_delay_the_end(tiny) -> None:
    """A model that dies while the server drains: it took Triton 32 s to give up."""
    running = start(tiny.repository, port=0, grace=60)
    with ThreadPoolExecutor(2) as pool:
        pool.submit(lambda: [stub(running.url).ModelInfer(GOOD, timeout=60) for _ in range(10_000)])
        time.sleep(0.3)
        stopping = pool.submit(running.stop)
        time.sleep(0.3)
        begun = time.monotonic()
        model_processes(running)["dit"].kill()
        stopping.result(15)
    assert time.monotonic() < begun + 10


# The end


def test_pictures_in_the_middle_are_finished(tiny) -> None:
    """And no others are begun; those that are refused can be made elsewhere."""
    running = start(tiny.repository, port=0)
    with Client(running.url) as client:
        expected = client.generate("a large red circle", seed=0, steps=8)
        stopping: list = []
        refusals: list[str] = []

        def in_the_middle(step) -> None:
            if step.index == 3:
                stopping.append(pool.submit(running.stop))
                eventually(lambda: not is_ready(running))
                with pytest.raises(grpc.RpcError) as caught:
                    stub(running.url).ModelInfer(GOOD, timeout=10, metadata=[("ditforge-picture", "another")])
                refusals.append(said(caught.value, "UNAVAILABLE"))

        with ThreadPoolExecutor(1) as pool:
            image = client.generate("a large red circle", seed=0, steps=8, callback=in_the_middle)
            stopping[0].result(60)
    assert np.array_equal(np.asarray(image), np.asarray(expected))
    assert refusals == ["this server is stopping and begins no more pictures"]
    assert running.wait() == 0


def test_serve_writes_nothing_into_the_repository(tiny, tmp_path: Path) -> None:
    """It can be mounted read-only; told on the terminal is what a user needs."""
    shutil.copytree(tiny.repository, tmp_path / "repo")
    before = tree(tmp_path / "repo")
    with popen("serve", "repo", "--port", "0", cwd=tmp_path) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            found = re.search(r"serving repo at (\S+) \(gRPC\), log (\S+)", line)
            assert found, line
            with Client(found[1]) as client:
                client.generate("a", seed=0, steps=2)
        finally:
            process.send_signal(signal.SIGTERM)
            rest = process.communicate(timeout=60)
    assert process.returncode == 0, rest
    assert tree(tmp_path / "repo") == before


# What can be short


def opened(server: Server, count: int) -> ExitStack:
    """That many connections which send nothing."""
    stack = ExitStack()
    for _ in range(count):
        stack.enter_context(socket.create_connection(("127.0.0.1", server.ports.grpc), timeout=5))
    return stack


def limit(process: psutil.Process, resource: str, value: int) -> None:
    """Change the soft limit of a running process."""
    subprocess.run(["prlimit", f"--pid={process.pid}", f"--{resource}={value}:"], check=True)


def test_no_more_file_descriptors(server: Server) -> None:
    front = psutil.Process(server.pid)
    used, before = front.num_fds(), front.rlimit(psutil.RLIMIT_NOFILE)[0]
    limit(front, "nofile", used + 20)
    try:
        for process in (tritonserver(server), engine_process(server), *model_processes(server).values()):
            limit(process, "nofile", process.num_fds() + 2)
        with opened(server, 60):
            time.sleep(0.5)
            # A channel that shares no connection with those of tests before.
            with (
                grpc.insecure_channel(server.url, [("grpc.use_local_subchannel_pool", 1)]) as alone,
                pytest.raises(grpc.RpcError),
            ):
                alone.unary_unary("/inference.GRPCInferenceService/ModelInfer")(GOOD.SerializeToString(), timeout=3)
        eventually(lambda: front.num_fds() < used + 20)
        with Client(server.url) as client:
            client.generate("a", seed=0, steps=2)
    finally:
        limit(front, "nofile", before)


def test_no_file_descriptors_to_start_triton_again(tmp_path: Path) -> None:
    """It is tried again, as after a death."""
    events: list[str] = []
    with start(write_models(tmp_path / "repo", add=ADD_ONE), events.append, port=0) as running:
        service = psutil.Process(running.pid)
        before = service.rlimit(psutil.RLIMIT_NOFILE)[0]
        limit(service, "nofile", 4)
        tritonserver(running).kill()
        eventually(lambda: any("tritonserver was lost: Too many open files" in event for event in events))
        limit(service, "nofile", before)
        eventually(lambda: answers(running.url, "add"))


def test_no_more_memory(server: Server) -> None:
    """The engine cannot have what a large picture takes: that request fails, the next good one is served."""
    expected = output(stub(server.url).ModelInfer(GOOD, timeout=60))
    process = engine_process(server)
    limit(process, "as", process.memory_info().vms + (16 << 20))
    large = {name: np.repeat(array, 8, 0) for name, array in dit_inputs(64, 64).items()}
    with pytest.raises(grpc.RpcError) as caught:
        stub(server.url).ModelInfer(request("dit", large), timeout=60)
    said(caught.value, "INTERNAL", "UNAVAILABLE")
    eventually(lambda: is_ready(server), 60)  # where the process did not survive it, another took its place
    assert output(stub(server.url).ModelInfer(GOOD, timeout=60)) == expected


def can_mount() -> bool:
    """Whether this user may have a /dev/shm of its own."""
    return subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode == 0


@pytest.mark.skipif(not can_mount(), reason="unshare(1) needs to be root, or user namespaces")
def test_too_little_shared_memory(tmp_path: Path) -> None:
    """/dev/shm of a container is 64 MiB by default; here 24, of which a model takes 8 from the start."""
    program = """
import sys
from pathlib import Path
from ditforge.triton_repo.server import start
running = start(Path(sys.argv[1]), port=0)
print(running.url, running.pid, flush=True)
sys.stdin.read()
running.stop()
"""
    repository = write_models(tmp_path / "repo", add=ADD_ONE)
    mount = 'mount -t tmpfs -o size=24m tmpfs /dev/shm && exec "$@"'
    command = ["unshare", "--mount", "sh", "-c", mount, "sh", sys.executable, "-c", program, str(repository)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, text=True, env=os.environ | {"TMPDIR": str(tmp_path)}) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().split()[0]
            small, large = [1.0, 2.0], np.zeros(8 << 20, np.float32)
            np.testing.assert_array_equal(infer(url, "add", *small), [2, 3])
            with pytest.raises(InferenceServerException) as caught:
                infer(url, "add", *large)
            assert "the server's /dev/shm is too small for this request" in str(caught.value)
            eventually(lambda: answers(url, "add"), 60)
        finally:
            process.communicate("", timeout=60)


def answers(url: str, model: str) -> bool:
    """Whether a model that adds one does so."""
    try:
        return list(infer(url, model, 1, 2)) == [2, 3]
    except InferenceServerException:
        return False
