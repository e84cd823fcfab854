"""One run of tritonserver, from its start to its end, and the processes of its models and of their engines.

Except for the log, everything that a run needs is in /dev/shm under one prefix: a folder of links and sockets, and the
shared memory of the Python models. Both are removed when the server ends. If its owner was killed too, the next server
removes them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import grpc
import psutil
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2, service_pb2 as pb

from ditforge import manifest
from ditforge.engines.runtime.rendezvous import hidden
from ditforge.errors import DitforgeError
from ditforge.triton_repo.config import ENGINES_VARIABLE, FORGONE_VARIABLE
from ditforge.triton_repo.installation import STUB, python_environment, tritonserver_command
from ditforge.triton_repo.serve_options import ServeOptions

EARLY = "ditforge.engines.runtime.early"
ENGINES = "engines"  # a folder beside the sockets, where the models meet the engine process
FORGONE = "forgone"  # a folder of words about requests that nobody waits for, beside the sockets
SHM = Path("/dev/shm")  # where glibc's shm_open(3) keeps its regions
PREFIX = "ditforge-triton-"
READY, LIVE = "/inference.GRPCInferenceService/ServerReady", "/inference.GRPCInferenceService/ServerLive"
SILENCE = 30.0  # seconds without an answer after which Triton is taken for stuck
ASKED_EVERY = 5.0  # seconds
UNLOADING = 5  # seconds that Triton gets to unload its models, once all requests are answered
LAST_WORDS = 3  # seconds that Triton gets to say why a model's process ended while it was loaded
SHARED = ("+kept", "+lent", "+clients")  # how the names of what lasts longer than a run end, beside the folder
KEY = "ditforge-key"
CLOSED = "model-repository,shared-memory,trace,logging"  # what clients have no business in, in Triton's names

# PR_SET_PDEATHSIG (1) has the kernel kill Triton when its parent dies, of whatever; its models see that and end. The
# call is made in a process of its own, which then becomes tritonserver: a preexec_fn can deadlock with threads. Before
# that, it starts what starts the engine process (early.py), by a fork of a fork, which Triton need not reap.
LAUNCH = """
import ctypes, json, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() == int(sys.argv[1]):
    early, command, server = json.loads(sys.argv[2]), sys.argv[3:], os.getpid()
    if early:
        if os.fork() == 0:
            if os.fork() == 0:
                os.execv(early[0], [*early, str(server)])
            os._exit(0)
        os.wait()
    os.execv(command[0], command)
