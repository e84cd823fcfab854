"""The GPUs of this machine as the driver describes them through NVML (nvidia-ml-py), and which engines run on them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from types import ModuleType

from ditforge.errors import UserError
from ditforge.option import setting

CPU = "cpu"  # the target of engines that need no GPU


@dataclass(frozen=True)
class LocalGpu:
    """A GPU of this machine. capability: such as sm_89. memory, memory_free: in bytes. driver: the driver's version."""

    product: str
    capability: str
    memory: int
    memory_free: int
    driver: str


def name_gpu() -> str:
    """The advice in errors if there is no GPU."""
    return (
        f"name the GPU to compile for: {setting('gpu', 'rtx4090')} (ditforge gpus lists names); or install its driver"
    )


def local_gpus() -> list[LocalGpu]:
    """The GPUs of this machine, at least one. Raises UserError if there is none."""
    try:
        import pynvml
    except ModuleNotFoundError as error:
        problem = "the driver cannot be asked for its GPU: nvidia-ml-py is not installed"
        raise UserError(problem, "pip install nvidia-ml-py") from error
    try:
        pynvml.nvmlInit()
        try:
            devices = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
            found = [_described(pynvml, device) for device in devices]
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:
        raise UserError(f"this machine has no NVIDIA GPU that its driver can find: {error}", name_gpu()) from error
    if not found:
        raise UserError("this machine has no NVIDIA GPU: its driver finds none", name_gpu())
    return found


def _described(pynvml: ModuleType, device: object) -> LocalGpu:
    major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(device)
    memory = pynvml.nvmlDeviceGetMemoryInfo(device)
    product, driver = pynvml.nvmlDeviceGetName(device), pynvml.nvmlSystemGetDriverVersion()
    return LocalGpu(str(product), f"sm_{major}{minor}", int(memory.total), int(memory.free), str(driver))


def why_not_here(targets: Iterable[str]) -> str:
    """The reason why engines for these targets do not run on this machine, or an empty string if they do.

    A target is `cpu`, or compute capabilities with commas (`sm_86,sm_89`). Raises UserError if the driver cannot be
    asked.
    """
    for target in sorted({target for target in targets if target != CPU}):
        try:
            here = local_gpus()[0]
        except UserError as error:
            if error.fix != name_gpu():
                raise
            return f"they are for {target}, and {error.problem}"
        if here.capability not in target.split(","):
            return f"they are for {target}, and this machine's GPU ({here.product}) is {here.capability}"
    return ""
