"""Compile lowered programs of regions into packages, several at a time where the machine has the processors.

Compiling a package keeps a processor busy for a minute. Where there are several, each package is compiled by a process
of its own.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from ditforge.engines.compilers import Progress, package_cache
from ditforge.engines.compilers.child_process import call_apart
from ditforge.engines.compilers.package_cache import Package
from ditforge.engines.compilers.region_lowering import Lowered, load_program, lower
from ditforge.engines.runtime.inductor import load_package
from ditforge.errors import DitforgeError

MOST = 8  # packages that are compiled at a time
PROCESSORS = 2  # that each of them gets
GPU_MEMORY = 2 * 2**30  # bytes that each may take on the GPU, to see which kernel is the fastest
# The headers of PyTorch would be compiled once for all packages of a process, which takes longer than they save one.
APART = {"aot_inductor.precompile_headers": False}
# Kernels are compiled by the process itself, and not by processes that it would start.
ENVIRONMENT = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
ATTENTION = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
log = logging.getLogger(__name__)


def compile_packages(name: str, packages: Sequence[Package], progress: Progress) -> None:
    """Write the packages of the network `name`: from the cache, or compiled. Raises DitforgeError if one cannot be."""
    kept = package_cache.Packages()
    missing = [package for package in packages if not kept.take(package)]
    at_once, done, lock = how_many(missing), len(packages) - len(missing), threading.Lock()
    log.info("%s: %d of %d packages are in the cache; %d are compiled at a time", name, done, len(packages), at_once)

    def compile_one(package: Package) -> None:
        nonlocal done
        if at_once == 1:
            progress(f"{name}: {package.kind}", done, len(packages))
            spent = compile_package(package, name)
        else:
            apart = package, name, folder, APART
            spent = call_apart(compile_in_child, *apart, name=name, progress=progress, environment=ENVIRONMENT)
        kept.keep(package)
        log.info("%s: %s: traced in %.1f s, compiled in %.1f s", name, package.kind, *spent)
        with lock:
            done += 1
            progress(f"{name}: {package.kind}", done, len(packages))

    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if at_once == 1:  # in this thread, which a test or a debugger sees
            for package in missing:
                compile_one(package)
            return
        with ThreadPoolExecutor(at_once) as pool:
            coming = [pool.submit(compile_one, package) for package in missing]
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


def compile_in_child(
    package: Package, name: str, folder: Path, more: Mapping[str, Any], *, progress: Progress
) -> tuple[float, float]:
    """Compile a package beside others, which time their kernels on the GPU one at a time: `folder` is theirs alone."""
    del progress  # of one package there is none
    with timing_alone(folder / "lock"):
        return compile_package(package, name, more)


@contextlib.contextmanager
def timing_alone(lock: Path) -> Iterator[None]:
    """Within this context, the configurations of a kernel are timed while no other process times its own."""
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    timed: Callable[..., Any] = CachingAutotuner.autotune_to_one_config

    def alone(*args: Any, **kwargs: Any) -> Any:
        with lock.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            return timed(*args, **kwargs)

    CachingAutotuner.autotune_to_one_config = alone  # type: ignore[method-assign]
    try:
        yield
    finally:
        CachingAutotuner.autotune_to_one_config = timed  # type: ignore[method-assign]


def compile_package(package: Package, name: str, more: Mapping[str, Any] | None = None) -> tuple[float, float]:
    """Compile a package, and load it. Returns the seconds of tracing and of compiling.

    `more` are settings beside its own. Raises DitforgeError if it fails.
    """
    begun = time.perf_counter()
    device = torch.device(package.device)
    program = Lowered(
        load_program(package.content), len(package.examples), package.stored, device, exact=device.type == "cpu"
    )
    examples = [torch.empty(one.shape, dtype=one.dtype, device=device) for one in package.examples]
    try:
        with attention_preferred(device), processor_unasked(device):
            lowered = lower(program, examples, [one.varying for one in package.examples])
            traced = time.perf_counter()
            torch._inductor.aoti_compile_and_package(
                lowered, package_path=str(package.path), inductor_configs={**package.settings, **(more or {})}
            )
        load_package(package.path, device)  # with a C++ compiler that does not suit PyTorch, this would crash
    except Exception as error:  # the compiler's have no common class
        reason = " ".join(str(error).split())[:1000]
        problem = f"Inductor cannot compile {package.kind} of {name}: {reason}"
        raise DitforgeError(problem, "report it with the export") from error
    return traced - begun, time.perf_counter() - traced


@contextlib.contextmanager
def attention_preferred(device: torch.device) -> Iterator[None]:
    """Within this context, attention is compiled to cuDNN's kernel where it has one, and else to the next best."""
    if device.type != "cuda":
        yield
        return
    with sdpa_kernel(ATTENTION, set_priority=True):
        yield


@contextlib.contextmanager
def processor_unasked(device: torch.device) -> Iterator[None]:
    """Within this context, Inductor does not find out which vector instructions the processor has, if it is for a GPU.

    It would compile and run a program for each kind of them, of which every one imports PyTorch: 47 of the 62 seconds
    that a package took on an H100's machine (PyTorch 2.11). What a package for a GPU does on the processor is to launch
    kernels.
    """
    from torch._inductor import cpu_vec_isa

    asked = cpu_vec_isa.valid_vec_isa_list
    if device.type == "cuda":
        cpu_vec_isa.valid_vec_isa_list = list  # type: ignore[assignment]
    try:
        yield
    finally:
        cpu_vec_isa.valid_vec_isa_list = asked
