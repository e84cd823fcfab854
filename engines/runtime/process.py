"""The engine process: it holds all engines of a server, and so of a GPU, and runs them one at a time.

    python -m ditforge.engines.runtime.process FOLDER LISTENER SERVER

is how rendezvous.py starts it, with the file descriptors of a socket that listens in FOLDER, and of the server's
process. Each connection is one engine. The process ends when the last one is closed, or when the server has ended.

Each process with a CUDA context takes hundreds of MiB of a GPU's memory before any weights, and memory for activations
that none shares with another; hence one process. It runs one call at a time on a device: two at once would take turns
on the GPU all the same, and need memory for both. One thread does so for each device, because libraries take memory for
every thread that uses them: cuBLAS 32 MiB of the GPU, and OpenMP threads of its own.
"""

from __future__ import annotations

import faulthandler
import fcntl
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ditforge.engines.compilers import Arrays, LoadedEngine, find_compiler
from ditforge.engines.runtime import rendezvous
from ditforge.engines.runtime.loading import load_engine
from ditforge.engines.runtime.messages import Line, Memory, room
from ditforge.errors import DitforgeError, UserError
from ditforge.manifest import Engine, File

FIRST_CLIENT = 30.0  # seconds that it waits for one: whoever started it may have been killed meanwhile
SOON = 0.05  # seconds
CPU = "cpu"
T = TypeVar("T")


class EngineProcess:
    """Accepts clients on `listener` until the last one has gone, or the process behind the pidfd `server` has ended."""

    def __init__(self, folder: Path, listener: socket.socket, server: int) -> None:
        self.folder, self.listener, self.server = folder, listener, server
        self.threads = {CPU: ThreadPoolExecutor(1), "gpu": ThreadPoolExecutor(1)}
        self.clients = 0
        self.left, self.leaving = socket.socketpair()  # a byte for each client that has gone

    def serve(self) -> None:
        """Accept clients. Returns when there are none any more."""
        poll = select.poll()
        for file in (self.listener.fileno(), self.server, self.left.fileno()):
            poll.register(file, select.POLLIN)
        came = False
        while True:
            patience = None if self.clients else SOON if came else FIRST_CLIENT
            ready = {file for file, _ in poll.poll(patience and patience * 1000)}
            if self.server in ready:
                return
            if self.left.fileno() in ready:
                self.clients -= len(self.left.recv(1 << 12))
            if self.listener.fileno() in ready:
                self.accept()
                came = True
            elif not self.clients and self.may_leave():
                return

    def accept(self) -> None:
        """Begin to serve a client that has connected."""
        try:
            connection, _ = self.listener.accept()
        except OSError:  # such as for want of file descriptors; the client waits
            time.sleep(SOON)
            return
        self.clients += 1
        threading.Thread(target=self.attend, args=[connection], daemon=True).start()

    def may_leave(self) -> bool:
        """Close the socket for good, unless somebody has connected, or is about to: they do so under the lock."""
        try:
            descriptor = os.open(self.folder / rendezvous.LOCK, os.O_RDWR)
        except OSError:
            return True  # the folder was removed, so nobody can come
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if select.select([self.listener], [], [], 0)[0]:
                return False
            rendezvous.leave(self.folder)
            return True
        except BlockingIOError:
            return False
        finally:
            os.close(descriptor)

    def attend(self, connection: socket.socket) -> None:
        """Serve one client until it has gone."""
        client = Client(Line(connection), self.threads)
        try:
            client.serve()
        except (EOFError, OSError):
            pass
        finally:
            client.close()
            connection.close()
            self.leaving.send(b"-")


