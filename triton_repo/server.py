"""Runs Triton Inference Server on a model repository, behind a gRPC front, in a process that watches over it.

`start` returns once the models are ready. The process (service.py) ends when its owner ends, however that happens.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, TimeoutError as StillRunning
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, BinaryIO

from typing_extensions import Self, TypedDict, Unpack

from ditforge import __version__, folders, local_gpu, manifest, temporary_folder, write_errors
from ditforge.errors import DitforgeError, UserError
from ditforge.option import are_flags, command, option
from ditforge.real_path import current_folder
from ditforge.triton_repo.installation import find_tritonserver, other_triton
from ditforge.triton_repo.serve_options import PORTS, ServeOptions, make_options

LAST_SECONDS = 15.0  # after the grace: Triton gets a few to unload its models before it is killed
log = logging.getLogger(__name__)


class Options(TypedDict, total=False):
    """What `start` takes beside the repository; serve_options.ServeOptions says what each of them means."""

    host: str
    port: int
    http_port: int | None
    metrics_port: int | None
    log: Path | None
    timeout: float
    grace: float
    tls_cert: Path | None
    tls_key: Path | None
    tls_client_ca: Path | None
    token_file: Path | None
    insecure: bool
    shm_bytes: int
    shm_growth: int
    extra_args: Sequence[str]


@dataclass(frozen=True)
class Ports:
    """The ports on which a server listens. None means that the server does not offer this service."""

    grpc: int
    http: int | None
    metrics: int | None


class Server:
    """A running server, made by start(). It is a context manager that stops the server at its end.

    url: HOST:PORT of gRPC.
    pid: the process that serves and watches over Triton.
    log: the log file. If the caller named none, stop() removes it after a clean end.
    unfinished: once the server has ended, the number of pictures that were cut off.
    cause: once the server has ended, why these pictures could not be finished, if there is a reason; empty otherwise.
    """

    def __init__(
        self,
        options: ServeOptions,
        output: BinaryIO,
        on_event: Callable[[str], object] | None,
        temporary: Path | None = None,
    ) -> None:
        self.log = Path(output.name)
        self.options = options
        self.unfinished, self.cause = 0, ""
        self._temporary = temporary  # a folder with nothing in it but the log
        self._told_to_stop = self._died = False
        self._on_event = on_event
        self._ready: Future[None] = Future()
        self._exit: Future[int] = Future()
        self._failure: DitforgeError | None = None
        self.ports = Ports(options.port, options.http_port, options.metrics_port)
        from ditforge.triton_repo.tritonserver import sweep  # not in the thread: it may have been replaced by then

        self._sweep = sweep
        # A session of its own: Ctrl-C in the terminal reaches the owner only, whose stop() then drains.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "ditforge.triton_repo.service", options.model_dump_json(), json.dumps(are_flags())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=output,
            env=environment(),
            cwd="/",
            start_new_session=True,
        )
        self.pid = self._process.pid
        threading.Thread(target=self._read, daemon=True, name=f"server {self.pid}").start()

    def _read(self) -> None:
        """Hear what the process tells, until its end. If that fails, the process is ended: its owner waits for it."""
        assert self._process.stdout is not None
        try:
            for line in self._process.stdout:
                try:
                    self._hear(json.loads(line))
                except Exception:  # of on_event, which is not ours: the rest is heard all the same
                    log.exception("on_event failed")
            self._process.wait()
            self._sweep()  # what it left, where it was killed
        except Exception as error:
            self._process.kill()
            lost = DitforgeError(
                f"the server was lost: {type(error).__name__}: {error}", f"look at the log, {self.log}"
            )
            self._failure = self._failure or lost
        code = self._process.wait()
        if not self._ready.done():
            end = f"the server {how_it_ended(code)} before it was ready"
            self._ready.set_exception(self._failure or DitforgeError(end, f"look at the log, {self.log}"))
        clean = self._told_to_stop and code == 0 and not (self._died or self.unfinished or self._failure)
        if self._temporary and clean:
            shutil.rmtree(self._temporary, ignore_errors=True)
        self._exit.set_result(code)

    def _hear(self, event: dict[str, Any]) -> None:
        if event["event"] == "listening":
            self.ports = Ports(event["port"], self.options.http_port, event["metrics_port"])
        elif event["event"] == "ready" and not self._ready.done():
            self._ready.set_result(None)
        elif event["event"] == "failed":
            kind = UserError if event["user"] else DitforgeError
            self._failure = kind(event["problem"], event["fix"])
        elif event["event"] == "ready":
            event["message"] = "ready again"
        elif event["event"] == "died":
            self._died = True
        elif event["event"] == "draining" and self._on_event and self._ready.done():
            event["message"] = event.get("message") or "stopping"
        elif event["event"] == "stopped":
            self.unfinished, self.cause = int(event["unfinished"]), str(event["cause"])
        if message := event.get("message"):
            if self._on_event:
                self._on_event(message)
            else:
                log.warning("%s", message)

    @property
    def url(self) -> str:
        """HOST:PORT of gRPC, from this machine."""
        return f"{'127.0.0.1' if self.options.host == '0.0.0.0' else self.options.host}:{self.ports.grpc}"

    @property
    def running(self) -> bool:
        """Whether the server has not ended yet."""
        return not self._exit.done()

    def wait_until_ready(self) -> None:
        """Block until the models are ready. Raises the error that prevents it."""
        self._ready.result()

    def wait(self) -> int:
        """Block until the server ends, by itself or by stop(). Returns its exit code: -N if signal N killed it.

        Raises DitforgeError if the server gave up because Triton's processes died repeatedly.
        """
        code = self._exit.result()
        if self._failure:
            raise self._failure
        return code

    def stop(self, grace: float | None = None) -> None:
        """Give unfinished pictures `grace` seconds (None: the value given to start()), and then end the server.

        A second call does nothing.
        """
        grace = self.options.grace if grace is None else grace
        assert self._process.stdin is not None
        self._told_to_stop = True
        try:
            with contextlib.suppress(OSError, ValueError):
                self._process.stdin.write(f"stop {grace}\n".encode())
                self._process.stdin.flush()
            with contextlib.suppress(StillRunning):
                self._exit.result(grace + LAST_SECONDS)
        finally:  # a second Ctrl-C too
            try:
                with contextlib.suppress(OSError):
                    self._process.stdin.close()
                with contextlib.suppress(StillRunning):
                    self._exit.result(LAST_SECONDS)
            finally:  # and a third
                if self.running:
                    self._process.kill()
                self._exit.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()


def start(repo: Path, /, on_event: Callable[[str], object] | None = None, **options: Unpack[Options]) -> Server:
    """Serve the repository `repo`, and return once every model is ready.

    `on_event` is called, in a thread, with a line of text for people whenever something happens to the server, such as
    a process that died or a restart. Raises UserError if the repository, an address, a file or the installation is at
    fault, and DitforgeError, with the reason from Triton's log, if the server does not become ready. Nothing is left
    running then.
    """
    made = make_options(repo, dict(options))
    if not any(made.repo.glob(f"*/{folders.CONFIG}")):
        raise folders.no_repository(made.repo)
    check_gpu(made.repo)
    for module in ("grpc", "tritonclient.grpc", "psutil", "prometheus_client"):
        try:
            __import__(module)
        except ModuleNotFoundError as error:
            raise UserError(f"{module}, which the server needs, is missing: {error}", other_triton()) from None
    find_tritonserver()
    claimed = claim_ports(made)
    named = made.log is not None
    folder = current_folder() if named else Path(mkdtemp(prefix="ditforge-serve-", dir=temporary_folder.check()))
    file = folder / (made.log or "tritonserver.log")
    made = made.model_copy(update={"http_port": claimed.get("http_port"), "log": file})
    with appended(file, f"ditforge {__version__} serves {made.repo}") as output:
        server = Server(made, output, on_event, None if named else folder)
    try:
        server.wait_until_ready()
    except BaseException:
        server.stop(grace=0)
        raise
    return server


def how_it_ended(code: int) -> str:
    """Say as text how a process with this exit code ended. A code of -N means that signal N killed it."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"was killed ({name}{', perhaps for want of memory' if -code == signal.SIGKILL else ''})"


