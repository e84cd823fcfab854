"""An engine in the engine process, as the process of a Triton model sees it.

Tensors of requests lie in shared memory already, as Triton hands them to its Python models, and the engine process maps
the same memory. Others are copied once.
"""

from __future__ import annotations

import bisect
import os
import select
import socket
import subprocess
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from ditforge.engines.compilers import Arrays
from ditforge.engines.runtime import rendezvous
from ditforge.engines.runtime.messages import Line, room
from ditforge.errors import DitforgeError, UserError
from ditforge.manifest import Engine, File

ATTEMPTS = 2  # a process that is just ending accepts no more
ENDS = 10.0  # seconds until a process that was killed has ended, with all the memory that it had
REAPED = 1.0  # seconds until a process that has closed its connections has ended
SMALL = 1 << 16  # bytes that are copied sooner than looked up


class ProcessLost(DitforgeError):
    """The engine process ended during a call, whose fault that need not be: the call can be repeated."""


class EngineFailed(DitforgeError):
    """An engine raised an error that is not ditforge's; `kind` is the name of its class."""

    def __init__(self, kind: str, problem: str) -> None:
        super().__init__(problem)
        self.kind = kind


class RemoteEngine:
    """An engine that is loaded and run by the engine process, and loaded again when that had to be started again.

    `folder`, `files` and `made` are those of `load_engine`, and what that raises is raised. `place` is the folder where
    processes of one server meet, and `server` the process id of the server. `tell` is called, in any thread, with a
    line of text about a process that ended.
    """

    def __init__(
        self,
        folder: Path,
        files: dict[str, File],
        made: Engine,
        tell: Callable[[str], object],
        place: Path | None = None,
    ) -> None:
        self.server = os.getppid()
        self.place = place or rendezvous.folder_of(self.server)
        self.tell = tell
        self.what = {
            "call": "load",
            "folder": str(folder),
            "files": {name: file.model_dump(mode="json") for name, file in files.items()},
            "made": made.model_dump(mode="json"),
        }
        self.inputs: list[str] = []
        self.outputs: list[str] = []
        self.turn = threading.Condition()
        self.line: Line | None = None
        self.mapped: Mapped | None = None
        self.started: subprocess.Popen[bytes] | None = None  # which is reaped when it has ended
        self.closed = False
        with self.turn:
            self.connect()
        threading.Thread(target=self.watch, daemon=True).start()

    def connect(self) -> Line:
        """Have the engine loaded. Raises what `load_engine` does, and ProcessLost if that ends the process."""
        for _ in range(ATTEMPTS):
            if self.started is not None and self.started.poll() is not None:
                self.started = None
            try:
                connection, process = rendezvous.connect(self.place, self.server)
            except OSError as error:
                raise ProcessLost(f"the engine process cannot be started: {error.strerror or error}") from error
            self.started = process or self.started
            met = rendezvous.process_in(self.place)
            line = Line(connection)
            line.begin(1)  # now, when there are file descriptors for it
            mapped = Mapped(line)
            try:
                answer = ask(line, self.what)
            except (EOFError, OSError):
                connection.close()
                rendezvous.await_end(met, ENDS)  # where it still accepts connections, the next one would be lost too
                continue
            except BaseException:
                connection.close()
                raise
            self.inputs, self.outputs = answer["inputs"], answer["outputs"]
            self.line, self.mapped = line, mapped
            self.turn.notify_all()
            return line
        raise ProcessLost("the engine process ended while an engine was loaded")

    def watch(self) -> None:
        """Load the engine again when the process has ended, without waiting for the next call."""
        while True:
            with self.turn:
                while self.line is None and not self.closed:  # until the next call brings another one
                    self.turn.wait()
                line = self.line
            if line is None:
                return
            hung_up(line)
            with self.turn:
                if self.closed:
                    return
                if self.line not in (line, None):
                    continue
                self.drop()
                self.tell(f"the engine process has ended{self.how()}; the engine is loaded again")
                try:
                    self.connect()
                except Exception as error:  # the next call tries again
                    self.tell(f"the engine cannot be loaded: {' '.join(str(error).split())}")

    def run(self, inputs: Arrays) -> Arrays:
        """Compute the outputs, by name, for inputs by name."""
        return self.run_batch([inputs])

    def run_batch(self, parts: list[Arrays]) -> Arrays:
        """The outputs of several requests as one batch. They are valid until the next call.

        Raises ProcessLost if the process ended, and EngineFailed or what `load_engine` raises if the engine failed.
        """
        with self.turn:
            if self.line is not None and hung_up(self.line, 0):
                self.drop()
            line = self.line or self.connect()
            message = {"call": "run", "parts": self.placed(line, parts)}
            try:
                answer = ask(line, message)
            except (EOFError, OSError) as error:
                self.drop()
                raise ProcessLost("the engine process ended during a call") from error
            return {name: line.array(place) for name, place in answer["outputs"].items()}

    def drop(self) -> None:
        """Have the process free the engine, if the process lives."""
        if self.line is not None:
            with suppress(OSError):
                self.line.connection.shutdown(socket.SHUT_RDWR)
        self.line = None

    def how(self) -> str:
        """How the process ended, in words, if that is known here: it was this process that started it."""
        try:
            code = self.started.wait(REAPED) if self.started else None
        except subprocess.TimeoutExpired:
            return ""
        return "" if code is None else f" with exit code {code}" if code >= 0 else f" by signal {-code}"

    def placed(self, line: Line, parts: list[Arrays]) -> list[dict[str, Any]]:
        """Where the arrays are in memory that the engine process has mapped; those that are in none are copied."""
        assert self.mapped is not None
        self.mapped.forget_replaced()
        found = [{name: self.mapped.find(array) for name, array in part.items()} for part in parts]
        pairs = list(zip(found, parts, strict=True))
        line.begin(sum(room(part[name].nbytes) for there, part in pairs for name in there if there[name] is None))
        for there, part in pairs:
            for name, array in part.items():
                if there[name] is None:
                    there[name], copy = line.place(array.dtype, array.shape)
                    copy[...] = array
        return found

    def warm_up(self) -> None:
        """Nothing: the process has done it when it loaded the engine."""

    def close(self) -> None:
        """Have the engine freed."""
        with self.turn:
            self.closed = True
            self.drop()
            self.turn.notify_all()


