"""`ditforge serve` told to end while a picture is made, which then is not finished: it says so, and why."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import numpy as np
import psutil
import pytest
from command_line import PATIENCE, eventually, popen
from hostile import request, stub
from python_models import SLEEP, below, write_models

REQUEST = request("slow", {"x": np.full(1, 60, np.float32)})  # takes a minute


@dataclass
class Served:
    """A server at work on a picture, and the processes that it consists of."""

    running: subprocess.Popen[str]
    service: psutil.Process = field(init=False)

    def __post_init__(self) -> None:
        (self.service,) = psutil.Process(self.running.pid).children()

    def child(self, name: str) -> psutil.Process:
        """The process of that name below the service."""
        (found,) = below(self.service.pid, name)
        return found

    def says(self, words: str) -> None:
        """Wait until it says that."""
        assert self.running.stdout is not None
        while words not in (line := self.running.stdout.readline()):
            assert line


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    begun = tmp_path / "begun"
    slow = SLEEP.replace("import time;", f"import time; open({str(begun)!r}, 'w');")
    repository = write_models(tmp_path / "repo", slow=slow)
    running = popen("serve", repository, "--port", "0", "--log", "log", cwd=tmp_path)
    assert running.stdout is not None
    url = running.stdout.readline().split(" at ")[1].split()[0]

    def ask() -> None:
        with pytest.raises(grpc.RpcError):
            stub(url).ModelInfer(REQUEST, metadata=[("ditforge-picture", "one")], timeout=PATIENCE)

    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask)
        eventually(begun.exists)
        yield Served(running)
        running.kill()
        asked.result()


@pytest.mark.parametrize(
    ("then", "problem"),
    [
        (lambda served: served.running.send_signal(signal.SIGTERM), "the server was told to stop at once"),
        (lambda served: served.running.send_signal(signal.SIGINT), "the server was told to stop at once"),
        (lambda served: served.child("tritonserver").kill(), "tritonserver has died: it was ended by SIGKILL"),
        (
            lambda served: served.child("triton_python").kill(),
            "the model slow has died: it was ended by SIGKILL",
        ),
        (
            lambda served: served.service.kill(),
            "was killed (SIGKILL, perhaps for want of memory) while it was stopping",
        ),
    ],
)
def test_why_a_picture_was_not_finished(served: Served, then: Callable[[Served], None], problem: str) -> None:
    served.running.send_signal(signal.SIGTERM)
    served.says("stopping: 1 unfinished picture gets up to 30 s")
    then(served)
    out, err = served.running.communicate(timeout=PATIENCE)
    assert problem in err
    assert (served.running.returncode, out) == (1, "")
