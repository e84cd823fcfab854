"""`ditforge gpus`: the GPU table."""

from __future__ import annotations

from ditforge import terminal


def gpus() -> None:
    """The GPUs by name: what they can do, and what is chosen for them.

    Example: ditforge gpus
    """
    headings = ("--gpu", "product", "capability", "memory", "FP8", "compilers", "default precision")
    terminal.table(headings, rows())


def rows() -> list[tuple[str, ...]]:
    """Name, product, capability, memory, FP8, compilers, default precision of each GPU."""
    from ditforge.engines.compilers.choice import able
    from ditforge.engines.gpus import GPUS, Target, default_precision, precisions

    found: list[tuple[str, ...]] = []
    for gpu in GPUS:
        precision, _ = default_precision(Target(gpu.name, (gpu.capability,), gpu.memory_gb))
        fp8 = "yes" if "fp8" in precisions(gpu.capability) else "no"
        compilers = ", ".join(able(gpu.capability))
        found.append((gpu.name, gpu.product, gpu.capability, f"{gpu.memory_gb} GB", fp8, compilers, precision))
    return found
