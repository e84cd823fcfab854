"""Runs Triton Inference Server on a model repository: the container's `tritonserver`, or the nvidia-pytriton wheel's.

What a running server needs beside its log lies in /dev/shm under one prefix: a folder of links, and the shared
memory of its Python models. Both go when the server ends; where its owner was killed too, the next start() sweeps up.
"""

import contextlib
import errno
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, wait as wait_for
from dataclasses import asdict, dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import BinaryIO

from ditforge.errors import DitforgeError, UserError
from ditforge.triton_repo.installation import INSTALL, python_environment, tritonserver_command

SHM = Path("/dev/shm")  # where glibc's shm_open(3) keeps its regions
PREFIX = "ditforge-triton-"

# PR_SET_PDEATHSIG (1) has the kernel kill Triton when its parent dies, of whatever; its models see that and end. Not
# SIGTERM: Triton drains then, without end where a model hangs. The call is made in a process of its own, which then
# becomes tritonserver, because a preexec_fn can deadlock where the parent has threads.
LAUNCH = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""


@dataclass(frozen=True)
class Ports:
    grpc: int
    http: int
    metrics: int


class Server:
    """A running tritonserver, made by start(); a context manager that stops it."""

    def __init__(
        self, command: list[str], env: dict[str, str], folder: Path, url: str, ports: Ports, log: BinaryIO, grace: float
    ) -> None:
        self.ports = ports
        self.log = Path(log.name)
        self.url = url
        self._grace = grace
        self._lock = threading.Lock()
        self._process: Future[subprocess.Popen[bytes]] = Future()
        self._exit: Future[int] = Future()
        threading.Thread(target=self._run, args=(command, env, folder, log), daemon=True).start()
        self.pid = self._process.result().pid

    def _run(self, command: list[str], env: dict[str, str], folder: Path, log: BinaryIO) -> None:
        # PR_SET_PDEATHSIG fires when the *thread* that forked ends, so this one lives as long as the server.
        try:
            # A session of its own: Ctrl-C in the terminal reaches the owner only, whose stop() then drains.
            process = subprocess.Popen(
                [sys.executable, "-ISc", LAUNCH, str(os.getpid()), *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=env,
                cwd="/",  # the stub puts its working directory before everything else that Python imports from
                start_new_session=True,
            )
        except BaseException as error:
            self._process.set_exception(error)
            return
        self._process.set_result(process)
        # Until it is reaped, no other process can get the dead server's pid, nor so its group the wrong members.
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with self._lock:
            code = process.wait()
        _remove(folder)
        self._exit.set_result(code)

    @property
    def running(self) -> bool:
        return not self._exit.done()

    def wait(self) -> int:
        """Blocks until the server ends, by itself or by stop(); its exit code, -N where signal N killed it."""
        return self._exit.result()

    def stop(self, grace: float | None = None) -> None:
        """Lets requests in flight finish, for `grace` seconds (None: start()'s), then kills. Does nothing twice.

        Triton ends its drain after start()'s `grace`, so a longer one here changes nothing.
        """
        try:
            self._signal(signal.SIGTERM)
            # Where Triton gives up at its own limit, it still has models to unload.
            wait_for([self._exit], self._grace + 5 if grace is None else grace)
        finally:  # a second Ctrl-C too
            self._signal(signal.SIGKILL)
            self._exit.result()

    def _signal(self, number: int) -> None:
        with self._lock:
            if self._process.result().returncode is None:
                os.kill(self.pid, number)

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()


def start(
    repo: Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8001,
    http_port: int = 0,
    metrics_port: int = 0,
    log: Path | None = None,
    timeout: float = 120,
    grace: float = 30,
    shm_bytes: int = 8 << 20,
    shm_growth: int = 16 << 20,
    extra_args: Sequence[str] = (),
) -> Server:
    """Starts Triton on `repo` and returns once every model is loaded and gRPC, HTTP and metrics answer.

    host: an IPv4 address or name of this machine; `0.0.0.0` is every network. A port of 0 is a free one.
    log: appended to; None is a new file in the temporary folder, which stays. Server.log names it.
    timeout: seconds until ready. grace: seconds that requests in flight get once the server is told to stop.
    shm_bytes, shm_growth: what each instance of a Python model takes of /dev/shm from the start, and at a time when
        that is too little, for good. Docker gives a container 64 MiB in all; `--shm-size` gives more.
    extra_args: more of tritonserver's own, such as `--cache-config=local,size=1048576`, with absolute paths.

    Raises UserError where the repository, an address or the installation is at fault, and DitforgeError with the
    reason from Triton's log where it does not get ready; nothing is left running then.
    """
    repo = repo.resolve()
    if not any(repo.glob("*/config.pbtxt")):
        state = "holds no model (no MODEL/config.pbtxt)" if repo.is_dir() else "is not a folder"
        raise UserError(f"the model repository {repo} {state}", f"ditforge repo ENGINE_DIR --out {repo}")
    try:
        import tritonclient.grpc  # noqa: F401
    except ImportError as error:
        raise UserError(f"tritonclient, which asks Triton whether it is ready, is missing: {error}", INSTALL) from None
    address, ports = _claim(host, {"gRPC": port, "HTTP": http_port, "metrics": metrics_port})
    url = f"{'127.0.0.1' if address == '0.0.0.0' else address}:{ports.grpc}"
    _sweep()
    folder, server = Path(tempfile.mkdtemp(prefix=f"{_namespace()}{os.getpid()}-", dir=SHM)), None
    try:
        models = repo
        if not re.fullmatch(r"[\w/.+@-]+", str(repo), re.ASCII):  # Triton hands it to `bash -c`, unquoted
            models = folder / "models"
            models.symlink_to(repo)
        env = os.environ | {"PATH": f"{python_environment(folder)}:{os.environ.get('PATH', os.defpath)}"}
        args = [*tritonserver_command(folder, env), f"--model-repository={models}", "--exit-on-error=true"]
        args += ["--allow-sagemaker=false", "--allow-vertex-ai=false", f"--exit-timeout-secs={grace:.0f}"]
        for endpoint, number in asdict(ports).items():
            args += [f"--{endpoint}-address={address}", f"--{endpoint}-port={number}"]
        args += [f"--backend-config=python,shm-region-prefix-name={folder.name}-"]
        args += [f"--backend-config=python,shm-default-byte-size={shm_bytes}"]
        args += [f"--backend-config=python,shm-growth-byte-size={shm_growth}"]
        log = log or Path(tempfile.mkdtemp(prefix=PREFIX), "tritonserver.log")
        with _appended(log) as output:
            earlier = output.tell()
            server = Server([*args, *extra_args], env, folder, url, ports, output, grace)
        deadline = time.monotonic() + timeout
        while server.running and time.monotonic() < deadline:
            if _ready(url, ports):
                return server
            time.sleep(0.05)
        end = f"was not ready after {timeout:g} s" if server.running else f"ended with exit code {server.wait()}"
        raise _failure(end, log, earlier)
    except BaseException:
        if server:
            server.stop(grace=0)
        _remove(folder)
        raise


def _appended(log: Path) -> BinaryIO:
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        return open(log, "ab")
    except OSError as error:
        raise UserError(f"cannot write the log {log}: {error.strerror}", "--log names another file") from None


def _claim(host: str, wanted: Mapping[str, int]) -> tuple[str, Ports]:
    """The IPv4 address of `host`, and the ports wanted there: all free a moment ago, 0 replaced by a free one."""
    numbers = []
    with contextlib.ExitStack() as held:
        for endpoint, number in wanted.items():
            try:
                listener = held.enter_context(socket.create_server((host, number)))
            except (OSError, OverflowError) as error:
                if getattr(error, "errno", None) == errno.EADDRINUSE:
                    fix = f"--port names another (0 a free one); what listens: ss -ltnp 'sport = :{number}'"
                    raise UserError(f"port {number} ({endpoint}) is in use", fix) from None
                problem = f"cannot listen on {host!r}, port {number} ({endpoint}): {error}"
                raise UserError(problem, "an IPv4 address of this machine, and a port of 1024 to 65535 or 0") from None
            address, port = listener.getsockname()
            numbers.append(port)
    return address, Ports(*numbers)


def _ready(url: str, ports: Ports) -> bool:
    """Whether gRPC says so; only asked once metrics, the last of the three endpoints to come up, answers too."""
    from tritonclient.grpc import InferenceServerClient
    from tritonclient.utils import InferenceServerException

    try:
        with contextlib.closing(HTTPConnection(url.partition(":")[0], ports.metrics, timeout=5)) as metrics:
            metrics.request("GET", "/metrics")
            if metrics.getresponse().status != 200:
                return False
        with InferenceServerClient(url, channel_args=[("grpc.enable_http_proxy", 0)]) as client:
            return client.is_server_ready(client_timeout=5)
    except (OSError, HTTPException, InferenceServerException):
        return False


def _failure(end: str, log: Path, earlier: int) -> DitforgeError:
    """What the log says from byte `earlier` on: why the models failed to load, else its errors, else its last lines."""
    with open(log, "rb") as file:
        file.seek(earlier)
        text = file.read().decode(errors="replace")
    if taken := re.search(r"Socket '\S+:(\d+)' already in use", text):
        return UserError(f"port {taken[1]} was taken while the models loaded", "start again, or on another port")
    entries = re.findall(r'^E\d{4} [\d:.]+ +\d+ \S+\] +"?(.*?)"?\s*$', text, re.MULTILINE)
    errors = [entry for entry in entries if not entry.startswith("CudaDriverHelper")]  # every start without a GPU
    plain = [line for line in text.splitlines() if line.strip() and line[0] not in "+|"]
    lines = [entry for entry in errors if entry.startswith("failed to load")] or errors or plain
    reason = "\n".join(dict.fromkeys(lines[-10:])).replace("\\n", "\n").strip() or "it wrote nothing"
    return DitforgeError(f"tritonserver {end}\n{reason}", f"the whole log is {log}")


def _namespace() -> str:
    """How names in /dev/shm begin here; containers can share it, and their process ids mean nothing to each other."""
    return f"{PREFIX}{os.stat('/proc/self/ns/pid').st_ino}-"


def _sweep() -> None:
    """Removes what is left of servers whose owner was killed: then nobody is there to call _remove."""
    for path in SHM.glob(f"{_namespace()}*"):
        owner = path.name.removeprefix(_namespace()).partition("-")[0]
        if not Path("/proc", owner).exists():
            _remove(path)


def _remove(folder: Path) -> None:
    """Removes a server's folder and its shared memory beside it, as far as they are there and ours."""
    for path in SHM.glob(f"{folder.name}*"):
        with contextlib.suppress(OSError):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
