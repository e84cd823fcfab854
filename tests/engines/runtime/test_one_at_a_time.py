"""On-demand engines of several processes: one at a time, and a killed one holds up nobody."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest

HOLD = """
import sys, time
from ditforge.engines.runtime.one_at_a_time import turn
print("asks", flush=True)
with turn():
    print("in", time.monotonic(), flush=True)
    time.sleep(float(sys.argv[1]))
    print("out", time.monotonic(), flush=True)
"""


def hold(seconds: float, **environment: str) -> subprocess.Popen[str]:
    """A process that takes its turn, for so long."""
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, str(seconds)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


def wait_until(said: str, process: subprocess.Popen[str]) -> None:
    """Until the process says so: that it asks for its turn, or is in."""
    assert process.stdout is not None
    while not (line := process.stdout.readline()).startswith(said):
        assert line, f"it ended without having said {said}"


@pytest.fixture(autouse=True)
def own_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests have on-demand engines too."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))


def times(process: subprocess.Popen[str]) -> tuple[float, float]:
    """When it came in and went out."""
    assert process.stdout is not None
    begin, end = (float(line.split()[1]) for line in process.stdout.read().splitlines() if line != "asks")
    process.communicate()
    return begin, end


def test_one_at_a_time() -> None:
    spans = sorted(times(process) for process in [hold(0.3) for _ in range(3)])
    assert all(end <= begin for (_, end), (begin, _) in pairwise(spans))


def test_servers_with_gpus_of_their_own_do_not_wait_for_each_other() -> None:
    first = hold(600, CUDA_VISIBLE_DEVICES="0")
    try:
        wait_until("in", first)
        begin, _ = times(hold(0, CUDA_VISIBLE_DEVICES="1"))
        assert first.poll() is None
        assert begin <= time.monotonic()
    finally:
        first.kill()
        first.communicate()


def test_a_killed_process_gives_its_turn_up() -> None:
    first = hold(600)
    wait_until("in", first)
    second = hold(0)
    wait_until("asks", second)
    time.sleep(0.5)  # for what it would do if it did not wait
    assert second.poll() is None, "it did not wait"
    first.kill()
    times(second)
    first.communicate()
