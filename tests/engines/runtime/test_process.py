"""The engine process with clients of its own: what they share, what they do to each other, and what is left of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from itertools import pairwise
from pathlib import Path

import numpy as np
import psutil
import pytest
from command_line import eventually

from ditforge import manifest
from ditforge.engines.runtime import early, rendezvous
from ditforge.engines.runtime.connection import EngineFailed, ProcessLost, RemoteEngine
from ditforge.errors import UserError
from ditforge.manifest import Engine
from ditforge.placement import Placement

# A compiler whose engines do what the number in a request says, and tell when they began and ended.
COMPILER = """
import os, signal, time
import numpy as np
from ditforge.engines.compilers import Compiler
class Obedient:
    inputs, outputs = ["x"], ["y", "when"]
    def run_batch(self, parts):
        begun = time.monotonic()
        x = np.concatenate([part["x"] for part in parts])
        if (x == 13).any():
            raise RuntimeError("thirteen")
        if (x == 14).any():
            raise MemoryError
        if (x == 15).any():
            os.kill(os.getpid(), signal.SIGKILL)
        if (x == 16).any():
            import ctypes
            ctypes.string_at(0)
        time.sleep(max(float(x.max()) - 100, 0))
        return {"y": x + 1, "when": np.array([[begun, time.monotonic()]] * len(x))}
    def warm_up(self):
        pass
    def close(self):
        pass
def load(files, target, version):
    dies = files[0].with_name("dies")
    if dies.exists():
        dies.unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    return Obedient()
def prepare(target):
    with open(os.environ["PREPARED"], "a") as file:
        file.write(target)
COMPILER = Compiler(
    "obedient", {"cpu": ["fp32"]}, version=lambda: "1", compile=lambda job: [], load=load, prepare=prepare
)
"""
MADE = Engine(compiler="obedient", compiler_version="1", target="cpu", cache_key={})
CLIENT = """
import sys, time
from pathlib import Path
import numpy as np
from ditforge import manifest
from ditforge.engines.runtime.connection import RemoteEngine
from ditforge.manifest import Engine
folder, place = Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None
files = {"x.engine": manifest.describe(folder / "x.engine")}
made = Engine(compiler="obedient", compiler_version="1", target="cpu", cache_key={})
engine = RemoteEngine(folder, files, made, print, place)
print(engine.place, (engine.place / "pid").read_text(), flush=True)
for line in sys.stdin:
    print(engine.run({"x": np.full((1, 1), float(line), np.float32)})["y"][0, 0], flush=True)
"""

Connect = Callable[[], RemoteEngine]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an engine, whose compiler the processes that are started know."""
    package = tmp_path / "site" / "obedient-1.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: obedient\nVersion: 1\n")
    (package / "entry_points.txt").write_text("[ditforge.compilers]\nobedient = obedient_compiler:COMPILER\n")
    (tmp_path / "site" / "obedient_compiler.py").write_text(COMPILER)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "site"), os.environ["PYTHONPATH"]]))
    monkeypatch.setenv("PREPARED", str(tmp_path / "prepared"))
    (tmp_path / "x.engine").write_bytes(b"engine")
    return tmp_path


@pytest.fixture
def place() -> Iterator[Path]:
    """Where the clients of a test meet their process; nothing is left there, nor of the process."""
    found = rendezvous.SHM / f"ditforge-test-{os.getpid()}-{threading.get_native_id()}"
    yield found
    eventually(lambda: not processes(found), 20)
    eventually(lambda: not found.exists(), 5)


@pytest.fixture
def connect(folder: Path, place: Path) -> Iterator[Connect]:
    """Makes clients that are closed at the end."""
    files = {"x.engine": manifest.describe(folder / "x.engine")}
    with ExitStack() as stack:

        def made() -> RemoteEngine:
            engine = RemoteEngine(folder, files, MADE, lambda line: None, place)
            stack.callback(engine.close)
            return engine

        yield made


