"""On-demand engines of several processes: one at a time, and a killed one holds up nobody."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

import pytest
from command_line import eventually

# Says when it asks for its turn, when it is in, and when it goes out, which it does when it is told to.
HOLD = """
import sys, time
from ditforge.engines.runtime.one_at_a_time import gpu_lock
print("asks", flush=True)
with gpu_lock():
    print("in", time.monotonic(), flush=True)
    sys.stdin.readline()
    print("out", time.monotonic(), flush=True)
"""


class Process:
    """A process that takes a turn."""

    def __init__(self, **environment: str) -> None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        environment = {**os.environ, **environment}
        self.running = subprocess.Popen([sys.executable, "-c", HOLD], text=True, env=environment, **pipes)  # type: ignore[call-overload]

    def says(self, word: str) -> float:
        """Wait for its next line, which must be that; returns the time in it, if there is one."""
        said, *time = self.running.stdout.readline().split()
        assert said == word
        return float(time[0]) if time else 0.0

    def waits(self) -> bool:
        """Whether it is in a queue for a lock, as the kernel says (proc(5)): its pid stands behind an arrow."""
        locks = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
        return any(fields[1] == "->" and fields[5] == str(self.running.pid) for fields in locks)

    def leave(self) -> None:
        """Tell it to go out, now or as soon as it is in."""
        self.running.stdin.write("\n")
        self.running.stdin.flush()


@pytest.fixture
def processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ExitStack]:
    """Those that are still running at the end are killed. Other tests have on-demand engines too, with other files."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with ExitStack() as stack:
        yield stack


def start(processes: ExitStack, **environment: str) -> Process:
    """A process that asks for its turn."""
    process = Process(**environment)
    processes.callback(process.running.wait)
    processes.callback(process.running.kill)
    process.says("asks")
    return process


def test_one_at_a_time(processes: ExitStack) -> None:
    """All of them want to be in at once; each says for itself when it was."""
    first = start(processes)
    begin = first.says("in")
    others = [start(processes) for _ in range(2)]
    for other in others:
        eventually(other.waits)
    for process in (first, *others):
        process.leave()
    spans = [(begin, first.says("out")), *((other.says("in"), other.says("out")) for other in others)]
    assert all(end <= begin for (_, end), (begin, _) in pairwise(sorted(spans)))


def test_servers_with_gpus_of_their_own_do_not_wait_for_each_other(processes: ExitStack) -> None:
    start(processes, CUDA_VISIBLE_DEVICES="0").says("in")
    second = start(processes, CUDA_VISIBLE_DEVICES="1")
    second.leave()
    eventually(lambda: second.waits() or second.running.poll() is not None)
    assert second.running.poll() == 0


def test_a_killed_process_gives_its_turn_up(processes: ExitStack) -> None:
    first = start(processes)
    first.says("in")
    second = start(processes)
    eventually(second.waits)
    first.running.kill()
    second.says("in")