"""


class Triton:
    """A tritonserver on the repository of `options`, with sockets in `folder`. It writes where this process writes."""

    def __init__(self, options: ServeOptions, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.socket = folder / "grpc"
        self.began = os.fstat(sys.stderr.fileno()).st_size  # of the log, where this run's part begins
        self.channel: grpc.aio.Channel | None = None
        self.key = secrets.token_hex(16)  # for what clients have no business in
        # Reaped last of all: until then, no other process can get its pid, nor so its group the wrong members.
        self.process: subprocess.Popen[bytes] | None = None
        self.models: dict[int, str] = {}  # their processes, by pid

    async def start(self) -> grpc.aio.Channel:
        """Start Triton, and return a channel to it once all models are loaded.

        Raises DitforgeError, with the reason from Triton's log, if they cannot be loaded.
        """
        command, env = prepare(self.options, self.folder, self.key)
        early = json.dumps(early_start(self.options.repo, self.folder))
        self.process = subprocess.Popen(
            [sys.executable, "-ISc", LAUNCH, str(os.getpid()), early, *command],
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr.fileno(),
            stderr=subprocess.STDOUT,
            env=env,
            cwd="/",  # the stub puts its working directory first in the list of folders that Python imports from
            start_new_session=True,
        )
        # Triton adds the port, which a Unix socket has not: it becomes a part of the name.
        unlimited = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
        self.channel = grpc.aio.insecure_channel(f"unix://{self.socket}:1", options=unlimited)
        await self.become_ready(self.process.pid, self.channel)
        for region in SHM.glob(f"{self.folder.name}-*"):  # which Boost makes readable for everyone
            region.chmod(0o600)
        return self.channel

    @property
    def own_key(self) -> list[tuple[str, str]]:
        """The metadata of calls that are closed to others."""
        return [(f"triton-grpc-protocol-{KEY}", self.key)]

    async def become_ready(self, pid: int, channel: grpc.aio.Channel) -> None:
        """Wait until all models are loaded. Raises DitforgeError if Triton ends, takes too long, or loses a process."""
        loop = asyncio.get_running_loop()
        deadline, lost_since = loop.time() + self.options.timeout, dict[int, float]()
        while not await is_ready(channel):
            if how := how_it_ended(pid):
                raise self.failure(f"was not ready: {how}")
            if loop.time() > deadline:
                raise self.failure(f"was not ready after {self.options.timeout:g} s")
            self.models |= model_processes(pid)
            for lost in lost_models(pid):
                # Triton says why where a model raised an error, and ends; of a process that was killed it knows nothing
                if loop.time() - lost_since.setdefault(lost, loop.time()) > LAST_WORDS:
                    raise self.failure(f"lost {self.name(lost)} while it was loaded: {how_it_ended(lost)}")
            await asyncio.sleep(0.05)
        self.models = model_processes(pid)
        for lost in lost_models(pid):  # since it was ready
            raise self.failure(f"lost {self.name(lost)}: {how_it_ended(lost)}")

    def name(self, pid: int) -> str:
        """Return what messages call a model's process. One that ended before it was seen has no name any more."""
        return f"the process of the model {self.models[pid]}" if pid in self.models else "the process of a model"

    def failure(self, end: str) -> DitforgeError:
        """Return the error for a start that failed, with the reason from Triton's log."""
        text = ""
        if self.options.log and self.options.log.is_file():
            with self.options.log.open("rb") as file:
                file.seek(self.began)
                text = file.read(1 << 24).decode(errors="replace")
        return DitforgeError(f"tritonserver {end}\n{reason_in(text)}", f"the whole log is {self.options.log}")

    async def died(self) -> tuple[str, str]:
        """Wait until Triton or the process of a model ends. Returns which (`tritonserver`, or the model), and how."""
        assert self.process is not None
        await any_ended([self.process.pid, *self.models])
        for pid, model in self.models.items():  # where Triton itself has ended, its models soon follow
            if (how := how_it_ended(pid)) and how_it_ended(self.process.pid) is None:
                return model, f"has died: {how}"
        return "tritonserver", f"has died: {how_it_ended(self.process.pid) or 'it ended'}"

    async def engines_died(self) -> str:
        """Wait until the engine process ends. Returns how. The models start another one, so Triton need not be."""
        pid = await self.engine_process(0)
        await any_ended([pid])
        how = how_it_ended(pid) or "it ended"
        await self.engine_process(pid)
        return f"has died: {how}"

    async def engine_process(self, other: int) -> int:
        """Wait until there is an engine process with another process id than `other`, and return that."""
        while True:
            with contextlib.suppress(OSError, ValueError):
                pid = int((self.folder / ENGINES / "pid").read_text())
                if pid != other:
                    return pid
            await asyncio.sleep(0.2)

    async def fell_silent(self) -> tuple[str, str]:
        """Wait until Triton has not answered for SILENCE seconds although it lives. Returns as died() does."""
        assert self.channel is not None
        while True:
            try:
                await self.channel.unary_unary(LIVE)(b"", timeout=SILENCE)
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                    return "tritonserver", f"did not answer for {SILENCE:g} s"
            await asyncio.sleep(ASKED_EVERY)

    async def stop(self) -> None:
        """End Triton and its models.

        If all of them live, Triton gets SIGTERM and UNLOADING seconds to unload the models. What is left is killed.
        """
        if self.process is not None and not any(map(how_it_ended, (self.process.pid, *self.models))):
            self.process.terminate()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(any_ended([self.process.pid]), UNLOADING)
        await self.kill()

    async def kill(self) -> None:
        """End Triton and its models at once, and remove their shared memory."""
        if self.process is not None and self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            while self.process.poll() is None:  # poll() needs no file descriptor; there may be none left
                await asyncio.sleep(0.01)
        if self.channel is not None:
            await self.channel.close(grace=1)  # requests in flight fail by themselves: the other end is gone
        with contextlib.suppress(OSError):  # what cannot be removed now is removed with the folder
            for region in SHM.glob(f"{self.folder.name}-*"):
                region.unlink(missing_ok=True)


