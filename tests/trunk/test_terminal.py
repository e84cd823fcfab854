"""Progress bars: what a terminal shows, and what is left where there is none."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from typing import Any

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


def test_bytes_their_speed_and_the_time_left() -> None:
    shown = on_a_terminal(BYTES, until=b"1.0/3.0 GB")
    assert re.search(r"export dit .*1\.0/3\.0 GB +(\? +|\S+ .B/s +)\S*:", shown)
    assert re.search(r"export done ━+ 3\.0/3\.0 GB .*\d:\d\d:\d\d", shown)
    assert shown.index("measure done") < shown.index("export ")  # one bar after the other


def test_without_a_terminal_there_is_a_line_for_each_bar() -> None:
    measure, export = elsewhere(BYTES)
    assert re.fullmatch(r"measure done ━+ 1/1 0:00:00", measure)
    assert re.fullmatch(r"export done ━+ 3\.0/3\.0 GB .* 0:00:0\d", export)


BEGINS = """
import sys
from ditforge import terminal
with terminal.progress("build", begins="building engines") as report:
    if len(sys.argv) == 1:
        report("dit", 0, 2)
        report("done", 2, 2)
        report("dit", 0, 2)
        report("done", 2, 2)
"""


def test_without_a_terminal_there_is_a_line_when_something_begins() -> None:
    """At once, and only once; on a terminal, the bar says so."""
    begins, one, other = elsewhere(BEGINS)
    assert begins == "building engines"
    assert one.startswith("build done") and other.startswith("build done")
    assert elsewhere(BEGINS.replace("== 1", "== 2")) == []  # nothing is built
    assert "building engines" not in on_a_terminal(BEGINS)


def test_steps_and_where_they_ended() -> None:
    assert re.search(r"build dit .*2/5 0:00:0\d", on_a_terminal(FAILED))
    (line,) = elsewhere(FAILED)
    assert re.match(r"build dit .*2/5 0:00:0\d", line)
