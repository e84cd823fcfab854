"""`ditforge doctor`: what is installed on this machine, and what is missing for the other commands."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ditforge import cxx_compiler, install_hint, local_gpu, terminal
from ditforge.errors import UserError
from ditforge.local_gpu import LocalGpu
from ditforge.machine_memory import Memory, read_memory
from ditforge.reports import Json, show

if TYPE_CHECKING:
    from ditforge.engines.compilers import Compiler

# The extras that only some machines need → what they are needed for.
ON_GPU = {
    "tensorrt-rtx": "needed only to compile for GPUs",
    "tensorrt": "needed only where engines are compiled on a data-centre GPU",
    "gpu": "needed only where engines run on a GPU",
    "onnxruntime-gpu": "needed only where engines of onnxruntime run on a GPU",
}

ON_CPU, ON_CUDA = "onnxruntime", "onnxruntime-gpu"  # packages of one module: the latter also runs on GPUs
SAFE_TRITON = "26.07"  # deployments should run this release of NVIDIA's container, or a later one
SHM = Path("/dev/shm")
SHM_START = 72 << 20  # bytes: 8 MiB for each of the nine models as which Triton serves a Stable Diffusion 3.5
SHM_ENOUGH = 256 << 20  # bytes, including what large pictures need
NAMES, WIDE = 22, 10_000  # columns: the width of the names, and the width of a line that must not be wrapped
WHY_NEWER = f"to deploy, NVIDIA's container {SAFE_TRITON} or later: older ones have known crashes (docs/security.md)"


@dataclass(frozen=True)
class Finding:
    """What was found about a thing, and what to do about it. `fix` is empty if nothing is missing."""

    name: str
    found: str
    fix: str = ""


@dataclass(frozen=True)
class Machine:
    """What was found on this machine, in words and as numbers.

    The numbers are bytes, and None if the system does not tell them.
    """

    findings: tuple[Finding, ...]
    memory: Memory | None
    disk_free: int | None
    shm_free: int | None
    gpus: tuple[LocalGpu, ...]


def doctor(as_json: Json = False) -> None:
    """What this machine can do, and what to install for the rest.

    Example: ditforge doctor
    """
    show(examine(), say, as_json)


def say(machine: Machine) -> None:
    """Print a row for each finding."""
    for line in lines(machine.findings, shutil.get_terminal_size().columns if sys.stdout.isatty() else None):
        terminal.say(line)


def lines(findings: Iterable[Finding], columns: int | None) -> Iterator[str]:
    """The findings as lines of text for a terminal with so many columns, or for no terminal (None).

    What to do about a finding is on separate lines.
    """
    wrapper = textwrap.TextWrapper(max(columns or WIDE, 2 * NAMES) - 1, break_long_words=False, break_on_hyphens=False)
    for finding in findings:
        wrapper.initial_indent, wrapper.subsequent_indent = finding.name.ljust(NAMES), " " * NAMES
        yield from wrapper.wrap(finding.found)
        wrapper.initial_indent, wrapper.subsequent_indent = "  fix: ", " " * 7
        yield from wrapper.wrap(finding.fix)


def examine() -> Machine:
    """Find out what this machine has and what is installed on it."""
    memory, (gpus, gpu_findings) = read_memory(), find_gpus()
    disk, shm = (free_space(path) for path in (Path.cwd(), SHM))
    supported = (3, 11) <= sys.version_info < (3, 14)
    findings = [
        Finding("python", platform.python_version(), "" if supported else "use Python 3.11 to 3.13"),
        Finding("cores", str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())),
        memory_finding(memory),
        Finding("free disk", "unknown" if disk is None else f"{disk / 2**30:.0f} GiB in {Path.cwd()}"),
        shm_finding(),
        *gpu_findings,
        *(extra_finding(extra) for extra in install_hint.EXTRAS),
        *both_runtimes(),
        inductor_finding(bool(gpus)),
        *onnxruntime_finding(),
        *compilers_findings(gpus[0] if gpus else None),
        triton_finding(),
    ]
    return Machine(tuple(findings), memory, disk, shm, tuple(gpus))


def free_space(folder: Path) -> int | None:
    """The free bytes on the file system of a folder, or None if there is no such folder."""
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def memory_finding(memory: Memory | None) -> Finding:
    """How much memory there is, and what the control group leaves of it."""
    if memory is None:
        return Finding("memory", "unknown: the system does not say")
    limit = (
        "" if memory.limit is None else f", of which this process's control group may have {gibibytes(memory.limit)}"
    )
    return Finding("memory", f"{gibibytes(memory.total)}{limit}; {gibibytes(memory.available)} available")


def gibibytes(size: int) -> str:
    """A number of bytes in words."""
    return f"{size / 2**30:.1f} GiB"


def shm_finding() -> Finding:
    """How much shared memory there is. `ditforge serve` uses some of it."""
    needs = f"serve takes up to {SHM_START >> 20} MiB from the start (8 MiB a model), and more for large pictures"
    try:
        found = shutil.disk_usage(SHM)
    except OSError as error:
        return Finding(str(SHM), f"{error.strerror}; {needs}", f"mount a tmpfs at {SHM}")
    few = found.free < SHM_ENOUGH
    fix = "free some of it (ls -l /dev/shm); a container gets more with docker run --shm-size 1g" if few else ""
    return Finding(str(SHM), f"{found.total >> 20} MiB, {found.free >> 20} MiB free; {needs}", fix)


def find_gpus() -> tuple[list[LocalGpu], list[Finding]]:
    """The GPUs, and a finding for each. A machine without a GPU is not a problem, so its finding has no fix."""
    try:
        gpus = local_gpu.local_gpus()
    except UserError as error:
        if "not installed" in error.problem:
            return [], [Finding("GPU", f"unknown: {error.problem}", error.fix)]
        none = "none that a driver finds: engines run on the CPU here, and are compiled for GPUs elsewhere"
        return [], [Finding("GPU", none)]
    return gpus, [
        Finding(
            "GPU" if len(gpus) == 1 else f"GPU {index}",
            f"{gpu.product}, {gpu.capability}, {gpu.memory / 2**30:.0f} GiB, {gpu.memory_free / 2**30:.0f} GiB free; "
            f"driver {gpu.driver}",
        )
        for index, gpu in enumerate(gpus)
    ]


def extra_finding(extra: str) -> Finding:
    """Which packages of an extra are installed, and the command that installs the missing ones."""
    wanted = [line.split(";")[0] for line in requires("ditforge") or [] if f'extra == "{extra}"' in line]
    found, missing = [], []
    for requirement in wanted:
        if requirement.startswith("ditforge["):
            continue  # another extra, for which there is a row of its own
        name = requirement.split("[")[0].split(">")[0].split("=")[0].split("<")[0].strip()
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            if name == ON_CPU and has_package(ON_CUDA):
                continue  # it is the same module, and would be overwritten
            missing.append(name)
    shown = ", ".join(found + [f"no {name}" for name in missing])
    if extra in ON_GPU and missing:
        shown += f" ({ON_GPU[extra]})"
    fix = install_hint.install(extra) if missing else ""
    if ON_CUDA in missing and has_package(ON_CPU):
        fix = f"{install_hint.pip()} uninstall {ON_CPU}, then {fix}"
    return Finding(f"[{extra}]", shown, fix)


def has_package(name: str) -> bool:
    """Whether a package is installed."""
    try:
        return bool(version(name))
    except PackageNotFoundError:
        return False


def both_runtimes() -> list[Finding]:
    """A finding if ONNX Runtime is installed for CPUs and for GPUs: the files of one have overwritten the other's."""
    if not (has_package(ON_CPU) and has_package(ON_CUDA)):
        return []
    pip = install_hint.pip()
    fix = f"{pip} uninstall {ON_CPU} {ON_CUDA}, then {install_hint.install(ON_CUDA)}   or {pip} install {ON_CPU}"
    return [Finding(ON_CPU, f"{ON_CPU} and {ON_CUDA} are both installed, and are one module", fix)]


