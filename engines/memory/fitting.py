"""`ditforge build --segments auto`: how engines are to fit into the GPU's memory, and be compiled in this machine's."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ditforge.contract import DIT
from ditforge.engines.gpus import Target, default_compiler
from ditforge.engines.memory.placement import (
    CPU,
    ON_DEMAND,
    RESIDENT,
    Placement as Planned,
    Plan,
    build_peak,
    gigabytes,
    make_plan,
    parts_of,
)
from ditforge.engines.profile import DEFAULT_BATCH, Profile
from ditforge.errors import DitforgeWarning, UserError
from ditforge.machine_memory import read_memory
from ditforge.manifest import Component, Manifest
from ditforge.model import Model

AUTO = "auto"
RESIDENCIES = (RESIDENT, ON_DEMAND)
COMPILING = 0.6  # of the free memory: the rest holds the files that are read and written, and what else runs


@dataclass(frozen=True)
class Placement:
    """How an engine is to fit into memory: made by which compiler for what, in how many `segments`.

    As in manifest.Engine, `on_demand` of them are not resident.
    """

    compiler: str
    target: Target
    segments: int = 1
    on_demand: int = 0


def parse_segments(text: str) -> int | None:
    """The number in `--segments`; None for auto. Raises UserError for anything else."""
    if text == AUTO:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"--segments takes auto or a number of at least 1, got {text!r}", "--segments auto, or 2")
    return int(text)


def decide(
    components: Mapping[str, Component],
    model: Model,
    target: Target,
    profiles: Sequence[Profile],
    batch: int | None,
    memory: int | None = None,
) -> Plan | None:
    """The plan for an export's networks, and pictures of these profiles.

    Without a `batch`, it is for the default one, or the largest below that does not ask for a worse plan than a single
    picture does. `memory` is the bytes that compiling may take. None where the export does not say what its networks
    take, or where it is not for a GPU. Raises UserError where no plan fits.
    """
    parts = parts_of(components)
    if parts is None or not target.capabilities:
        return None
    side = math.ceil(max(math.sqrt(math.prod(profile.largest)) for profile in profiles))
    plans = {
        count: make_plan(parts, model, target, side, count, memory, model.vae_tile)
        for count in ([batch] if batch else range(DEFAULT_BATCH, least_batch(model) - 1, -1))
    }
    fewest = plans[min(plans)]
    if not fewest.fits:
        raise UserError(
            f"{model.name} does not fit {target.name} for pictures of {side} x {side}: at its most frugal it needs "
            f"{gigabytes(fewest.peak)} of the GPU's memory, and {gigabytes(fewest.usable or 0)} can be used",
            f"--resolutions with smaller ones, --batch {least_batch(model)}, or ditforge export with 8-bit weights",
        )
    return next(plan for plan in plans.values() if plan.rank == fewest.rank and plan.fits)


def least_batch(model: Model) -> int:
    """How many samples the networks take at a time for one picture: classifier-free guidance asks for two."""
    return 2 if model.guidance == "classifier-free" else 1


def warn_of_compiling(
    networks: Mapping[str, Component], placements: Mapping[str, Placement], memory: int | None
) -> None:
    """Say it where the largest engine, or segment of one, is likely to take more memory to compile than there is."""
    peaks = {
        name: build_peak(component.footprint.segment(placements[name].segments))
        for name, component in networks.items()
        if component.footprint and placements[name].target.capabilities
    }
    largest = max(peaks, key=peaks.__getitem__)
    if memory is not None and peaks[largest] > memory:
        wanted = f"compiling {largest} takes up to {gigabytes(peaks[largest])}, and {gigabytes(memory)} are to be had"
        warnings.warn(wanted, DitforgeWarning, stacklevel=1)


def memory_to_compile() -> int | None:
    """Bytes of this machine's memory that compiling may take; None where the system does not say."""
    memory = read_memory()
    return None if memory is None else int(COMPILING * memory.available)


def place_engines(
    networks: Iterable[str],
    compiler: str,
    target: Target,
    plan: Plan | None = None,
    segments: int | None = None,
    residency: str | None = None,
) -> dict[str, Placement]:
    """Where each engine goes: as planned, or whole and resident, but as the user says about it.

    That is the DiT's `segments`, and the `residency` of all; if there is one of these, all that is planned is resident.
    Raises UserError for an unknown residency.
    """
    if residency not in (None, *RESIDENCIES):
        raise UserError(f"unknown residency {residency!r}", f"--residency {' or '.join(RESIDENCIES)}")
    placements = {}
    for name in networks:
        placed = plan.placements[name] if plan else Planned("", RESIDENT, 1, 0)
        count = segments if name == DIT and segments is not None else placed.segments
        on_gpu = Placement(compiler, target, count, count if residency == ON_DEMAND else placed.on_demand)
        of_cpu = Placement(default_compiler(Target(CPU)), Target(CPU))
        placements[name] = of_cpu if placed.place == CPU else on_gpu
    return placements


def cut_before(before: Manifest | None, name: str, placement: Placement) -> Placement:
    """The same, cut into as many segments as in an earlier build, if these are enough.

    How much memory was free to compile in is no reason to compile again. Of smaller segments, more are loaded on
    demand, so that no more is resident.
    """
    engine = before.engines.get(name) if before else None
    if engine is None or bool(engine.on_demand) != bool(placement.on_demand):
        return placement
    count = max(1, len(engine.segments))
    if not placement.on_demand:
        return replace(placement, segments=count)
    if count < placement.segments:
        return placement
    kept = (placement.segments - placement.on_demand) * count // placement.segments
    return replace(placement, segments=count, on_demand=count - kept)
