"""Inductor as a compiler: PyTorch's ahead-of-time compiler, one package for each kind of block of a network.

It compiles on the GPU that executes, or for the CPU. The packages hold no weights: equal blocks share one, and weights
can be streamed. Source: https://docs.pytorch.org/docs/stable/torch.compiler_aot_inductor.html
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version as installed_version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditforge import cxx_compiler, digests, install_hint, regions, temporary_folder
from ditforge.engines import gpus
from ditforge.engines.compilers import NUMPY_DTYPES, Compiler, Job, Progress, Ranges, Shape, side_by_side
from ditforge.engines.compilers.child_process import call_apart
from ditforge.engines.compilers.inductor_engine import PACKAGE, SUFFIX, WEIGHTS, Description, Variant
from ditforge.engines.compilers.side_by_side import Add, Task
from ditforge.engines.gpus import CPU, Target
from ditforge.errors import UserError
from ditforge.manifest import NEXT_COMMAND, Component
from ditforge.regions import Call, Regions, Stored

if TYPE_CHECKING:
    import torch

    from ditforge.engines.compilers.region_lowering import Lowered
    from ditforge.engines.runtime.inductor import Execution

NAME = "inductor"
DEVICES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "sm_121")
LIBRARIES = 512 * 2**20  # bytes: kernels of PyTorch, cuBLAS and cuDNN, and the room in which cuBLAS works
SETTINGS: dict[str, Any] = {}
CPU_SETTINGS: dict[str, Any] = {"aot_inductor.compile_wrapper_opt_level": "O0"}
# Kernels are compiled by the process itself, and not by processes that it would start. Modules of PyTorch ask whether
# there is a GPU when they are imported: had they asked CUDA and not NVML, no fork of the process could use it.
ENVIRONMENT = {"TORCHINDUCTOR_COMPILE_THREADS": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
log = logging.getLogger(__name__)


def version() -> str:
    """The installed PyTorch's version. Raises UserError if there is none."""
    try:
        return installed_version("torch")
    except PackageNotFoundError as error:
        raise UserError("PyTorch is not installed", install_hint.install("inductor")) from error


def settings() -> dict[str, str]:
    """The compiler's settings."""
    return {"build_flags": " ".join(f"{name}={value}" for name, value in SETTINGS.items())}


def check(name: str, component: Component, target: Target) -> None:
    """Raise UserError without a C++ compiler, or if the target is not this machine's GPU, or out of PyTorch's reach.

    Also raises it where no temporary files can be written, which Inductor and the C++ compiler do.
    """
    version()
    temporary_folder.check()
    if not cxx_compiler.works():
        raise UserError(f"{NAME} needs a C++ compiler, and {cxx_compiler.name()} is none", cxx_compiler.fix())
    if not any(file.endswith(regions.SUFFIX) for file in component.files):
        problem = f"the export has no programs of {name}, which {NAME} compiles: an older ditforge made it"
        raise UserError(problem, f"{NEXT_COMMAND['onnx']}   again")
    if not target.capabilities:
        return
    here = gpus.local_target()
    if here.capabilities != target.capabilities:
        raise UserError(
            f"{NAME} compiles on the GPU itself, and this machine's is {here} ({here.name}), not {target}",
            f"ditforge build   on a machine with {target}",
        )
    import torch

    if not torch.cuda.is_available():
        problem = f"PyTorch {torch.__version__} is a build without CUDA, or too new for the driver"
        raise UserError(problem, "install PyTorch for your CUDA version: https://pytorch.org/get-started")


def compile(job: Job) -> list[Path]:
    """Compile the network's programs, and write ENGINE.inductor, ENGINE.safetensors and the packages."""
    return compile_together([job], job.progress)[0]


def compile_together(jobs: Sequence[Job], progress: Progress) -> list[list[Path]]:
    """Compile networks as `compile` does, side by side, and return the files of each."""
    tasks = []
    for job in jobs:
        silent = replace(job, progress=print)  # which can be pickled; it is not called
        size = sum(file.size for file in job.component.files.values())
        tasks.append(Task(job.name, f"{job.name}: weights", compile_network, (silent,), size))
    return do_apart(tasks, device_of(jobs[0].target), progress)


def device_of(target: Target) -> str:
    """PyTorch's name of the device that a target is."""
    return "cuda" if target.capabilities else CPU


