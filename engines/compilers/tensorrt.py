"""TensorRT as a compiler. It measures kernels, and so compiles on the GPU that will execute the engine.

Source: https://docs.nvidia.com/deeplearning/tensorrt/latest/
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ditforge.engines import gpus
from ditforge.engines.compilers import Compiler, Job, compilers
from ditforge.engines.compilers.tensorrt_common import Build, installed
from ditforge.engines.gpus import Target
from ditforge.errors import UserError
from ditforge.manifest import Component
from ditforge.option import setting

if TYPE_CHECKING:
    from ditforge.engines.runtime.tensorrt import Execution

NAME = "tensorrt"
PACKAGES = ("tensorrt", "tensorrt-cu13", "tensorrt-cu12")
DEVICES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "sm_121")
TIMING_CACHE = "timing.cache"  # beside the engines: what was measured on the GPU the last time
OPTIMIZATION_LEVEL = 3


def version() -> str:
    """The installed TensorRT's version. Raises UserError if there is none."""
    return installed("TensorRT", PACKAGES, "tensorrt", "tensorrt-cu12")


def settings() -> dict[str, str]:
    """The builder's optimisation level, and the GPU's model, on which the kernels were measured."""
    return {
        "build_flags": f"strongly typed, optimization level {OPTIMIZATION_LEVEL}",
        "gpu": gpus.local_target().name,
    }


def check(name: str, component: Component, target: Target) -> None:
    """Raise UserError if the target is not the GPU of this machine."""
    version()
    here = gpus.local_target()
    if here.capabilities != target.capabilities:
        others = [
            compiler.name
            for compiler in compilers()
            if compiler.compiles_on == "any machine" and all(c in compiler.executes for c in target.capabilities)
        ]
        raise UserError(
            f"tensorrt compiles on the GPU itself, and this machine's is {here} ({here.name}), not {target}",
            f"ditforge build   on a machine with {target}"
            + (f"; or {setting('compiler', others[0])}" if others else ""),
        )


def compile(job: Job) -> list[Path]:
    """Compile the graph to ENGINE.plan, with the timing cache beside it."""
    import tensorrt as trt

    build = Build(trt, job)
    build.config.builder_optimization_level = OPTIMIZATION_LEVEL
    file = job.engine.with_name(TIMING_CACHE)
    cache = build.config.create_timing_cache(file.read_bytes() if file.is_file() else b"")
    if not build.config.set_timing_cache(cache, ignore_mismatch=False):  # it is another GPU's or version's
        build.config.set_timing_cache(build.config.create_timing_cache(b""), ignore_mismatch=False)
    path = build.write()
    file.write_bytes(build.config.get_timing_cache().serialize())
    return [path]


def load(files: list[Path], target: str, built_with: str) -> Execution:
    """Load the plan."""
    from ditforge.engines.runtime.tensorrt import check_here, load_plan

    check_here(files[0], NAME, target, built_with, version())
    import tensorrt as trt

    return load_plan(trt, files[0], NAME, target)


def load_frugally(files: list[Path], target: str, built_with: str, budget: int | None) -> Execution:
    """Load the plan without CUDA graphs, and with at most `budget` bytes of weights in the GPU's memory."""
    from ditforge.engines.runtime.tensorrt import check_here, load_plan

    check_here(files[0], NAME, target, built_with, version())
    import tensorrt as trt

    return load_plan(trt, files[0], NAME, target, budget, graphs=False)


COMPILER = Compiler(
    name=NAME,
    executes={device: tuple(gpus.precisions(device)) for device in DEVICES},
    version=version,
    settings=settings,
    check=check,
    compile=compile,
    load=load,
    load_frugally=load_frugally,
    compiles_on="the target",
    own_process=True,
    shares_activations=False,  # Triton's own backend gives each engine its own, and a plan has to hold there too
    triton_backend="tensorrt",
    keeps=(TIMING_CACHE,),
    rank=20,
)