async def any_ended(pids: Sequence[int]) -> None:
    """Wait until one of the processes has ended, reaped or not. Raises OSError without file descriptors for that."""
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    with contextlib.ExitStack() as watched:
        for pid in pids:
            try:
                pidfd = os.pidfd_open(pid)
            except ProcessLookupError:
                return
            watched.callback(os.close, pidfd)
            loop.add_reader(pidfd, ended.set)
            watched.callback(loop.remove_reader, pidfd)
        await ended.wait()


def prepare(options: ServeOptions, folder: Path, key: str) -> tuple[list[str], dict[str, str]]:
    """The command that runs Triton, and its environment; what it needs is put into `folder`, anew each time.

    `key` opens what is closed to clients.
    """
    for entry in folder.iterdir():
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    (folder / FORGONE).mkdir()
    models = options.repo
    if not re.fullmatch(r"[\w/.+@-]+", str(models), re.ASCII):  # Triton hands it to `bash -c`, unquoted
        models = folder / "models"
        models.symlink_to(options.repo)
    path = f"{python_environment(folder)}:{os.environ.get('PATH', os.defpath)}"
    env = os.environ | {"PATH": path, FORGONE_VARIABLE: str(folder / FORGONE), ENGINES_VARIABLE: str(folder / ENGINES)}
    if not needs_gpu(options.repo):
        env = hidden(env)
    args = [*tritonserver_command(folder, env), f"--model-repository={models}", "--exit-on-error=true"]
    args += [f"--grpc-address=unix://{folder / 'grpc'}", "--grpc-port=1"]
    # Others do not even reach the socket. A second lock.
    args += [f"--grpc-restricted-protocol={CLOSED}:{KEY}={key}"]
    args += [
        "--allow-sagemaker=false",
        "--allow-vertex-ai=false",
        "--disable-auto-complete-config",
        f"--exit-timeout-secs={UNLOADING}",
    ]
    if options.http_port is None:
        args += ["--allow-http=false"]
    else:
        args += [f"--http-address={options.host}", f"--http-port={options.http_port}"]
        args += [f"--http-restricted-api={CLOSED}:{KEY}={secrets.token_hex(16)}"]  # which nobody has
    if options.metrics_port is None:
        args += ["--allow-metrics=false"]
    else:
        args += [f"--metrics-address=unix:{folder / 'metrics'}", "--metrics-port=1"]
    args += [f"--backend-config=python,shm-region-prefix-name={folder.name}-"]
    args += [f"--backend-config=python,shm-default-byte-size={options.shm_bytes}"]
    args += [f"--backend-config=python,shm-growth-byte-size={options.shm_growth}"]
    return [*args, *options.extra_args], env


def early_start(repository: Path, folder: Path) -> list[str]:
    """The command that starts the engine process of a prepared server; empty if it has no engines that are known."""
    if not (repository / manifest.FILE_NAME).is_file():
        return []
    engines = manifest.read(repository, "repository").engines.values()
    kinds = sorted({(engine.compiler, engine.target) for engine in engines})
    python = str(folder / "bin" / "python3")
    return [python, "-m", EARLY, str(folder / ENGINES), json.dumps(kinds)] if kinds else []