def inductor_finding(with_gpu: bool) -> Finding:
    """Whether PyTorch's Inductor can compile engines here: for which CUDA PyTorch was built, and the C++ compiler.

    PyTorch is not imported, which would take seconds.
    """
    name = "inductor"
    try:
        torch = f"torch {version('torch')}"
    except PackageNotFoundError:
        what = "needed only where its engines are compiled or run"
        return Finding(name, f"no torch ({what})", install_hint.install(name) if with_gpu else "")
    cuda = torch_cuda()
    compiler = cxx_compiler.name()
    fixes = []
    if with_gpu and not cuda:
        fixes.append("install PyTorch for your CUDA version: https://pytorch.org/get-started")
    missing = not cxx_compiler.works()
    if missing and (with_gpu or compiler != cxx_compiler.DEFAULT):
        fixes.append(cxx_compiler.fix())
    shown = f"{torch}, {f'for CUDA {cuda}' if cuda else 'for the CPU alone'}; C++ compiler {compiler}"
    return Finding(name, shown + (" is missing" if missing else ""), "; ".join(fixes))


def torch_cuda() -> str:
    """The version of CUDA for which the installed PyTorch was built; empty if it was built for the CPU alone."""
    found = find_spec("torch")
    try:
        text = (Path(found.origin or "").parent / "version.py").read_text() if found else ""
    except OSError:
        text = ""
    cuda = re.search(r"^cuda\b.*= *['\"]([\d.]+)", text, re.MULTILINE)
    return cuda[1] if cuda else ""


