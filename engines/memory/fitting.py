"""Decides how engines fit into the GPU's memory, and how this machine's memory is enough to compile them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence

from ditforge.contract import DIT
from ditforge.engines.gpus import Target
from ditforge.engines.memory.memory_plan import (
    Plan,
    Traits,
    build_peak,
    gibibytes,
    make_plan,
    parts_of,
)
from ditforge.engines.profile import DEFAULT_BATCH, Profile
from ditforge.errors import DitforgeWarning, UserError
from ditforge.machine_memory import read_memory
from ditforge.manifest import Component, Manifest
from ditforge.model import Model
from ditforge.option import option, setting
from ditforge.placement import CPU, ON_DEMAND, RESIDENT, Placement

AUTO = "auto"
RESIDENCIES = (RESIDENT, ON_DEMAND)
COMPILING = 0.6  # of the free memory: the rest holds the files that are read and written, and what else runs


def parse_segments(text: str) -> int | None:
    """The number in `--segments`; None for auto. Raises UserError for anything else."""
    if text == AUTO:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise UserError(
            f"{option('segments')} takes auto or a number of at least 1, got {text!r}", setting("segments", AUTO)
        )
    return int(text)


def decide(
    components: Mapping[str, Component],
    model: Model,
    target: Target,
    profiles: Sequence[Profile],
    batch: int | None,
    memory: int | None = None,
    traits: Traits | None = None,
) -> Plan | None:
    """Plan the memory for an export's networks, for pictures of these profiles.

    Without a `batch`, the plan is for the default one, or for the largest batch below that needs no worse plan than a
    single picture does. `memory` is the number of bytes that compiling may take, and `traits` are those of the
    compiler's engines. Returns None if the export does not say what its networks take, or if the target is not a GPU.
    Raises UserError if no plan fits.
    """
    parts = parts_of(components)
    if parts is None or not target.capabilities:
        return None
    side = math.ceil(max(math.sqrt(math.prod(profile.largest)) for profile in profiles))
    plans = {
        count: make_plan(parts, model, target, side, count, memory, model.vae_tile, traits)
        for count in ([batch] if batch else range(DEFAULT_BATCH, least_batch(model) - 1, -1))
    }
    fewest = plans[min(plans)]
    if not fewest.fits:
        raise UserError(
            f"{model.name} does not fit {target.name} for pictures of {side} x {side}: at its most frugal it needs "
            f"{gibibytes(fewest.peak)} of the GPU's memory, and {gibibytes(fewest.usable or 0)} can be used",
            f"{option('resolutions')} with smaller ones, {setting('batch', least_batch(model))}, "
            "or ditforge export with 8-bit weights",
        )
    return next(plan for plan in plans.values() if plan.rank == fewest.rank and plan.fits)


def least_batch(model: Model) -> int:
    """The number of samples that one picture needs at a time: two with classifier-free guidance."""
    return 2 if model.guidance == "classifier-free" else 1


def warn_of_compiling(
    networks: Mapping[str, Component], placements: Mapping[str, Placement], memory: int | None
) -> None:
    """Warn if compiling the largest engine or segment is likely to take more memory than there is."""
    peaks = {
        name: build_peak(component.footprint.segment(placements[name].segments))
        for name, component in networks.items()
        if component.footprint and placements[name].device == "gpu"
    }
    largest = max(peaks, key=peaks.__getitem__, default="")
    if memory is not None and peaks.get(largest, 0) > memory:
        wanted = f"compiling {largest} takes up to {gibibytes(peaks[largest])}, and {gibibytes(memory)} are to be had"
        warnings.warn(wanted, DitforgeWarning, stacklevel=1)


def memory_to_compile() -> int | None:
    """Bytes of this machine's memory that compiling may take; None where the system does not say."""
    memory = read_memory()
    return None if memory is None else int(COMPILING * memory.available)


def place_engines(
    networks: Iterable[str], plan: Plan | None = None, segments: int | None = None, residency: str | None = None
) -> dict[str, Placement]:
    """Where each engine is: as the user says, or else as planned, or else whole and resident.

    The user may give the DiT's `segments` and the `residency` of all engines. If either is given, all
    engines of the plan are resident. Raises UserError for an unknown residency.
    """
    if residency not in (None, *RESIDENCIES):
        raise UserError(
            f"unknown residency {residency!r}", f"{option('residency')} with one of: {', '.join(RESIDENCIES)}"
        )
    placements = {}
    for name in networks:
        planned = plan.placements[name] if plan else Placement()
        count = segments if name == DIT and segments is not None else planned.segments
        on_demand = count if residency == ON_DEMAND else planned.on_demand
        placements[name] = (
            planned if planned.device == CPU else planned.model_copy(update={"segments": count, "on_demand": on_demand})
        )
    return placements


def cut_before(before: Manifest | None, name: str, placement: Placement) -> Placement:
    """The same placement, but with as many segments as in an earlier build, if these are enough.

    A different amount of free memory for compiling is no reason to compile again. If the segments are smaller, more of
    them are loaded on demand, so that no more bytes are resident.
    """
    engine = before.engines.get(name) if before else None
    if engine is None or bool(engine.placement.on_demand) != bool(placement.on_demand):
        return placement
    count = engine.placement.segments
    if not placement.on_demand:
        return placement.model_copy(update={"segments": count})
    if count < placement.segments:
        return placement
    kept = (placement.segments - placement.on_demand) * count // placement.segments
    return placement.model_copy(update={"segments": count, "on_demand": count - kept})
