"""What `ditforge gpus` reports: for each product what it can compute with, and what is chosen for it."""

from __future__ import annotations

from dataclasses import dataclass

from ditforge.engines.compilers.choice import able, default_compiler
from ditforge.engines.gpus import GPUS, Gpu, Target, default_precision, precisions


@dataclass(frozen=True)
class Offer:
    """What ditforge does with a product, in a report: what it can compute with, and what is chosen for it."""

    name: str
    product: str
    capability: str
    memory_gb: int
    precisions: tuple[str, ...]
    default_precision: str
    compilers: tuple[str, ...]
    default_compiler: str


@dataclass(frozen=True)
class GpuTable:
    """All products, by compute capability."""

    gpus: tuple[Offer, ...]


def table() -> GpuTable:
    """What `ditforge gpus` reports."""
    return GpuTable(tuple(map(offer, GPUS)))


def offer(gpu: Gpu) -> Offer:
    """What ditforge does with a product."""
    target = Target(gpu.name, (gpu.capability,), gpu.memory_gb)
    formats, made_by = tuple(precisions(gpu.capability)), tuple(able(gpu.capability))
    chosen = default_precision(target)[0], made_by, default_compiler(target)
    return Offer(gpu.name, gpu.product, gpu.capability, gpu.memory_gb, formats, *chosen)
