"""`ditforge doctor`: what is installed here, and what would have to be for the rest."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from ditforge import terminal
from ditforge.errors import UserError

# The packages that each command imports, by the extra that installs them.
EXTRAS = {
    "client": ("numpy", "PIL", "tritonclient", "grpc"),
    "export": ("torch", "diffusers", "transformers", "safetensors", "onnxscript", "onnx_ir", "huggingface_hub"),
    "engines": ("onnx", "onnxruntime", "pynvml"),
    "tensorrt-rtx": ("tensorrt_rtx",),
    "tensorrt": ("tensorrt",),
    "gpu": ("cupy",),
    "serve-in-container": ("tokenizers", "google", "psutil", "prometheus_client"),
    "serve": ("pytriton",),
}


# Which extras only some machines need, and what for.
ON_GPU = {
    "tensorrt-rtx": "needed only to compile for GPUs",
    "tensorrt": "needed only where engines are compiled on a data-centre GPU",
    "gpu": "needed only where engines run on a GPU",
}

SAFE_TRITON = "26.07"  # the release of NVIDIA's container that deployments should run, or a later one
SHM = Path("/dev/shm")
SHM_START = 72 << 20  # bytes: 8 MiB for each of the nine models that a Stable Diffusion 3.5 is served as
SHM_ENOUGH = 256 << 20  # bytes, with what large pictures take beside
NAMES, WIDE = 22, 10_000  # columns: of what a row is about, and of a row that is not cut
WHY_NEWER = f"to deploy, NVIDIA's container {SAFE_TRITON} or later: older ones have known crashes (docs/security.md)"


def doctor() -> None:
    """What this machine can do, and what to install for the rest.

    Example: ditforge doctor
    """
    for line in lines(findings(), shutil.get_terminal_size().columns if sys.stdout.isatty() else None):
        terminal.say(line)


def extra_for(module: str) -> str | None:
    """The extra of ditforge that installs the top-level module, if there is one."""
    return next((extra for extra, modules in EXTRAS.items() if module in modules), None)


def lines(rows: Iterable[tuple[str, str, str]], columns: int | None) -> Iterator[str]:
    """Rows of findings() for a terminal of so many columns (None: no terminal); what to do has lines of its own."""
    wrapper = textwrap.TextWrapper(max(columns or WIDE, 2 * NAMES) - 1, break_long_words=False, break_on_hyphens=False)
    for what, here, fix in rows:
        wrapper.initial_indent, wrapper.subsequent_indent = what.ljust(NAMES), " " * NAMES
        yield from wrapper.wrap(here)
        wrapper.initial_indent, wrapper.subsequent_indent = "  fix: ", " " * 7
        yield from wrapper.wrap(fix)


def findings() -> list[tuple[str, str, str]]:
    """Rows of (what, what was found here, what to do; empty where nothing is missing)."""
    return [
        (
            "python",
            platform.python_version(),
            "" if (3, 10) <= sys.version_info < (3, 14) else "use Python 3.10 to 3.13",
        ),
        ("cores", str(os.cpu_count()), ""),
        ("memory", f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9:.0f} GB", ""),
        ("free disk", f"{shutil.disk_usage(Path.cwd()).free / 1e9:.0f} GB", ""),
        shm_row(),
        gpu_row(),
        *(extra_row(extra) for extra in EXTRAS),
        triton_row(),
    ]


def shm_row() -> tuple[str, str, str]:
    """How much shared memory there is, which `ditforge serve` takes some of."""
    needs = f"serve takes up to {SHM_START >> 20} MiB from the start (8 MiB a model), and more for large pictures"
    try:
        found = shutil.disk_usage(SHM)
    except OSError as error:
        return str(SHM), f"{error.strerror}; {needs}", f"mount a tmpfs at {SHM}"
    few = found.free < SHM_ENOUGH
    fix = "free some of it (ls -l /dev/shm); a container gets more with docker run --shm-size 1g" if few else ""
    return str(SHM), f"{found.total >> 20} MiB, {found.free >> 20} MiB free; {needs}", fix


def gpu_row() -> tuple[str, str, str]:
    """The GPU, if there is one: nothing is missing where there is none."""
    from ditforge.engines.gpus import local_target

    try:
        gpu = local_target()
    except UserError as error:
        if "not installed" in error.problem:
            return "GPU", f"unknown: {error.problem}", error.fix
        return "GPU", "none that a driver finds: engines run on the CPU here, and are compiled for GPUs elsewhere", ""
    return "GPU", f"{gpu.name}, {', '.join(gpu.capabilities)}, {gpu.memory_gb} GB", ""


def extra_row(extra: str) -> tuple[str, str, str]:
    """Which packages of an extra are installed, and the command that installs the missing ones."""
    wanted = [line.split(";")[0] for line in requires("ditforge") or [] if f'extra == "{extra}"' in line]
    found, missing = [], []
    for requirement in wanted:
        if requirement.startswith("ditforge["):
            continue  # another extra, which has a row of its own
        name = requirement.split("[")[0].split(">")[0].split("=")[0].split("<")[0].strip()
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            missing.append(name)
    shown = ", ".join(found + [f"no {name}" for name in missing])
    if extra in ON_GPU and missing:
        shown += f" ({ON_GPU[extra]})"
    return f"[{extra}]", shown, f"pip install 'ditforge[{extra}]'" if missing else ""


def triton_row() -> tuple[str, str, str]:
    """Which tritonserver `ditforge serve` would take."""
    on_path = shutil.which("tritonserver")
    if on_path:
        release = os.environ.get("NVIDIA_TRITON_SERVER_VERSION", "")  # which NVIDIA's container sets, e.g. 26.07
        newer = "" if not release or release >= SAFE_TRITON else f"{WHY_NEWER}; this is {release}"
        return "tritonserver", f"{on_path} {release}".strip(), newer
    try:
        return (
            "tritonserver",
            f"2.51, from nvidia-pytriton {version('nvidia-pytriton')}",
            f"{WHY_NEWER}; fine on loopback",
        )
    except PackageNotFoundError:
        return "tritonserver", "none", "pip install 'ditforge[serve]', or run in NVIDIA's Triton container"
