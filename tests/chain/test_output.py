"""What is printed where nobody reads it, the disk is full, or the terminal knows not all characters."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from command_line import COMMAND, HEED_INTERRUPTS, PATIENCE, eventually
from python_models import ADD_ONE, below, write_models

from ditforge.triton_repo.server import Server

STUB = "triton_python"  # the name of a model's process


@contextmanager
def served(stdout: int, cwd: Path) -> Iterator[subprocess.Popen[str]]:
    """`ditforge serve`, that prints to `stdout`; the server is ready."""
    write_models(cwd / "repo", add=ADD_ONE)
    command = [*HEED_INTERRUPTS, *COMMAND, "serve", "repo", "--port", "0", "--log", "log", "--metrics-port", "0"]
    running = subprocess.Popen(command, cwd=cwd, stdout=stdout, stderr=subprocess.PIPE, text=True)
    try:
        eventually(lambda: running.poll() is not None or below(running.pid, STUB))
        yield running
    finally:
        running.kill()


def test_a_server_whose_output_nobody_reads(tmp_path: Path) -> None:
    """As in `ditforge serve repo | head -1`: it goes on, and ends when it is told to."""
    reader, writer = os.pipe()
    with served(writer, tmp_path) as running:
        os.close(writer)
        with os.fdopen(reader) as lines:
            assert lines.readline().startswith("serving repo at")
        before = below(running.pid, STUB)[0]
        before.kill()
        eventually(lambda: set(below(running.pid, STUB)) - {before})
        running.send_signal(signal.SIGTERM)
        _, err = running.communicate(timeout=PATIENCE)
    assert (running.returncode, err) == (0, "")
    assert "was ended by SIGKILL" in (tmp_path / "log").read_text()


def test_a_server_whose_output_is_full(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full, served(full.fileno(), tmp_path) as running:
        running.send_signal(signal.SIGTERM)
        _, err = running.communicate(timeout=PATIENCE)
    assert err == ""
    assert running.returncode in (0, 143)  # it may not have been ready yet


def test_pictures_are_kept_though_their_names_cannot_be_printed(schnell_server: Server, tmp_path: Path) -> None:
    made = ("generate", "a", "--url", schnell_server.url, "--count", "3", "--steps", "1", "--out", "a.png")
    with open("/dev/full", "w") as full:
        ended = subprocess.run([*COMMAND, *made], cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 2
    assert "error: cannot write to standard output: No space left on device\nfix:   " in ended.stderr
    assert "Traceback" not in ended.stderr
    assert sorted(os.listdir(tmp_path)) == ["a-0.png", "a-1.png", "a-2.png"]


@pytest.mark.parametrize("command", ["gpus", "doctor"])
def test_results_that_cannot_be_printed(command: str) -> None:
    with open("/dev/full", "w") as full:
        ended = subprocess.run([*COMMAND, command], stdout=full, stderr=subprocess.PIPE, text=True)
    problem, fix = ended.stderr.splitlines()
    assert (ended.returncode, problem) == (2, "error: cannot write to standard output: No space left on device")
    assert fix.startswith("fix:   ")


def test_a_pipe_that_nobody_reads() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    ended = subprocess.run([*COMMAND, "gpus"], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (1, "")


def test_a_terminal_that_knows_not_all_characters(schnell_server: Server, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    made = ("generate", "ü", "--url", schnell_server.url, "--steps", "1", "--out", "ü.png")

    def run(*args: str) -> subprocess.CompletedProcess[str]:
        pipes = {"capture_output": True, "text": True}
        return subprocess.run([*COMMAND, *args], cwd=tmp_path, env=environment, check=True, **pipes)  # type: ignore[call-overload]

    assert run(*made).stdout == "\\xfc.png\n"
    assert "prompt" in run("inspect", "ü.png").stdout


def test_names_that_are_no_text(tmp_path: Path) -> None:
    repository = os.fsencode(write_models(tmp_path / "repo", add=ADD_ONE))
    odd = repository + b"-\xe4"
    os.rename(repository, odd)
    ended = subprocess.run([*COMMAND, b"serve", odd, b"--port", b"0"], capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: REPO_DIR is ")
    assert "which is not text in UTF-8\nfix:   rename it" in ended.stderr
    assert len(ended.stderr.splitlines()) == 2
