"""TensorRT for RTX as a compiler. It compiles without a GPU, for one or several compute capabilities.

An engine holds what does not depend on the model of the GPU. The rest is compiled when it is loaded, and kept in a
cache. Source: https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ditforge.engines.compilers import Compiler, Job
from ditforge.engines.compilers.tensorrt_common import Build, installed
from ditforge.engines.gpus import precisions
from ditforge.errors import DitforgeError

if TYPE_CHECKING:
    from ditforge.engines.runtime.tensorrt import Execution

NAME = "tensorrt-rtx"
PACKAGES = ("tensorrt-rtx-cu13", "tensorrt-rtx-cu12", "tensorrt-rtx")
DEVICES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_120", "sm_121")  # not the data centre's: sm_90, sm_100, sm_103


def version() -> str:
    """The installed TensorRT-RTX's version. Raises UserError if there is none."""
    return installed("TensorRT-RTX", PACKAGES, "tensorrt-rtx", "tensorrt-rtx-cu12")


def settings() -> dict[str, str]:
    """The settings of the builder: networks are strongly typed, and everything else is the default."""
    return {"build_flags": "strongly typed"}


def compile(job: Job) -> list[Path]:
    """Compile the graph to ENGINE.plan, for all capabilities of the target."""
    import tensorrt_rtx as trt

    build = Build(trt, job)
    build.config.num_compute_capabilities = len(job.target.capabilities)
    for i, capability in enumerate(job.target.capabilities):
        known = getattr(trt.ComputeCapability, capability.upper().replace("_", ""), None)
        if known is None or not build.config.set_compute_capability(known, i):
            raise DitforgeError(f"TensorRT-RTX {version()} does not know {capability}", "pip install a newer one")
    return [build.write()]


def load(files: list[Path], target: str, built_with: str) -> Execution:
    """Load the plan, together with the kernels that were compiled for this GPU earlier, if they are kept."""
    from ditforge.engines.runtime.tensorrt import check_here, load_plan

    check_here(files[0], NAME, target, built_with, version())
    import tensorrt_rtx as trt

    return load_plan(trt, files[0], NAME, target)


def load_frugally(files: list[Path], target: str, built_with: str, budget: int | None) -> Execution:
    """Load the plan without CUDA graphs, and with at most `budget` bytes of weights in the GPU's memory."""
    from ditforge.engines.runtime.tensorrt import check_here, load_plan

    check_here(files[0], NAME, target, built_with, version())
    import tensorrt_rtx as trt

    return load_plan(trt, files[0], NAME, target, budget, graphs=False)


def formats(device: str) -> tuple[str, ...]:
    """The number formats of engines on a device: all that it has, but not fp32 on sm_75, which has no kernels."""
    return tuple(name for name in precisions(device) if (device, name) != ("sm_75", "fp32"))


COMPILER = Compiler(
    name=NAME,
    executes={device: formats(device) for device in DEVICES},
    version=version,
    settings=settings,
    compile=compile,
    load=load,
    load_frugally=load_frugally,
    own_process=True,
    shares_activations=True,
    rank=10,
)