def do_apart(tasks: Sequence[Task], device: str, progress: Progress) -> list[Any]:
    """Do tasks of compiling, and those that they add, in processes of their own. Returns what `tasks` return."""
    names = ", ".join(dict.fromkeys(task.name for task in tasks))
    return call_apart(do_in_forks, tasks, device, name=names, progress=progress, environment=ENVIRONMENT)


def do_in_forks(tasks: Sequence[Task], device: str, *, progress: Progress) -> list[Any]:
    """Do tasks in forks of this process, which has nothing but them to do."""
    begun = time.perf_counter()
    prepare(device)
    at_once = side_by_side.how_many()
    log.info("PyTorch is imported after %.1f s; %d tasks are done at a time", time.perf_counter() - begun, at_once)
    return side_by_side.run(tasks, at_once, progress)


def prepare(device: str) -> None:
    """Import what compiling takes, and find out what all packages must know, without using a GPU.

    What is left out here, each task does by itself: torch.utils.cpp_extension asks CUDA for a GPU if there is an nvcc.
    """
    from torch._inductor import cpu_vec_isa

    from ditforge.engines.compilers import region_packages, region_weights  # noqa: F401

    if device == CPU:
        cpu_vec_isa.valid_vec_isa_list()


def compile_network(job: Job, *, add: Add) -> list[Path]:
    """Compile a network: add the tasks that write its packages, and write its weights and its description meanwhile."""
    import onnx_ir as ir

    from ditforge.engines.compilers.region_weights import as_torch

    archive = job.graph.with_suffix(regions.SUFFIX)
    initializers = ir.load(job.graph).graph.initializers
    program, weight = partial(regions.read_program, archive), lambda name: as_torch(initializers[name])
    return compile_programs(job, regions.read(archive), program, weight, add)


