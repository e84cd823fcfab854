"""The values of options that a shell offers when it completes a command line."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pkgutil import iter_modules

# The same as in ditforge.export, which cannot be imported here because that would import PyTorch.
PRECISIONS = ("fp32", "fp16", "bf16", "fp8", "fp8-weights", "int8-weights")


def matching(names: Callable[[], list[str]]) -> Callable[[str], list[str]]:
    """Return a function that lists the names which begin with the given text."""
    return lambda incomplete: [name for name in names() if name.startswith(incomplete)]


def gpus() -> list[str]:
    """The values that `--gpu` takes: products, compute capabilities, local and cpu."""
    from ditforge.engines.gpus import CPU, GPUS, LOCAL, PRODUCTS

    return [*(gpu.name for gpu in GPUS), *PRODUCTS, LOCAL, CPU]


def precisions() -> list[str]:
    """The values that `--precision` takes."""
    return list(PRECISIONS)


def compilers() -> list[str]:
    """The values that `--compiler` takes."""
    from ditforge.engines.compilers import compilers as found

    return [compiler.name for compiler in found()]


def samplers() -> list[str]:
    """The values that `--sampler` takes."""
    return files_of("ditforge.client.samplers")


def schedules() -> list[str]:
    """The values that `--schedule` takes."""
    return files_of("ditforge.client.schedules")


def files_of(package: str) -> list[str]:
    """The names of the modules in a package, without importing it, which would import NumPy."""
    folders = find_spec(package)
    return sorted(module.name for module in iter_modules(folders.submodule_search_locations if folders else []))


GPU, PRECISION, COMPILER = matching(gpus), matching(precisions), matching(compilers)
SAMPLER, SCHEDULE = matching(samplers), matching(schedules)