def hung_up(line: Line, timeout: float | None = None) -> bool:
    """Wait until the other end is gone, at most `timeout` ms. Returns whether it is."""
    poll = select.poll()
    poll.register(line.connection, select.POLLRDHUP)
    return bool(poll.poll(timeout))


def ask(line: Line, message: dict[str, Any]) -> dict[str, Any]:
    """Send a message and wait for the answer. Raises the error that it tells, or EOFError or OSError without one."""
    line.send(dict(message))
    answer = line.receive()
    if "error" not in answer:
        return answer
    if answer["error"] == UserError.__name__:
        raise UserError(answer["problem"], answer["fix"])
    if answer["error"] == DitforgeError.__name__:
        raise DitforgeError(answer["problem"], answer["fix"])
    raise EngineFailed(answer["error"], answer["problem"])


class Mapped:
    """Files in shared memory that this process has mapped, and that the other end of the line can map as well.

    Triton's shared memory only grows, and stays mapped where it was. Source: shm_manager.h in
    https://github.com/triton-inference-server/python_backend
    """

    def __init__(self, line: Line) -> None:
        self.line = line
        self.ranges = sorted(shared_ranges())
        self.files: dict[str, tuple[int, int]] = {}  # the number by which the other end knows it, and its size
        self.replaced: list[int] = []
        for _, _, file, _ in self.ranges:
            if file not in self.files:
                self.offer(file, 0)

    def find(self, array: NDArray[Any]) -> list[Any] | None:
        """Return where an array is, as messages name it; None if it is in no such file, or small."""
        if array.nbytes < SMALL or not array.flags.c_contiguous:
            return None
        begin: int = array.__array_interface__["data"][0]
        found = self.range_of(begin) or self.range_of(begin, look=True)
        if found is None or begin + array.nbytes > found[1]:
            return None
        offset = begin - found[0] + found[3]
        number, size = self.files.get(found[2], (0, 0))
        if offset + array.nbytes > size:
            number, size = self.offer(found[2], size and number)
        return [array.dtype.str, list(array.shape), number, offset] if offset + array.nbytes <= size else None

    def forget_replaced(self) -> None:
        """Say with the next message what the ones before it replaced. These may still have named it themselves."""
        self.line.dropped += self.replaced
        self.replaced.clear()

    def range_of(self, address: int, look: bool = False) -> tuple[int, int, str, int] | None:
        """The range in which an address is, among those that are known, or that are there now."""
        if look:
            self.ranges = sorted(shared_ranges())
        place = bisect.bisect(self.ranges, (address, 1 << 64)) - 1
        return self.ranges[place] if place >= 0 and address < self.ranges[place][1] else None

    def offer(self, file: str, before: int) -> tuple[int, int]:
        """Send a file to the other end, in the place of what it knows of it. Returns its number and size; 0 if gone."""
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_NOFOLLOW)
        except OSError:
            return 0, 0
        if before:
            self.replaced.append(before)
        size = os.fstat(descriptor).st_size
        self.files[file] = self.line.offer(descriptor, size), size
        return self.files[file]


def shared_ranges() -> list[tuple[int, int, str, int]]:
    """The ranges of this process's addresses at which files of /dev/shm are mapped; see /proc/PID/maps in proc(5).

    Each is its begin and its end, the file, and where it begins in the file.
    """
    ranges = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        place, mode, offset, _, _, *name = line.split(maxsplit=5)
        if name and name[0].startswith("/dev/shm/") and mode == "rw-s" and not name[0].endswith(" (deleted)"):
            begin, end = (int(number, 16) for number in place.split("-"))
            ranges.append((begin, end, name[0], int(offset, 16)))
    return ranges
