"""Compile lowered programs of regions into packages: each is a task of its own (side_by_side.py)."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ditforge import temporary_folder, write_errors
from ditforge.engines.compilers import package_cache
from ditforge.engines.compilers.package_cache import Package
from ditforge.engines.compilers.region_lowering import Lowered, load_program, lower
from ditforge.engines.compilers.side_by_side import FORK, Add, Task
from ditforge.engines.runtime.inductor import load_package
from ditforge.errors import DitforgeError, UserError

CONTEXT = 2**30  # bytes of the GPU's memory that each process takes beside the tensors of the kernels that it times
# The headers of PyTorch would be compiled once for all packages of a process, which takes longer than they save one.
APART = {"aot_inductor.precompile_headers": False}
ATTENTION = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
TIMING = FORK.Lock()  # which all forks of this process have: kernels are timed on the GPU by one of them at a time
log = logging.getLogger(__name__)


def tasks_of(name: str, packages: Sequence[Package]) -> list[Task]:
    """Take the packages of the network `name` that are in the cache, and return the tasks that write the others."""
    kept = package_cache.Packages()
    missing = [package for package in packages if not kept.take(package)]
    log.info("%s: %d of %d packages are in the cache", name, len(packages) - len(missing), len(packages))
    return [
        Task(
            name,
            f"{name}: {package.kind}",
            write_package,
            (package, name),
            len(package.content),
            makes=kept.path_of(package).name,
        )
        for package in missing
    ]


class LargestKernel(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within this context, `bytes` is the most that a single operator has taken and given, of all that were run."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = operator(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, results)) if isinstance(leaf, torch.Tensor)]
        self.bytes = max(self.bytes, sum({id(tensor): tensor.nbytes for tensor in tensors}.values()))
        return results


def room_on(device: torch.device, kernel: int) -> int | None:
    """How many packages can be compiled at a time by the free memory of the device. None: it is no limit.

    `kernel` is the most bytes that a kernel takes and gives. When kernels are timed, their tensors are there twice at
    most: a kernel that writes into what it reads is given a copy.
    """
    return int(torch.cuda.mem_get_info()[0] // (CONTEXT + 2 * kernel)) if device.type == "cuda" else None


def write_package(package: Package, name: str, *, add: Add) -> None:
    """Compile a package of the network `name` beside others, and keep it in the cache.

    It is taken from there if the same has been compiled meanwhile: blocks of several kinds can have equal programs.
    """
    del add  # of one package no other task comes
    if package_cache.Packages().take(package):
        log.info("%s: %s: the same as one that was compiled in this build", name, package.kind)
        return
    with timing_alone():
        spent = compile_package(package, name, APART)
    package_cache.Packages().keep(package)
    log.info("%s: %s: traced in %.1f s, compiled in %.1f s", name, package.kind, *spent)


@contextlib.contextmanager
def timing_alone() -> Iterator[None]:
    """Within this context, the configurations of a kernel are timed while no other process times its own."""
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    timed: Callable[..., Any] = CachingAutotuner.autotune_to_one_config

    def alone(*args: Any, **kwargs: Any) -> Any:
        with TIMING:
            return timed(*args, **kwargs)

    CachingAutotuner.autotune_to_one_config = alone  # type: ignore[method-assign]
    try:
        yield
    finally:
        CachingAutotuner.autotune_to_one_config = timed  # type: ignore[method-assign]


def compile_package(package: Package, name: str, more: Mapping[str, Any] | None = None) -> tuple[float, float]:
    """Compile a package, and load it. Returns the seconds of tracing and of compiling.

    `more` are settings beside its own. Raises DitforgeError if it fails, and UserError for want of space on a disk.
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
    except UserError:
        raise
    except Exception as error:  # the compiler's have no common class
        if write_errors.is_full(error):
            places = f"for temporary files in {temporary_folder.find()}, or for packages in {package.path.parent}"
            problem = f"Inductor cannot compile {package.kind} of {name}: there is no space left {places}"
            raise UserError(problem, temporary_folder.more_room()) from error
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