def compile_programs(
    job: Job, found: Regions, program: Callable[[str], bytes], weight: Callable[[str], torch.Tensor], add: Add
) -> list[Path]:
    """Compile a network's regions, and return the files written, of which the tasks that are added write the packages.

    `program` returns the program of a kind of region as torch.export saved it, and `weight` a stored weight by the name
    of its initializer. Raises UserError if this PyTorch cannot read a program.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from ditforge.engines.compilers import region_weights
    from ditforge.engines.compilers.package_cache import Example, Package
    from ditforge.engines.compilers.region_packages import LargestKernel, room_on, tasks_of

    begun = time.perf_counter()
    device = torch.device(device_of(job.target))
    kinds, lowered, parts = lower_kinds(found, program, device)
    variants: list[Variant] = []
    packages: list[Package] = []
    kernel = LargestKernel()
    for smallest, largest in [pair for shapes in job.shapes or [{}] for pair in ranges_of(shapes, job.component)]:
        with FakeTensorMode(allow_non_fake_inputs=True), kernel:
            tensors = [
                trace_sizes(job.component, found, kinds, lowered, sizes, device) for sizes in (smallest, largest)
            ]
        sizes = " ".join("x".join(map(str, shape)) for shape in largest.values())
        paths = {kind: job.engine.with_name(f"{job.engine.name}-{len(variants)}-{kind}{PACKAGE}") for kind in parts}
        for kind, path in paths.items():
            part = parts[kind]
            examples = tuple(Example.between(*(known[name] for known in tensors)) for name in part.call.inputs)
            more = SETTINGS if device.type == "cuda" else CPU_SETTINGS
            packages.append(
                Package(path, f"{kind} for {sizes}", part.content, examples, part.stored, device.type, more)
            )
        names = {kind: path.name for kind, path in paths.items()}
        variants.append(Variant(smallest=smallest, largest=largest, packages=names))
    add(tasks_of(job.name, packages), room_on(device, kernel.bytes))
    planned = time.perf_counter()
    weights = job.engine.with_name(job.engine.name + WEIGHTS)
    calls = region_weights.write(weights, found, kinds, lowered, weight)
    written = time.perf_counter()
    digests.sha256_of(weights)  # which is remembered, and so not made by the build, after all networks
    spent = planned - begun, written - planned, time.perf_counter() - written
    log.info("%s: planned in %.1f s, weights written in %.1f s and hashed in %.1f s", job.name, *spent)
    description = Description(
        inputs=job.component.inputs, outputs=job.component.outputs, calls=tuple(calls), variants=tuple(variants)
    )
    path = job.engine.with_name(job.engine.name + SUFFIX)
    path.write_text(description.model_dump_json(indent=1))
    return [path, weights, *(one.path for one in packages)]


@dataclass(frozen=True)
class Part:
    """A kind of region: its program as torch.export saved it, a call of it, and how the weights of that are stored."""

    content: bytes
    call: Call
    stored: tuple[Stored, ...]


def lower_kinds(
    found: Regions, program: Callable[[str], bytes], device: torch.device
) -> tuple[list[str], dict[str, Lowered], dict[str, Part]]:
    """Return the kind of each call, and by kind the lowered program and what it was made of.

    Calls of the same program are of several kinds if different weights of them are in 8 bits.
    """
    from ditforge.engines.compilers.region_lowering import formats_of

    kinds: list[str] = []
    names: dict[tuple[str, object], str] = {}
    lowered: dict[str, Lowered] = {}
    parts: dict[str, Part] = {}
    for call in found.calls:
        stored = [found.weights[name] for name in call.weights]
        key = (call.kind, formats_of(stored))
        if key not in names:
            same = sum(kind == call.kind for kind, _ in names)
            names[key] = name = f"{call.kind}-as-{same + 1}" if same else call.kind
            parts[name] = part = Part(program(call.kind), call, tuple(stored))
            lowered[name] = lower_kind(part, found, device)
        kinds.append(names[key])
    return kinds, lowered, parts


def lower_kind(part: Part, found: Regions, device: torch.device) -> Lowered:
    """Lower the program of a kind of region. Raises UserError if this PyTorch cannot read it."""
    from ditforge.engines.compilers.region_lowering import Lowered, load_program

    try:
        program = load_program(part.content)
    except Exception as error:  # what torch.export raises has no common class
        problem = f"PyTorch {version()} cannot read the programs that {found.torch} wrote into the export: {error}"
        raise UserError(" ".join(problem.split())[:500], f"{NEXT_COMMAND['onnx']}   again, with it") from error
    return Lowered(program, len(part.call.inputs), part.stored, device, exact=device.type == CPU)


def ranges_of(shapes: Ranges, component: Component) -> Iterator[tuple[dict[str, Shape], dict[str, Shape]]]:
    """Return the ranges of shapes that become packages of their own: the best shape alone, and then all of them."""
    fixed = {
        name: tuple(int(dim) for dim in tensor.shape)
        for name, tensor in component.inputs.items()
        if not any(isinstance(dim, str) for dim in tensor.shape)
    }
    smallest, best, largest = ({**fixed, **{name: of[i] for name, of in shapes.items()}} for i in range(3))
    yield best, best
    if smallest != largest:
        yield smallest, largest


def trace_sizes(
    component: Component,
    found: Regions,
    kinds: Sequence[str],
    lowered: Mapping[str, Lowered],
    sizes: Mapping[str, Shape],
    device: torch.device,
) -> dict[str, torch.Tensor]:
    """Return all tensors that regions give to each other, as fake tensors, for inputs of these shapes."""
    import torch

    from ditforge.engines.compilers.region_lowering import run_fake

    inputs = {
        name: torch.empty(sizes[name], dtype=getattr(torch, NUMPY_DTYPES[tensor.dtype].__name__), device=device)
        for name, tensor in component.inputs.items()
    }
    return run_fake(lowered, found.calls, kinds, inputs)


def prepare_to_load(target: str) -> None:
    """Import PyTorch, and set up what all engines of a process share on the GPU."""
    from ditforge.engines.runtime.inductor import shared

    if target != CPU:
        shared()


def load(files: list[Path], target: str, built_with: str) -> Execution:
    """Load the engine. Raises UserError if it is for another GPU, or if another PyTorch compiled it."""
    from ditforge.engines.runtime.inductor import load_engine

    return load_engine(files, target, built_with, version())


def load_frugally(files: list[Path], target: str, built_with: str, budget: int | None) -> Execution:
    """Load the engine without CUDA graphs, and with at most `budget` bytes of weights in the GPU's memory."""
    from ditforge.engines.runtime.inductor import load_engine

    return load_engine(files, target, built_with, version(), budget, graphs=False)


COMPILER = Compiler(
    name=NAME,
    executes={CPU: ("fp32", "fp16", "bf16", "fp8", "fp8-weights", "int8-weights")}
    | {device: tuple(gpus.precisions(device)) for device in DEVICES},
    version=version,
    settings=settings,
    check=check,
    compile=compile,
    load=load,
    prepare=prepare_to_load,
    reads="programs",
    compiles_on="the target",
    load_frugally=load_frugally,
    shares_activations=True,
    records_graphs=True,
    libraries=LIBRARIES,
    together=compile_together,
    holds_weights=False,
    rank=30,
)
