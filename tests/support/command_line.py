"""The command line as a user runs it, in a process of its own, and what is asked of its errors."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from tritonclient.grpc import InferenceServerClient

from ditforge import cli

PATIENCE = 900  # seconds after which a program counts as stuck, on a machine however slow and busy
# Steps that a loop may still make before it notices that it was ended: it must be given the CPU for that.
FEW = 50
COMMAND = [sys.executable, "-m", "ditforge"]
# A shell has its background jobs ignore Ctrl-C, and what they start inherits that. A preexec_fn would fork with gRPC's
# threads, which then complain in the child's standard error.
HEED_INTERRUPTS = ["env", "--default-signal=INT"]
BAR = re.compile(r"^\[[a-z]+\] ")  # a line of progress


@dataclass(frozen=True)
class Result:
    """Exit code, and what was printed."""

    code: int
    out: str
    err: str


def ditforge(*args: str | Path, cwd: Path, timeout: float = PATIENCE) -> Result:
    """Run `ditforge ARGS` in the folder `cwd`."""
    done = subprocess.run([*COMMAND, *map(str, args)], cwd=cwd, capture_output=True, text=True, timeout=timeout)
    return Result(done.returncode, done.stdout, done.stderr)


def popen(*args: str | Path, cwd: Path) -> subprocess.Popen[str]:
    """Start `ditforge ARGS` in the folder `cwd`, heeding Ctrl-C even where the tests run in a shell's background."""
    return subprocess.Popen(
        [*HEED_INTERRUPTS, *COMMAND, *map(str, args)],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_here(arguments: Sequence[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Result:
    """Run `ditforge ARGUMENTS` in this process, which has imported PyTorch already; it must end by SystemExit."""
    monkeypatch.setattr(sys, "argv", ["ditforge", *arguments])
    handler = signal.getsignal(signal.SIGTERM)
    capfd.readouterr()
    try:
        with warnings.catch_warnings(), pytest.raises(SystemExit) as ended:
            cli.main()
    finally:
        signal.signal(signal.SIGTERM, handler)
    printed = capfd.readouterr()
    code = ended.value.code or 0  # sys.exit(None) is how Python reports success
    assert isinstance(code, int)
    return Result(code, printed.out, printed.err)


def assert_error(result: Result, *mentions: str | Path, code: int = 2) -> None:
    """One error and one way out, in a few lines, without a traceback, that mention what they should."""
    said = [line for line in result.err.splitlines() if line.strip() and not BAR.search(line)]
    assert result.code == code, result.err
    assert "Traceback" not in result.err
    assert result.out == ""
    assert 1 <= len(said) <= 3, result.err
    assert said[0].startswith("error: "), result.err
    assert sum(line.startswith("fix:   ") for line in said) == 1, result.err
    for mention in mentions:
        assert str(mention) in result.err


def tree(folder: Path) -> dict[str, int]:
    """Every path below `folder`, hidden ones too, with its time of change."""
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} | {
        f"{path.relative_to(folder)}/": 0 for path in folder.rglob("*") if path.is_dir()
    }


def eventually(condition: Callable[[], object], seconds: float = PATIENCE) -> None:
    """Wait until `condition` holds; fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.02)


def calls(url: str, model: str = "dit") -> int:
    """How many requests for the model the server at `url` has counted: it counts one shortly after answering it."""
    with InferenceServerClient(url) as client:
        return client.get_inference_statistics(model).model_stats[0].inference_stats.success.count


def settled_calls(url: str, model: str = "dit") -> int:
    """How many requests for the model the server at `url`, which nobody asks for more, has answered."""
    count, since = calls(url, model), time.monotonic()
    while time.monotonic() < since + 1:
        time.sleep(0.05)
        if (now := calls(url, model)) != count:
            count, since = now, time.monotonic()
    return count
