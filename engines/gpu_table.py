"""The report of `ditforge gpus`: what each product can compute with, and what ditforge chooses for it."""

from __future__ import annotations

from dataclasses import dataclass

from ditforge.engines.compilers.choice import able, default_compiler
from ditforge.engines.gpus import GPUS, Gpu, Target, default_precision, precisions


@dataclass(frozen=True)
class Offer:
    """One product in the report: what it can compute with, and what ditforge chooses for it."""

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
    """All products, in the order of their compute capabilities."""

    gpus: tuple[Offer, ...]


def table() -> GpuTable:
    """The report of `ditforge gpus`."""
    return GpuTable(tuple(map(offer, GPUS)))


def offer(gpu: Gpu) -> Offer:
    """The row of one product."""
    target = Target(gpu.name, (gpu.capability,), gpu.memory_gb)
    formats, made_by = tuple(precisions(gpu.capability)), tuple(able(gpu.capability))
    chosen = default_precision(target)[0], made_by, default_compiler(target)
    return Offer(gpu.name, gpu.product, gpu.capability, gpu.memory_gb, formats, *chosen)
