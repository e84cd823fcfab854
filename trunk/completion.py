"""What a shell offers as an option's value where it completes one."""

from __future__ import annotations

from collections.abc import Callable

PRECISIONS = ("fp32", "fp16", "bf16", "fp8", "fp8-weights", "int8-weights")  # ditforge.export's, which needs PyTorch


def matching(names: Callable[[], list[str]]) -> Callable[[str], list[str]]:
    """What completes the beginning of one of the names."""
    return lambda incomplete: [name for name in names() if name.startswith(incomplete)]


def gpus() -> list[str]:
    """Products, compute capabilities, and what else `--gpu` takes."""
    from ditforge.engines.gpus import CPU, GPUS, LOCAL, PRODUCTS

    return [*(gpu.name for gpu in GPUS), *PRODUCTS, LOCAL, CPU]


def precisions() -> list[str]:
    """What `--precision` takes."""
    return list(PRECISIONS)


def compilers() -> list[str]:
    """What `--compiler` takes."""
    from ditforge.engines.compilers import compilers as found

    return [compiler.name for compiler in found()]


def samplers() -> list[str]:
    """What `--sampler` takes."""
    from ditforge.client.samplers import SAMPLERS

    return list(SAMPLERS)


def schedules() -> list[str]:
    """What `--schedule` takes."""
    from ditforge.client.schedules import SCHEDULES

    return list(SCHEDULES)


GPU, PRECISION, COMPILER = matching(gpus), matching(precisions), matching(compilers)
SAMPLER, SCHEDULE = matching(samplers), matching(schedules)