def check_gpu(repository: Path) -> None:
    """Raise UserError if the repository has engines for a GPU that this machine does not have.

    If the driver cannot be asked, nothing is raised here, and Triton will find out.
    """
    found = manifest.earlier(repository, "repository")
    targets = {engine.target for engine in found.engines.values()} if found else set()
    try:
        why = local_gpu.why_not_here(targets)
    except UserError:
        return
    if why:
        wanted = " or ".join(sorted(targets - {local_gpu.CPU}))
        rebuilt = "for this one: ditforge build ONNX_DIR --gpu cpu --out DIR   and then ditforge repo"
        fix = f"{command('ditforge serve {}', repository)}   on a machine with {wanted}; {rebuilt}"
        raise UserError(f"the engines in {repository} do not run here: {why}", fix)


def environment() -> dict[str, str]:
    """This process's environment, with a PYTHONPATH that means the same in another folder."""
    paths = [os.path.abspath(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)}


def appended(file: Path, line: str) -> BinaryIO:
    """Open the log for appending, and write a first line. Raises UserError if it cannot be written."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "ab") as opened:
            opened.write(f"{line}\n".encode())
        return open(file, "ab")
    except OSError as error:
        fix = write_errors.fix(error, option('log="FILE"', "--log FILE") + " names another file")
        raise UserError(f"cannot write the log {file}: {write_errors.reason(error)}", fix) from None


def claim_ports(options: ServeOptions) -> dict[str, int]:
    """The ports that are asked for, by the names of their options; as claim() has them."""
    wanted = {name: getattr(options, name) for name in PORTS}
    return {name: claim(options.host, number, name) for name, number in wanted.items() if number is not None}


def claim(host: str, number: int, name: str) -> int:
    """The port, which was free a moment ago; a free one for 0. Raises UserError where it is not to be had."""
    asked = option(f"{name}={number}")
    try:
        with socket.create_server((host, number)) as listener:
            return int(listener.getsockname()[1])
    except (OSError, OverflowError, TypeError) as error:  # TypeError: of a name that IDNA or C cannot have
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            fix = f"{option(f'{name}=0')} takes a free one; what listens: ss -ltnp 'sport = :{number}'"
            raise UserError(f"{asked} is in use", fix) from None
        problem = f"cannot listen on {host!r} with {asked}: {error}"
        raise UserError(problem, "an IPv4 address of this machine, and a port of 1024 to 65535 or 0") from None