def processes(place: Path) -> list[psutil.Process]:
    """The engine processes that live and whose clients meet there."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if {str(place), rendezvous.MODULE} <= {*process.cmdline()} and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def x(*values: float) -> dict[str, np.ndarray]:
    return {"x": np.array(values, np.float32)[:, None]}


def test_clients_share_a_process_and_take_turns(connect: Connect, place: Path) -> None:
    with ThreadPoolExecutor(6) as pool:
        engines = list(pool.map(lambda _: connect(), range(6)))
        assert len(processes(place)) == 1
        answers = list(pool.map(lambda engine: [engine.run(x(100.05)) for _ in range(3)], engines))
        spans = [tuple(engine.run(x(100.05))["when"][0]) for engine in engines]
    assert engines[0].inputs == ["x"] and engines[0].outputs == ["y", "when"]
    assert answers and all(end <= begin for (_, end), (begin, _) in pairwise(sorted(spans)))


def test_a_batch_and_large_tensors(connect: Connect) -> None:
    """Which need more memory than there was; earlier outputs stay as they are when memory is replaced."""
    engine = connect()
    small = engine.run_batch([x(1, 2), x(3)])["y"]
    np.testing.assert_array_equal(small[:, 0], [2, 3, 4])
    draw = np.random.default_rng(0).standard_normal
    for size in (10, 1 << 20, 3 << 20, 7):
        numbers = draw((size, 1)).astype(np.float32)
        np.testing.assert_array_equal(engine.run({"x": numbers})["y"], numbers + 1)
    every_other = draw((100, 2)).astype(np.float32)[:, :1]
    np.testing.assert_array_equal(engine.run({"x": every_other})["y"], every_other + 1)


@pytest.mark.parametrize("known", [True, False], ids=["prepared", "of a compiler that is not there"])
def test_a_process_that_is_started_early(connect: Connect, folder: Path, place: Path, known: bool) -> None:
    """Clients meet the one that is there already. Whoever started it goes with the server."""
    with subprocess.Popen(["sleep", "100"]) as server:
        kinds = json.dumps([["obedient" if known else "unknown", "cpu"]])
        command = [sys.executable, "-m", early.__name__, str(place), kinds, str(server.pid)]
        with subprocess.Popen(command) as starter:
            eventually(lambda: processes(place), 20)
            (first,) = processes(place)
            if known:
                eventually(lambda: (folder / "prepared").is_file(), 20)
            engine = connect()
            assert engine.run(x(1))["y"][0, 0] == 2
            assert processes(place) == [first]
            assert starter.poll() is None
            server.kill()
            assert starter.wait(20) == 0
        first.wait(20)
    assert not known or (folder / "prepared").read_text() == "cpu"


def test_what_is_in_shared_memory_is_not_copied(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    """As tensors are that Triton hands over; its memory grows, and is not aligned."""
    import mmap

    engine = connect()
    file = rendezvous.SHM / f"ditforge-test-tensors-{os.getpid()}"
    with file.open("w+b") as opened:
        try:
            for size, offset in ((1 << 20, 1), (3 << 20, 7), (3 << 20, 1 << 20)):
                opened.truncate(size)
                numbers = np.ndarray((1 << 17, 1), np.float32, mmap.mmap(opened.fileno(), size), offset)
                numbers[...] = -np.arange(len(numbers))[:, None]
                assert engine.mapped is not None and engine.mapped.find(numbers) is not None
                np.testing.assert_array_equal(engine.run({"x": numbers})["y"], numbers + 1)
        finally:
            file.unlink()
    np.testing.assert_array_equal(engine.run({"x": numbers})["y"], numbers + 1)  # of a file that is gone


def test_shared_memory_that_grows_between_the_requests_of_a_batch(connect: Connect) -> None:
    """The first one's tensor is where it was, in memory that the second one's has outgrown."""
    import mmap

    engine = connect()
    file = rendezvous.SHM / f"ditforge-test-tensors-{os.getpid()}"
    with file.open("w+b") as opened:
        try:
            arrays = []
            for size in (1 << 20, 2 << 20, 4 << 20):
                opened.truncate(size)
                arrays.append(np.ndarray((1 << 17, 1), np.float32, mmap.mmap(opened.fileno(), size), size // 2))
                arrays[-1][...] = len(arrays)
                both = engine.run_batch([{"x": array} for array in (arrays[0], arrays[-1])])["y"]
                np.testing.assert_array_equal(both[:: 1 << 17, 0], [2, len(arrays) + 1])
        finally:
            file.unlink()


@pytest.mark.parametrize(("number", "kind"), [(13, "RuntimeError"), (14, "MemoryError")])
def test_a_call_that_fails_is_that_call_s_error_alone(connect: Connect, place: Path, number: int, kind: str) -> None:
    engine, other = connect(), connect()
    (process,) = processes(place)
    with pytest.raises(EngineFailed) as caught:
        engine.run(x(number))
    assert caught.value.kind == kind
    assert [one.run(x(1))["y"][0, 0] for one in (engine, other)] == [2, 2]
    assert processes(place) == [process]


@pytest.mark.parametrize("number", [15, 16], ids=["SIGKILL", "SIGSEGV"])
def test_an_engine_that_ends_the_process(connect: Connect, place: Path, number: int) -> None:
    """Calls that were under way fail, in a way that tells to repeat them. There is one new process, for all."""
    engines = [connect() for _ in range(6)]
    (first,) = processes(place)
    with ThreadPoolExecutor(6) as pool:
        waiting = [pool.submit(engine.run, x(100.3)) for engine in engines[1:]]
        time.sleep(0.1)
        with pytest.raises(ProcessLost):
            engines[0].run(x(number))
        for one in waiting:
            assert one.exception() is None or isinstance(one.exception(), ProcessLost)
        first.wait(10)
        assert [one["y"][0, 0] for one in pool.map(lambda engine: engine.run(x(1)), engines)] == [2] * 6
    assert len(processes(place)) == 1


def test_a_process_that_is_killed_while_nobody_asks(connect: Connect, place: Path) -> None:
    """Its engines are loaded again before somebody does, and no call fails."""
    engines = [connect() for _ in range(3)]
    (first,) = processes(place)
    first.kill()
    eventually(lambda: processes(place) not in ([], [first]), 20)
    assert [engine.run(x(1))["y"][0, 0] for engine in engines] == [2, 2, 2]
    assert len(processes(place)) == 1


def test_a_process_that_is_killed_while_it_loads(connect: Connect, folder: Path, place: Path) -> None:
    """Six clients lose it, and meet in the next one."""
    for _ in range(5):
        (folder / "dies").touch()
        with ThreadPoolExecutor(6) as pool:
            engines = list(pool.map(lambda _: connect(), range(6)))
        assert not (folder / "dies").exists()
        assert [engine.run(x(1))["y"][0, 0] for engine in engines] == [2] * 6
        for engine in engines:
            engine.close()
        eventually(lambda: not processes(place), 20)


def test_an_engine_s_file_is_cut_short_meanwhile(connect: Connect, place: Path, folder: Path) -> None:
    """That is an error for each request, until the file is whole again."""
    engine = connect()
    (first,) = processes(place)
    (folder / "x.engine").write_bytes(b"eng")
    first.kill()
    first.wait(10)
    for _ in range(2):
        with pytest.raises(UserError, match=r"x\.engine"):
            engine.run(x(1))
    (folder / "x.engine").write_bytes(b"engine")
    assert engine.run(x(1))["y"][0, 0] == 2


def test_engines_that_cannot_be_loaded(folder: Path, place: Path) -> None:
    files = {"x.engine": manifest.describe(folder / "x.engine")}
    streamed = MADE.model_copy(update={"placement": Placement(weight_budget=1)})
    for made, problem in ((MADE.model_copy(update={"compiler": "absent"}), "absent"), (streamed, "stream")):
        with pytest.raises(UserError, match=problem):
            RemoteEngine(folder, files, made, print, place)


def client(folder: Path, place: Path) -> subprocess.Popen[str]:
    """A client in a process of its own."""
    return popen([sys.executable, "-c", CLIENT, str(folder), str(place)])


def popen(command: list[str]) -> subprocess.Popen[str]:
    """A process that is talked to."""
    return subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def told(process: subprocess.Popen[str], line: str = "") -> str:
    """What a process answers to a line."""
    assert process.stdin and process.stdout
    if line:
        process.stdin.write(f"{line}\n")
        process.stdin.flush()
    return process.stdout.readline().strip()


def test_a_client_that_is_killed_in_the_middle_of_a_call(connect: Connect, place: Path, folder: Path) -> None:
    """Though it had started the process. The others are served."""
    with client(folder, place) as dying:
        told(dying)
        other = connect()
        (process,) = processes(place)
        assert dying.stdin
        dying.stdin.write("100.5\n")
        dying.stdin.flush()
        time.sleep(0.2)
        dying.kill()
        assert other.run(x(1))["y"][0, 0] == 2
        assert processes(place) == [process]


def test_clients_come_and_go(place: Path, folder: Path) -> None:
    """Nobody meets a process that is just ending."""
    files = {"x.engine": manifest.describe(folder / "x.engine")}

    def once(_: int) -> float:
        engine = RemoteEngine(folder, files, MADE, print, place)
        try:
            return float(engine.run(x(1))["y"][0, 0])
        finally:
            engine.close()

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(once, range(12))) == [2] * 12


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_it_does_not_outlive_its_server(folder: Path, number: signal.Signals) -> None:
    """Though a client of the server does, in the middle of a call. Where nobody names a folder, it has one."""
    server = "import subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:]])"
    with popen([sys.executable, "-c", server, CLIENT, str(folder)]) as running:
        place, pid = told(running).split()
        assert Path(place).name.startswith(rendezvous.PREFIX) and Path(place).stat().st_mode & 0o077 == 0
        assert running.stdin
        running.stdin.write("160\n")
        running.stdin.flush()
        client_process = psutil.Process(running.pid).children()[0]
        process = psutil.Process(int(pid))
        time.sleep(0.2)
        running.send_signal(number)
        process.wait(10)
        with suppress(psutil.NoSuchProcess):
            client_process.kill()
            client_process.wait(10)
    rendezvous.sweep()
    assert not Path(place).exists()


def test_others_folders_are_refused(place: Path, connect: Connect) -> None:
    place.mkdir(mode=0o755)
    with pytest.raises(Exception, match="only this user can open"):
        connect()
    place.rmdir()


def test_a_folder_that_is_removed_while_it_is_locked_is_made_again(place: Path) -> None:
    """A process that leaves removes the folder at any moment of somebody else's coming."""
    stop = threading.Event()

    def remove() -> None:
        while not stop.is_set():
            rendezvous.leave(place)

    thread = threading.Thread(target=remove)
    thread.start()
    try:
        for _ in range(300):
            with rendezvous.locked(place):
                pass
    finally:
        stop.set()
        thread.join()
        rendezvous.leave(place)
