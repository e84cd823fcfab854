"""Compile lowered programs of regions into packages, several at a time where the machine has the processors.

Compiling a package keeps one processor busy, mostly with C++. Where there are several, each package is compiled by a
process of its own.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from ditforge.engines.compilers import Progress, Shape
from ditforge.engines.compilers.child_process import call_apart
from ditforge.engines.compilers.region_lowering import Lowered, load_program, lower
from ditforge.engines.runtime.inductor import load_package
from ditforge.errors import DitforgeError
from ditforge.regions import Stored

MOST = 8  # packages that are compiled at a time
PROCESSORS = 2  # that each of them gets
GPU_MEMORY = 2 * 2**30  # bytes that each may take on the GPU, to see which kernel is the fastest
# The headers of PyTorch would be compiled once for all packages of a process, which takes longer than they save one.
APART = {"aot_inductor.precompile_headers": False}
# Kernels are compiled by the process itself, and not by processes that it would start.
ENVIRONMENT = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
ATTENTION = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass(frozen=True)
class Example:
    """A tensor that a program takes: its largest shape, its dtype, and which of its dimensions vary."""

    shape: Shape
    dtype: torch.dtype
    varying: frozenset[int] = frozenset()

    @classmethod
    def between(cls, small: torch.Tensor, large: torch.Tensor) -> Example:
        """An example of all sizes between those of two tensors."""
        pairs = enumerate(zip(small.shape, large.shape, strict=True))
        return cls(tuple(large.shape), large.dtype, frozenset(axis for axis, (low, high) in pairs if low < high))


@dataclass(frozen=True)
class Package:
    """A package to compile.

    path: the file to write. kind: what it is, for people.
    content: the program as torch.export saved it. examples: what it takes before the weights, which are `stored` so.
    device: "cuda" or "cpu". settings: Inductor's.
    """

    path: Path
    kind: str
    content: bytes
    examples: tuple[Example, ...]
    stored: tuple[Stored, ...]
    device: str
    settings: Mapping[str, Any] = field(default_factory=dict)


def compile_packages(name: str, packages: Sequence[Package], progress: Progress) -> None:
    """Compile the packages of the network `name`. Raises DitforgeError if one cannot be compiled."""
    at_once = how_many(packages)
    if at_once == 1:
        for done, package in enumerate(packages):
            progress(f"{name}: {package.kind}", done, len(packages))
            compile_package(package, name)
        return
    done = 0

    def compile_one(package: Package) -> None:
        nonlocal done
        apart = (package, name, lock, APART)
        call_apart(compile_in_child, *apart, name=name, progress=progress, environment=ENVIRONMENT)
        done += 1
        progress(f"{name}: {package.kind}", done, len(packages))

    with TemporaryDirectory() as folder, ThreadPoolExecutor(at_once) as pool:
        lock = Path(folder) / "lock"
        lock.touch()
        coming = [pool.submit(compile_one, package) for package in packages]
        try:
            for one in coming:
                one.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def how_many(packages: Sequence[Package]) -> int:
    """How many of the packages are compiled at a time, by the machine's processors and the GPU's free memory."""
    limits = [len(packages), MOST, len(os.sched_getaffinity(0)) // PROCESSORS]
    if any(package.device == "cuda" for package in packages):
        limits.append(torch.cuda.mem_get_info()[0] // GPU_MEMORY)
    return max(1, min(limits))


def compile_in_child(package: Package, name: str, lock: Path, more: Mapping[str, Any], *, progress: Progress) -> None:
    """Compile a package beside others, which time their kernels on the GPU one at a time."""
    del progress  # of one package there is none
    with timing_alone(lock):
        compile_package(package, name, more)


@contextlib.contextmanager
def timing_alone(lock: Path) -> Iterator[None]:
    """Within this context, the configurations of a kernel are timed while no other process times its own."""
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    timed: Callable[..., Any] = CachingAutotuner.autotune_to_one_config

    def alone(*args: Any, **kwargs: Any) -> Any:
        with lock.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            return timed(*args, **kwargs)

    CachingAutotuner.autotune_to_one_config = alone
    try:
        yield
    finally:
        CachingAutotuner.autotune_to_one_config = timed


def compile_package(package: Package, name: str, more: Mapping[str, Any] | None = None) -> None:
    """Compile a package, and load it. `more` are settings beside its own. Raises DitforgeError if it fails."""
    device = torch.device(package.device)
    program = Lowered(
        load_program(package.content), len(package.examples), package.stored, device, exact=device.type == "cpu"
    )
    examples = [torch.empty(one.shape, dtype=one.dtype, device=device) for one in package.examples]
    try:
        with attention_preferred(device):
            lowered = lower(program, examples, [one.varying for one in package.examples])
            torch._inductor.aoti_compile_and_package(
                lowered, package_path=str(package.path), inductor_configs={**package.settings, **(more or {})}
            )
        load_package(package.path, device)  # with a C++ compiler that does not suit PyTorch, this would crash
    except Exception as error:  # the compiler's have no common class
        reason = " ".join(str(error).split())[:1000]
        problem = f"Inductor cannot compile {package.kind} of {name}: {reason}"
        raise DitforgeError(problem, "report it with the export") from error


@contextlib.contextmanager
def attention_preferred(device: torch.device) -> Iterator[None]:
    """Within this context, attention is compiled to cuDNN's kernel where it has one, and else to the next best."""
    if device.type != "cuda":
        yield
        return
    with sdpa_kernel(ATTENTION, set_priority=True):
        yield
