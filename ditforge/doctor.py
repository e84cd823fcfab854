"""`ditforge doctor`: what is installed here, and what would have to be for the rest."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

# The packages that each command imports, by the extra that installs them.
EXTRAS = {
    "client": ("numpy", "PIL", "tritonclient", "grpc"),
    "export": ("torch", "diffusers", "transformers", "safetensors", "onnxscript", "onnx_ir"),
    "engines": ("onnx", "onnxruntime", "pynvml"),
    "tensorrt-rtx": ("tensorrt_rtx",),
    "tensorrt": ("tensorrt",),
    "gpu": ("cupy",),
    "serve-in-container": ("tokenizers", "google", "psutil", "prometheus_client"),
    "serve": ("pytriton",),
}


SAFE_TRITON = "26.07"  # the release of NVIDIA's container that deployments should run, or a later one
WHY_NEWER = f"to deploy, NVIDIA's container {SAFE_TRITON} or later: older ones have known crashes (docs/security.md)"


def extra_for(module: str) -> str | None:
    """The extra of ditforge that installs the top-level module, if there is one."""
    return next((extra for extra, modules in EXTRAS.items() if module in modules), None)


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
        *(extra_row(extra) for extra in EXTRAS),
        triton_row(),
    ]


def extra_row(extra: str) -> tuple[str, str, str]:
    """Which packages of an extra are installed, and the command that installs the missing ones."""
    wanted = [line.split(";")[0] for line in requires("ditforge") or [] if f'extra == "{extra}"' in line]
    found, missing = [], []
    for requirement in wanted:
        name = requirement.split("[")[0].split(">")[0].split("=")[0].split("<")[0].strip()
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            missing.append(name)
    shown = ", ".join(found + [f"no {name}" for name in missing])
    return f"[{extra}]".replace("[", "\\["), shown, f"pip install 'ditforge\\[{extra}]'" if missing else ""


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
        return "tritonserver", "none", "pip install 'ditforge\\[serve]', or run in NVIDIA's Triton container"