def needs_gpu(repository: Path) -> bool:
    """Whether Triton itself may use a GPU for a model of the repository, and not the engine process alone."""
    for file in repository.glob("*/config.pbtxt"):
        try:
            config = text_format.Parse(file.read_bytes(), model_config_pb2.ModelConfig())
        except (text_format.ParseError, UnicodeDecodeError, OSError):
            return True  # Triton will say what is wrong with it
        groups = config.instance_group
        on_cpu = config.backend == "python" and groups and all(group.kind == group.KIND_CPU for group in groups)
        if not on_cpu and config.platform != "ensemble":
            return True
    return False


async def is_ready(channel: grpc.aio.Channel) -> bool:
    """Return whether Triton says that all its models are ready."""
    try:
        answer = await channel.unary_unary(READY)(b"", timeout=5)
    except grpc.aio.AioRpcError:
        return False
    return bool(pb.ServerReadyResponse.FromString(answer).ready)


def model_processes(triton: int) -> dict[int, str]:
    """Return the processes in which Triton's Python backend runs models: the models' names, by process id."""
    found = {}
    for process in psutil.Process(triton).children():
        with contextlib.suppress(psutil.Error):
            code = next((Path(word) for word in process.cmdline() if word.endswith("/model.py")), None)
            if code is not None:
                found[process.pid] = code.parents[1].name
    return found


def lost_models(triton: int) -> list[int]:
    """Return the processes of models that have ended. Triton's Python backend does not reap them.

    While it loads models, Triton also runs the same program through a shell, to ask for its version. That process is
    soon reaped.
    """
    lost = []
    for process in psutil.Process(triton).children():
        with contextlib.suppress(psutil.Error):
            if process.status() == psutil.STATUS_ZOMBIE and STUB.startswith(process.name()):
                lost.append(process.pid)
    return lost


def how_it_ended(pid: int) -> str | None:
    """How a process ended, in words; None if it lives. The exit code is the last field in proc(5)'s stat."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return "it ended"
    if fields[0] not in "ZX":
        return None
    status = int(fields[-1])
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return f"it was ended by {signal.Signals(number).name}" + (
            ", which the kernel sends where memory runs out" if number == signal.SIGKILL else ""
        )
    return f"it ended with exit code {os.waitstatus_to_exitcode(status)}"


def reason_in(text: str) -> str:
    """What Triton's log says: why the models failed to load, else its errors, else its last lines."""
    entries = re.findall(r'^E\d{4} [\d:.]+ +\d+ \S+\] +"?(.*?)"?\s*$', text, re.MULTILINE)
    errors = [entry for entry in entries if not entry.startswith("CudaDriverHelper")]  # logged wherever there is no GPU
    plain = [line for line in text.splitlines() if line.strip() and line[0] not in "+|"]
    lines = [entry for entry in errors if entry.startswith("failed to load")] or errors or plain
    return "\n".join(dict.fromkeys(lines[-10:])).replace("\\n", "\n").strip() or "it wrote nothing"


def namespace() -> str:
    """How names in /dev/shm begin here; containers can share it, and their process ids mean nothing to each other."""
    return f"{PREFIX}{os.stat('/proc/self/ns/pid').st_ino}-"


def sweep() -> None:
    """Remove what servers left behind whose owner was killed, because nobody called remove() for them.

    A model's process that was busy when its Triton was killed can wait for it forever.
    """
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if any(is_left(part) for word in process.cmdline() if namespace() in word for part in word.split("/")):
                process.kill()
    for path in SHM.glob(f"{namespace()}*"):
        if is_left(path.name):
            remove(path)


def is_left(name: str) -> bool:
    """Return whether a name in /dev/shm belongs to a server whose owner has ended."""
    owner = name.removeprefix(namespace()).partition("-")[0]
    return name.startswith(namespace()) and not Path("/proc", owner).exists()


def remove(folder: Path) -> None:
    """Remove a server's folder and its shared memory beside it, as far as they are there and ours."""
    found = list[Path]()
    with contextlib.suppress(OSError):  # not even the list can be read without file descriptors
        found += list(SHM.glob(f"{folder.name}*"))
    for path in found:
        with contextlib.suppress(OSError):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
