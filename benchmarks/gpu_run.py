"""What the parts of gpu_pipeline.py share: the table of results, the time that is left, and commands of ditforge.

Every result is in the file as soon as it is known, so a run that is cut off loses only what it was measuring.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")
GIB = 2**30
GRACE = 20.0  # seconds that a process gets to end after Ctrl-C, before it is killed
LOOK = 0.05  # seconds between two looks at a process
LONGEST = 3000  # characters of an error in the results
ERROR = re.compile(r"^error: ", re.MULTILINE)  # as ditforge's errors begin

Row = dict[str, Any]


class Failed(Exception):
    """A command that failed, or took too long."""


def versions_of(packages: Iterable[str]) -> dict[str, str]:
    """The versions of those packages that are installed."""
    found = {}
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


@dataclass
class Results:
    """The rows, by name, which go to each of `files`; and `deadline`, of time.monotonic, for the whole run."""

    files: tuple[Path, ...]
    deadline: float
    rows: dict[str, Row] = field(default_factory=dict)
    changed: Callable[[dict[str, Row]], object] = lambda rows: None
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def left(self) -> float:
        """The seconds that are left."""
        return self.deadline - time.monotonic()

    def note(self, name: str, **values: Any) -> None:
        """Add to a row, print what was added, and write all rows to the files."""
        with self.lock:
            self.rows.setdefault(name, {}).update(values)
            shown = {key: round(value, 4) if isinstance(value, float) else value for key, value in values.items()}
            print("##", name, json.dumps(shown, default=str), flush=True)
            for file in self.files:
                file.parent.mkdir(parents=True, exist_ok=True)
                partial = file.with_name(f".{file.name}")
                partial.write_text(json.dumps(self.rows, indent=1, default=str) + "\n")
                partial.replace(file)
            self.changed(self.rows)

    def attempted(self, name: str, run: Callable[[], T]) -> T | None:
        """Make a measurement, whose error is its result. After the deadline nothing is begun, and earlier rows stay."""
        if self.left <= 0:
            if name not in self.rows:
                self.note(name, skipped="the time was over")
            return None
        self.rows.pop(name, None)
        try:
            return run()
        except Exception as error:
            traceback.print_exc()
            self.note(name, failed=shortened(" ".join(f"{type(error).__name__}: {error}".split())))
            return None


@dataclass(frozen=True)
class Ran:
    """A command that has ended well: its seconds, the peak of its resident memory in bytes, and what it printed."""

    command: str
    seconds: float
    peak: int
    output: str


def started(command: list[str], log: Path, **options: Any) -> subprocess.Popen[bytes]:
    """Start a process in a group of its own. Standard error is appended to `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as errors:
        return subprocess.Popen(command, stderr=errors, process_group=0, **options)


def end(process: subprocess.Popen[bytes], grace: float = GRACE) -> None:
    """End a process and its group: by SIGINT, and after `grace` seconds by SIGKILL."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # the group has the pid of its first process, which we started
    process.wait()


def line_of(process: subprocess.Popen[bytes], seconds: float) -> str:
    """The next line that a process prints; empty if it has ended. Raises Failed if none comes in time."""
    assert process.stdout is not None
    file, line, until = process.stdout.fileno(), b"", time.monotonic() + seconds
    while not line.endswith(b"\n"):
        if not select.select([file], [], [], max(0.0, until - time.monotonic()))[0]:
            raise Failed(f"no answer within {seconds:.0f} s")
        if not (byte := os.read(file, 1)):
            break
        line += byte
    return line.decode(errors="replace").strip()


def ditforge(arguments: list[str], log: Path, seconds: float) -> Ran:
    """Run a command of ditforge to its end. Raises Failed with the error in its log if it fails or takes too long.

    The peak is that of the largest of its processes, and counts the files in memory that the process has mapped.
    """
    said = log.with_suffix(".out")
    said.parent.mkdir(parents=True, exist_ok=True)
    name = "ditforge " + " ".join(arguments)
    print("$", name, flush=True)
    began = time.perf_counter()
    with said.open("wb") as output:
        process = started([sys.executable, "-m", "ditforge", *arguments], log, stdout=output, stdin=subprocess.DEVNULL)
    try:
        while not (found := os.wait4(process.pid, os.WNOHANG))[0]:
            if time.perf_counter() - began > seconds:
                raise Failed(f"{name} took more than {seconds:.0f} s: {why(log)}")
            time.sleep(LOOK)
        process.returncode = os.waitstatus_to_exitcode(found[1])
    finally:
        end(process)
    took, text = time.perf_counter() - began, said.read_text(errors="replace")
    if process.returncode:
        raise Failed(f"{name} ended with {process.returncode}: {why(log)}")
    return Ran(name, took, found[2].ru_maxrss * 1024, text)


def why(log: Path) -> str:
    """Why a command failed, on one line: the last error in its log, or the log's end if there is none."""
    text = log.read_text(errors="replace") if log.is_file() else ""
    errors = [*ERROR.finditer(text)]
    return shortened(" ".join(text[errors[-1].start() :].split())) if errors else " ".join(text.split())[-LONGEST:]


def shortened(text: str) -> str:
    """A text with its middle left out if it is long: what went wrong is at its beginning, and why often at its end."""
    half = LONGEST // 2
    return text if len(text) <= LONGEST else f"{text[:half]} [...] {text[-half:]}"


def in_memory(folder: Path) -> float:
    """The share of the bytes of the files in a folder that the system has in memory, as mincore(2) says."""
    libc = ctypes.CDLL(None, use_errno=True)
    page, there, pages = mmap.PAGESIZE, 0, 0
    for path in folder.rglob("*"):
        if not path.is_file() or not path.stat().st_size:
            continue
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            content = np.frombuffer(mapped, np.uint8)
            found = np.zeros(-(-len(content) // page), np.uint8)
            lengths = ctypes.c_size_t(len(content))
            if libc.mincore(ctypes.c_void_p(content.ctypes.data), lengths, ctypes.c_void_p(found.ctypes.data)):
                raise OSError(ctypes.get_errno(), "mincore", str(path))
            there, pages = there + int((found & 1).sum()), pages + len(found)
            del content  # which would keep the file mapped
    return there / pages if pages else 1.0


def size_of(folder: Path) -> int:
    """Bytes of the files in a folder; a file with two names in it counts once."""
    found = {(s.st_dev, s.st_ino): s.st_size for path in folder.rglob("*") if (s := path.lstat()) and path.is_file()}
    return sum(found.values())
