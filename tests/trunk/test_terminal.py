"""Progress bars: what a terminal shows, and what is left where there is none."""

from __future__ import annotations

import os
import pty
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ditforge import terminal

BYTES = """
import sys
from ditforge import terminal
with terminal.progress("export", unit="bytes") as report, terminal.progress("measure") as measured:
    measured("prompt", 0, 4)
    measured("done", 1, 1)
    report("t5", 0, 3_000_000_000)
    report("t5", 3_000_000_000, 3_000_000_000)
    report("dit", 1_000_000_000, 3_000_000_000)
    sys.stdin.readline()
    report("done", 3_000_000_000, 3_000_000_000)
"""
FAILED = """
from ditforge import terminal
with terminal.progress("build") as report:
    report("dit", 2, 5)
    raise SystemExit(3)
"""
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")


def on_a_terminal(program: str, until: bytes = b"") -> str:
    """What the program writes to a terminal of 100 columns, without control sequences.

    It can read a line as soon as it has shown `until`.
    """
    mine, its = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    options: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": its, "stderr": its, "env": environment}
    with subprocess.Popen([sys.executable, "-c", program], **options) as running:
        assert running.stdin is not None
        os.close(its)
        written = b""
        while True:
            try:
                written += os.read(mine, 1 << 16)
            except OSError:  # which is how a terminal's other end says that it was closed
                break
            if until in written and not running.stdin.closed:
                running.stdin.close()
    os.close(mine)
    assert b"\x1b[" in written
    return CONTROL.sub("", written.decode())


def elsewhere(program: str) -> list[str]:
    """The lines that the program writes to a pipe."""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert done.stdout == ""
    return done.stderr.splitlines()


def test_bytes_and_no_time_left_before_it_is_known() -> None:
    shown = on_a_terminal(BYTES, until=b"1.0 of 3.0 GB")
    assert re.search(r"export dit .*1\.0 of 3\.0 GB, 0 s", shown)
    assert re.search(r"export done ━+ 3\.0 of 3\.0 GB, \d s", shown)
    assert "left" not in shown
    assert shown.index("measure done") < shown.index("export ")  # one bar after the other


def test_without_a_terminal_there_is_a_line_in_the_end() -> None:
    measure, export = elsewhere(BYTES)
    assert re.fullmatch(r"\[measure\] done: 1 of 1, 0 s", measure)
    assert re.fullmatch(r"\[export\] done: 3\.0 of 3\.0 GB, \d s", export)


OFTEN = """
import time
from ditforge import terminal
terminal.EVERY = 0.5
with terminal.progress("calibrate", unit="equal steps") as report:
    for step in range(200):
        report("a cat", step, 200)
        time.sleep(0.01)
"""


def test_without_a_terminal_lines_are_few() -> None:
    *lines, last = elsewhere(OFTEN)
    assert 2 <= len(lines) <= 20
    assert all(re.match(r"\[calibrate\] a cat: \d+ of 200, ", line) for line in lines)
    assert last.startswith("[calibrate] a cat: 199 of 200")


BEGINS = """
import sys
from ditforge import terminal
with terminal.progress("build", begins="engines for sm_89") as report:
    if len(sys.argv) == 1:
        report("dit", 0, 2)
        report("done", 2, 2)
        report("dit", 0, 2)
        report("done", 2, 2)
"""


def test_a_line_when_something_begins() -> None:
    """At once, and only once."""
    begins, one, other = elsewhere(BEGINS)
    assert begins == "[build] engines for sm_89"
    assert one.startswith("[build] done") and other.startswith("[build] done")
    assert elsewhere(BEGINS.replace("== 1", "== 2")) == []  # nothing is built
    assert on_a_terminal(BEGINS).count("[build] engines for sm_89") == 1


def test_steps_and_where_they_ended() -> None:
    assert re.search(r"build dit .*2 of 5, 0 s", on_a_terminal(FAILED))
    (line,) = elsewhere(FAILED)
    assert re.fullmatch(r"\[build\] dit: 2 of 5, 0 s", line)


WAITING = """
import time
from ditforge import terminal
terminal.SILENCE = 0.2
with terminal.waiting("export", "importing PyTorch"):
    time.sleep({seconds})
"""


def test_what_takes_long_without_telling_how_far_it_is() -> None:
    assert elsewhere(WAITING.format(seconds=0)) == []
    assert elsewhere(WAITING.format(seconds=1)) == ["[export] importing PyTorch"]
    assert "export importing PyTorch" in on_a_terminal(WAITING.format(seconds=0.5))


QUIET = "from ditforge import verbosity; verbosity.choose(verbose=False, quiet=True)\n"


def test_quiet() -> None:
    for program in (BYTES, BEGINS, WAITING.format(seconds=1)):
        assert elsewhere(QUIET + program) == []


def test_brackets_in_a_table_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.table(("name", "shape"), [("a [red] circle", "[batch, 16]"), ("[/x]", "[1]")])
    assert capsys.readouterr().out.split() == ["name", "shape", "a", "[red]", "circle", "[batch,", "16]", "[/x]", "[1]"]


def test_short_cells_stay_whole_and_programs_get_unwrapped_rows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [("on-demand", "19.3 GB", " ".join(["words"] * 40)) for _ in range(3)]
    monkeypatch.setenv("COLUMNS", "60")
    terminal.table(("strategy", "takes", "why"), rows)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and all(rows[0][2] in line for line in lines[1:])
    monkeypatch.setenv("FORCE_COLOR", "1")  # what makes rich take any output for a terminal
    terminal.table(("strategy", "takes", "why"), rows)
    shown = capsys.readouterr().out
    assert shown.count("on-demand  19.3 GB") == 3 and max(map(len, shown.splitlines()[1:])) <= 60


@pytest.mark.parametrize(
    ("command", "closed", "code"),
    [("doctor", "1", 0), ("inspect nothing", "2", 2), ("inspect", "0 2", 2), ("gpus --json", "0 1 2", 0)],
)
def test_streams_that_are_closed(command: str, closed: str, code: int, tmp_path: Path) -> None:
    """What belongs on standard error is not on standard output; and a command ends as it would otherwise."""
    closing = " ".join(f"{number}>&-" for number in closed.split())
    program = f"{shlex.quote(sys.executable)} -m ditforge {command} {closing}"
    done = subprocess.run(["sh", "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("command", ["--help", "--version", "", "build --help", "gpus"])
def test_results_that_cannot_be_written(command: str, tmp_path: Path) -> None:
    program = f"{shlex.quote(sys.executable)} -m ditforge {command} > /dev/full"
    done = subprocess.run(["sh", "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: cannot write to standard output: ") and "Traceback" not in done.stderr


@pytest.mark.parametrize(("command", "code"), [("inspect nothing", 2), ("gpus --nothing", 2), ("gpus", 0)])
def test_a_full_disk_behind_standard_error_stops_nothing(command: str, code: int, tmp_path: Path) -> None:
    program = f"{shlex.quote(sys.executable)} -m ditforge {command} 2> /dev/full"
    done = subprocess.run(["sh", "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, bool(done.stdout)) == (code, code == 0)


def test_progress_goes_on_without_standard_error() -> None:
    with open("/dev/full", "w") as full:
        stream = terminal.Unfailing(full)
        for _ in range(3):
            assert stream.write("a line\n" * 4000) == 7 * 4000
            stream.flush()
