"""Where a server's models meet their engine process: a private folder, whose lock lets only one of them start it."""

from __future__ import annotations

import fcntl
import os
import select
import shutil
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from ditforge.engines.runtime.one_at_a_time import VISIBLE
from ditforge.errors import DitforgeError

SHM = Path("/dev/shm")  # a short path, which a Unix socket needs, that does not survive the machine
PREFIX = "ditforge-engines-"
SOCKET, LOCK, PID = "socket", "lock", "pid"
BACKLOG = 128
MODULE = "ditforge.engines.runtime.process"
HIDDEN = "DITFORGE_CUDA_VISIBLE_DEVICES"  # what hidden() has put away


def folder_of(server: int) -> Path:
    """The folder of the server with this process id, which no other server ever has. It need not be there."""
    namespace = os.stat("/proc/self/ns/pid").st_ino  # containers can share /dev/shm
    return SHM / f"{PREFIX}{os.getuid()}-{namespace}-{server}-{begin(server)}"


def begin(process: int) -> int:
    """When a process began, in ticks since the machine started; 0 if there is none. The field 22 of proc(5)'s stat."""
    try:
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19])
    except (FileNotFoundError, ProcessLookupError):
        return 0


def sweep() -> None:
    """Remove the folders of servers that were killed together with their engine processes."""
    for path in SHM.glob(f"{PREFIX}{os.getuid()}-{os.stat('/proc/self/ns/pid').st_ino}-*"):
        server, _, began = path.name.rpartition("-")
        if str(begin(int(server.rpartition("-")[2]))) != began:
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, which is made if it is not there. Raises DitforgeError if others can open it."""
    while True:
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        try:
            found = folder.lstat()
        except FileNotFoundError:  # it was removed just now
            continue
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
            raise DitforgeError(f"{folder} is not a folder that only this user can open", f"rm -r {folder}")
        try:
            descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        except FileNotFoundError:  # it was removed just now
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if is_still(descriptor, folder / LOCK):
                yield
                return
        finally:
            os.close(descriptor)


def is_still(descriptor: int, path: Path) -> bool:
    """Whether an open file is the one at `path`, and has not been removed."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def hidden(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process that is to see no GPU, although the engine process that it starts shall.

    A process that has CUDA set up takes some 600 MiB of a GPU's memory, and a second to start.
    """
    return {**environment, VISIBLE: "", HIDDEN: environment.get(VISIBLE, "all")}


def shown(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment that hidden() was given."""
    found = dict(environment)
    before = found.pop(HIDDEN, None)
    if before is not None:
        del found[VISIBLE]
        found |= {} if before == "all" else {VISIBLE: before}
    return found


def connect(folder: Path, server: int) -> tuple[socket.socket, subprocess.Popen[bytes] | None]:
    """Connect with the engine process of a folder, and start it if there is none.

    Returns the connection, and the process if it was started, which is this process's child. It ends when the process
    `server` does. Raises OSError if the system is short of something.
    """
    with locked(folder):
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.connect(str(folder / SOCKET))
        except (FileNotFoundError, ConnectionRefusedError):
            process = start(folder, server)
            connection.connect(str(folder / SOCKET))
            return connection, process
        return connection, None


def start(folder: Path, server: int) -> subprocess.Popen[bytes]:
    """Start the engine process of a folder. It is given a socket that listens already, so nobody has to wait for it."""
    (folder / SOCKET).unlink(missing_ok=True)
    sweep()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(folder / SOCKET))
        (folder / SOCKET).chmod(0o600)
        listener.listen(BACKLOG)
        watched = os.pidfd_open(server)
        try:
            process = subprocess.Popen(
                [python(), "-m", MODULE, str(folder), str(listener.fileno()), str(watched)],
                stdin=subprocess.DEVNULL,
                pass_fds=[listener.fileno(), watched],
                cwd="/",
                env=shown(os.environ),
            )
        finally:
            os.close(watched)
    (folder / PID).write_text(str(process.pid))
    return process


def process_in(folder: Path) -> int:
    """The process id of the engine process that was started last; 0 if that is not known."""
    try:
        return int((folder / PID).read_text())
    except (OSError, ValueError):
        return 0


def await_end(process: int, timeout: float) -> None:
    """Wait until a process has ended, at most `timeout` seconds. Until then, its socket may accept connections."""
    try:
        ending = os.pidfd_open(process)
    except OSError:  # it has ended
        return
    try:
        select.select([ending], [], [], timeout)
    finally:
        os.close(ending)


def python() -> str:
    """This Python's program. Inside Triton's stub, it is the first python3 in PATH, as which the stub sees itself."""
    return sys.executable if Path(sys.executable).name.startswith("python") else shutil.which("python3") or "python3"


def leave(folder: Path) -> None:
    """Remove a folder, under its lock: whoever waits for the lock makes another one."""
    shutil.rmtree(folder, ignore_errors=True)