class Client:
    """One client, and its engine once that is loaded."""

    def __init__(self, line: Line, threads: dict[str, ThreadPoolExecutor]) -> None:
        self.line, self.threads = line, threads
        self.device = CPU
        self.engine: LoadedEngine | None = None
        self.pinned: set[int] = set()

    def on_device(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call a function in the device's thread, when those that came before are done, and return what it returns."""
        return self.threads[self.device].submit(function, *arguments).result()

    def serve(self) -> None:
        """Answer. Raises EOFError or OSError when the client has gone."""
        while True:
            message = self.line.receive()
            try:
                answer = {"load": self.load, "run": self.run, "prepare": self.prepare}[message["call"]](message)
            except UserError as error:
                answer = {"error": UserError.__name__, "problem": error.problem, "fix": error.fix}
            except DitforgeError as error:
                answer = {"error": DitforgeError.__name__, "problem": error.problem, "fix": error.fix}
            except Exception as error:  # an engine's errors are of many kinds
                answer = {"error": type(error).__name__, "problem": str(error), "fix": ""}
            failed = self.device != CPU and answer.get("error") not in (None, UserError.__name__)
            lost = failed and not self.on_device(recover)  # while no engine computes or records a graph
            if not lost or message["call"] != "run":  # a call that is lost with the process is repeated by its client
                self.line.send(answer)
            if lost:
                os._exit(1)

    def prepare(self, message: dict[str, Any]) -> dict[str, Any]:
        """Do in advance what takes long before the first engine is loaded. What fails here, loading fails at too."""
        for compiler, target in message["engines"]:
            self.threads[device_of(target)].submit(find_compiler(compiler).prepare, target).result()
        return {}

    def load(self, message: dict[str, Any]) -> dict[str, Any]:
        """Load the engine. No engine of the device computes meanwhile, because it is also warmed up."""
        made = Engine.model_validate(message["made"])
        files = {name: File.model_validate(file) for name, file in message["files"].items()}
        self.device = device_of(made.target)
        self.engine = self.on_device(load_engine, Path(message["folder"]), files, made)
        self.line.begin(1)  # now, when there are file descriptors for it
        return {"inputs": self.engine.inputs, "outputs": self.engine.outputs}

    def run(self, message: dict[str, Any]) -> dict[str, Any]:
        """Run the engine, and place its outputs where the client sees them."""
        parts = [{name: self.take(place) for name, place in part.items()} for part in message["parts"]]
        return {"outputs": self.on_device(self.compute, parts)}

    def compute(self, parts: list[Arrays]) -> dict[str, list[Any]]:
        """Run the engine, and return where its outputs are."""
        assert self.engine is not None, "it is loaded first"
        if self.device != CPU:
            self.pin()
        outputs = self.engine.run_batch(parts)
        self.line.begin(sum(room(array.nbytes) for array in outputs.values()))
        if self.device != CPU:
            self.pin()
        return {name: self.put(array) for name, array in outputs.items()}

    def take(self, place: list[Any]) -> NDArray[Any]:
        """An input. What computes on the CPU takes numbers to be aligned, which in Triton's memory they are not."""
        array = self.line.array(place)
        return array if self.device != CPU or array.flags.aligned else array.copy()

    def put(self, array: Any) -> list[Any]:
        """Copy an output of NumPy's or CuPy's to where the client sees it, and say where that is."""
        place, there = self.line.place(array.dtype, array.shape)
        if isinstance(array, np.ndarray):
            there[...] = array
        else:
            array.get(out=there)
        return place

    def pin(self) -> None:
        """Have CUDA copy from and to the client's memory directly: pageable memory it copies once more."""
        for memory in (*self.line.memory.values(), self.line.written):
            if memory is not None and (address := memory.bytes.ctypes.data) not in self.pinned:
                self.pinned.add(address)
                pin(memory)
                weakref.finalize(memory.bytes, self.pinned.discard, address)

    def close(self) -> None:
        """Free the engine."""
        if self.engine is not None:
            with suppress(Exception):
                self.on_device(self.engine.close)
            self.engine = None


def device_of(target: str) -> str:
    """On what an engine for this target computes, one call at a time."""
    return CPU if target == CPU else "gpu"


def pin(memory: Memory) -> None:
    """Register memory with CUDA for as long as it is mapped. Where that is impossible, copies are slower."""
    address = memory.bytes.ctypes.data
    try:
        if "cupy" in sys.modules:
            import cupy

            cupy.cuda.runtime.hostRegister(address, memory.bytes.nbytes, 0)
            unregister = cupy.cuda.runtime.hostUnregister
        elif "torch" in sys.modules:
            from ditforge.engines.runtime import staging

            staging.pin(address, memory.bytes.nbytes)
            unregister = staging.unpin
        else:
            return
    except Exception as error:  # a driver's or a library's
        warnings.warn(f"memory cannot be pinned ({error}): copies to the GPU are slower", stacklevel=2)
    else:
        weakref.finalize(memory.bytes, unregister, address)  # before it is unmapped, because the mapping is its base


def recover() -> bool:
    """Give back what a call that failed has left on the GPU. Returns False where CUDA is done for.

    After some errors, such as an illegal address, every call of CUDA in the process fails for ever. The process then
    has to end, and clients start another one.
    """
    try:
        if "cupy" in sys.modules:
            import cupy

            cupy.cuda.runtime.deviceSynchronize()
            cupy.get_default_memory_pool().free_all_blocks()
        if "torch" in sys.modules:
            import torch

            if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        return False
    return True


def main() -> None:
    """Serve on the file descriptors that the command line names."""
    faulthandler.enable(all_threads=False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server, which may still need the engines
    folder, listener, server = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    process = EngineProcess(folder, socket.socket(fileno=listener), server)
    process.serve()
    sys.stderr.flush()
    os._exit(0)  # at once: what threads still compute, nobody waits for


if __name__ == "__main__":
    main()
