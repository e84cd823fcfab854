"""The memory of this machine's first GPU: how much is used, and a card of less memory imitated by a neighbour.

A card of N GiB is imitated by a process that holds so much that N * 15/16 GiB are left, by a plain cudaMalloc: the part
that `ditforge plan` counts on (USABLE in engines/memory/memory_plan.py). A card of 24 GiB reports 24564 MiB, and its
driver keeps some 400 MiB of them; error correction or a screen takes up to 1/16. The CUDA context of whoever computes
lies in what is left, as on such a card. Memory is imitated alone: the speed is that of the card at hand and of its bus.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from gpu_run import GIB, Failed, end, line_of, started, why

from ditforge import local_gpu
from ditforge.engines.memory.memory_plan import USABLE
from ditforge.errors import UserError

PATIENCE = 120.0  # seconds within which a neighbour starts, or takes memory
EVERY = 0.02  # seconds between two looks at the GPU's memory
NEIGHBOUR = """
import ctypes, sys
cuda = ctypes.CDLL("libcuda.so.1")
def call(name, *arguments):
    if error := getattr(cuda, name)(*arguments):
        raise SystemExit(f"{name} failed with CUDA's error {error}")
device, context, held = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
call("cuInit", 0)
call("cuDeviceGet", ctypes.byref(device), 0)
call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
call("cuCtxSetCurrent", context)
print("ready", flush=True)
for line in sys.stdin:
    if held:
        call("cuMemFree_v2", held)
    held = ctypes.c_void_p()
    if int(line) > 0:  # CUDA allocates no 0 bytes
        call("cuMemAlloc_v2", ctypes.byref(held), ctypes.c_size_t(int(line)))
    print("holds", int(line), flush=True)
"""


def has_gpu() -> bool:
    """Whether this machine has a GPU that its driver can find."""
    try:
        return bool(local_gpu.local_gpus())
    except UserError:
        return False


class Gpu:
    """The first GPU, asked through NVML, which needs no CUDA context. `nvml` is the module pynvml."""

    def __init__(self) -> None:
        import pynvml

        self.nvml: ModuleType = pynvml
        pynvml.nvmlInit()
        self.device: Any = pynvml.nvmlDeviceGetHandleByIndex(0)
        self.total = int(pynvml.nvmlDeviceGetMemoryInfo(self.device).total)

    @property
    def free(self) -> int:
        """The bytes that nobody has taken."""
        return int(self.nvml.nvmlDeviceGetMemoryInfo(self.device).free)

    @property
    def used(self) -> int:
        """The bytes that are not free, those that the driver keeps among them."""
        return self.total - self.free


def processes() -> list[str]:
    """What nvidia-smi says of processes on the GPU, a line each, without folders; in a container it may see none."""
    command = ["nvidia-smi", "--query-compute-apps=pid,process_name,used_memory", "--format=csv,noheader"]
    try:
        made = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return [str(error)]
    return [re.sub(r"\S*/", "", line) for line in made.stdout.splitlines()]


class Watch:
    """Looks at the GPU's memory every 20 ms in a thread. `peak` is the largest use beside `before` bytes."""

    def __init__(self, gpu: Gpu, before: int) -> None:
        self.gpu, self.before, self.largest = gpu, before, 0
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True)

    def run(self) -> None:
        """Look until it is over."""
        while not self.over.wait(EVERY):
            self.largest = max(self.largest, self.gpu.used)

    @property
    def peak(self) -> int:
        """The largest number of bytes so far that others than those before had taken."""
        return max(0, self.largest - self.before)

    def again(self) -> None:
        """Forget the peak."""
        self.largest = 0

    def __enter__(self) -> Watch:
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.over.set()
        self.thread.join()


class Neighbour:
    """A process with a CUDA context that holds as much of the GPU's memory as it is told."""

    def __init__(self, gpu: Gpu, log: Path) -> None:
        self.gpu, self.log, self.holds = gpu, log, 0
        command = [sys.executable, "-c", NEIGHBOUR]
        self.process = started(command, log, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            self.answer("ready")
        except BaseException:
            end(self.process, grace=0)
            raise
        self.context = gpu.used  # of nobody else, if the GPU is ours

    def answer(self, word: str) -> list[str]:
        """The next line of the process, which begins with `word`. Raises Failed if it does not."""
        words = line_of(self.process, PATIENCE).split()
        if words[:1] != [word]:
            raise Failed(f"the neighbour on the GPU ended: {why(self.log)}")
        return words

    def leave(self, size: int) -> None:
        """Hold all but `size` bytes, which others may take, or have taken."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{self.gpu.total - self.context - size}\n".encode())
        self.process.stdin.flush()
        self.holds = int(self.answer("holds")[1])

    @property
    def taken(self) -> int:
        """The bytes that it takes, and whoever was there before it."""
        return self.context + self.holds


def usable(card: float) -> int:
    """The bytes of a card of so many GiB that engines can have, as `ditforge plan` counts them."""
    return int(card * GIB * USABLE)


@contextlib.contextmanager
def neighbour(gpu: Gpu | None, log: Path) -> Iterator[Neighbour | None]:
    """A neighbour for the duration of the block; None without a GPU."""
    if gpu is None:
        yield None
        return
    made = Neighbour(gpu, log)
    try:
        yield made
    finally:
        end(made.process, grace=1)


@contextlib.contextmanager
def watching(gpu: Gpu | None, before: int) -> Iterator[Watch | None]:
    """A watch for the duration of the block; None without a GPU."""
    if gpu is None:
        yield None
        return
    with Watch(gpu, before) as watch:
        yield watch