def onnxruntime_finding() -> list[Finding]:
    """What the ONNX Runtime that is installed can execute on; nothing if there is none.

    Importing it takes a fraction of a second, and never brings PyTorch.
    """
    name = next((name for name in (ON_CUDA, ON_CPU) if has_package(name)), None)
    if name is None:
        return []
    try:
        import onnxruntime as ort

        providers = ", ".join(provider.removesuffix("ExecutionProvider") for provider in ort.get_available_providers())
    except Exception as error:  # a library that it needs is missing, or the files of two packages are mixed
        return [Finding("ONNX Runtime", f"{name} {version(name)} cannot be imported: {' '.join(str(error).split())}")]
    return [Finding("ONNX Runtime", f"{name} {version(name)}: {providers}; its engines need no torch")]


def compilers_findings(gpu: LocalGpu | None) -> list[Finding]:
    """What each compiler can compile for here, and which of them can for the GPU, if there is one."""
    try:
        from ditforge.engines.compilers import compilers
    except ModuleNotFoundError as error:
        return [Finding("compilers", f"unknown: {error.name} is not installed", install_hint.install("engines"))]
    each = [compiler_finding(compiler, gpu.capability if gpu else "") for compiler in compilers()]
    return [*each, suited_finding(gpu)] if gpu else each


def compiler_finding(compiler: Compiler, here: str) -> Finding:
    """For what a compiler can compile on this machine, whose GPU is `here` (empty: none), or how it is installed."""
    anywhere, name = compiler.compiles_on == "any machine", f"compiler {compiler.name}"
    able = [device for device in compiler.executes if anywhere or device in (local_gpu.CPU, here)]
    lacks = ""
    if compiler.name == "inductor":
        lacks = "" if cxx_compiler.works() else "; it needs a C++ compiler"
        able = [] if lacks else [device for device in able if device == local_gpu.CPU or torch_cuda()]
    itself = "" if anywhere else "; for a GPU, on that GPU itself"
    try:
        shown = f"{compiler.version()}: compiles here for {', '.join(able) or 'nothing'}{lacks}{itself}"
    except UserError as error:
        return Finding(name, f"{error.problem}; it compiles for {', '.join(compiler.executes)}{itself}", error.fix)
    return Finding(name, shown, cxx_compiler.fix() if lacks else "")


def suited_finding(gpu: LocalGpu) -> Finding:
    """Which compilers can compile here for the GPU, the default first, and why the others cannot."""
    from ditforge.engines.compilers import choice
    from ditforge.engines.gpus import Target

    target = Target(gpu.product, (gpu.capability,))
    suited = {compiler.name: choice.why_not_here(compiler, target) for compiler in choice.able_for((gpu.capability,))}
    able, unable = [one for one in suited if not suited[one]], [why for why in suited.values() if why]
    shown = f"{', '.join(able) or 'none'} for {gpu.capability}"
    return Finding("compilers", "; ".join([shown, *unable]), "" if able else install_hint.install("engines"))


def triton_finding() -> Finding:
    """Which tritonserver `ditforge serve` would run."""
    name, on_path = "tritonserver", shutil.which("tritonserver")
    if on_path:
        release = os.environ.get("NVIDIA_TRITON_SERVER_VERSION", "")  # set in NVIDIA's container, e.g. 26.07
        newer = "" if not release or release >= SAFE_TRITON else f"{WHY_NEWER}; this is {release}"
        return Finding(name, f"{on_path} {release}".strip(), newer)
    try:
        found = f"2.51, from nvidia-pytriton {version('nvidia-pytriton')}"
    except PackageNotFoundError:
        return Finding(name, "none", f"{install_hint.install('serve')}, or run in NVIDIA's Triton container")
    return Finding(name, found, f"{WHY_NEWER}; fine on loopback")
