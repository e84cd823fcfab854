"""`ditforge plan`: what of a checkpoint, or of an export, is where on a GPU, and when."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ditforge import manifest, terminal
from ditforge.contract import DIT
from ditforge.downloading import downloaded
from ditforge.engines import gpus
from ditforge.engines.gpus import Target
from ditforge.engines.memory import placement
from ditforge.engines.memory.fitting import least_batch
from ditforge.engines.memory.placement import Part, Plan
from ditforge.errors import UserError
from ditforge.footprint import Footprint
from ditforge.model import Model
from ditforge.placement import Placement

if TYPE_CHECKING:
    from ditforge.export.checkpoint.diffusers_folder import Checkpoint
    from ditforge.export.checkpoint.source import CheckpointSource

SIZES = (512, 768, 1024, 1536, 2048)
T5, SMALLER_T5 = "t5", "int8-weights"  # less exact than bf16 by 0.9 % of a linear's output, fp8-weights by 2.6 %


@dataclass(frozen=True)
class Subject:
    """What is planned: a model, and the networks of a checkpoint, or those of an export, which has its precision.

    `footprints` has, for each network, "plain" and each 8-bit precision that it can have; `exported` an export's parts.
    """

    model: Model
    footprints: dict[str, dict[str, Footprint]]
    exported: Sequence[Part] = ()

    def parts(self, target: Target, precision: str | None) -> tuple[str, Sequence[Part]]:
        """The precision that the GPU gets, and what the networks take in it. Raises UserError if it cannot have it."""
        if self.exported:
            return "as exported", self.exported
        chosen, around = choose_precision(target, precision)
        return chosen, [part(name, found, chosen, around) for name, found in self.footprints.items()]


def choose_precision(target: Target, precision: str | None) -> tuple[str, str]:
    """The precision that the GPU gets, and the dtype around. Raises UserError if it cannot have it."""
    from ditforge.export.quantisation.precision import EIGHT_BIT, PRECISIONS

    chosen = precision or gpus.default_precision(target)[0]
    if chosen not in PRECISIONS:
        raise UserError(f"unknown precision {chosen!r}", f"use one of: {', '.join(PRECISIONS)}")
    around = gpus.default_activations(target) if chosen in EIGHT_BIT else chosen
    gpus.check_precision(DIT, chosen, around, target)
    return chosen, around


def part(name: str, found: dict[str, Footprint], precision: str, around: str) -> Part:
    """A network in the precision of the whole, where it has that, or in the dtype around; T5 with 8-bit weights too."""
    plain = found["plain"]
    if name != T5:
        return Part(name, {precision: found[precision]} if precision in found else {around: plain})
    in_fp32 = plain.weights * (1 if around == "fp32" else 2)
    return Part(name, {around: plain, SMALLER_T5: found[SMALLER_T5]}, cpu=in_fp32)


def show(
    source: CheckpointSource,
    gpu: str | None,
    precision: str | None,
    size: int | None,
    gpu_memory: float | None = None,
) -> None:
    """Print the plan of a GPU, or one row for each GPU there is. Raises UserError for what cannot be planned."""
    if gpu_memory is not None and gpu is None:
        raise UserError("--gpu-memory is that of one GPU", "name it: --gpu rtx3060, or --gpu sm_86")
    target = find_card(gpu, gpu_memory) if gpu else None
    if target:
        choose_precision(target, precision)  # before anything is measured
    subject = read_subject(source, precision, size)
    sizes = [size] if size else sizes_of(subject.model)
    if target is None:
        terminal.table(("--gpu", "memory", "precision", *map(str, sizes)), overview(subject, precision, sizes))
        return
    chosen, parts = subject.parts(target, precision)
    plans = {
        side: placement.make_plan(parts, subject.model, target, side, least_batch(subject.model)) for side in sizes
    }
    terminal.say(f"{subject.model.name} on {target.name}, {target.memory_gb:g} GB, precision {chosen}")
    headings = ("pictures up to", "strategy", "tile", *placement.PHASES, "of")
    terminal.table(headings, [phases(side, plan) for side, plan in plans.items()])
    shown = min(plans, key=lambda side: abs(side - subject.model.default_size))
    terminal.say("")
    terminal.say(f"for pictures of up to {shown} x {shown}:")
    say_placements(plans[shown])


def say_plan(plan: Plan) -> None:
    """Print what `build` has decided, where there is anything to decide."""
    if plan.rank == 0 and all(placement.segments == 1 for placement in plan.placements.values()):
        return
    tiled = f", tiles of {plan.vae_tile} pixels" if plan.vae_tile else ""
    least = "" if plan.usable is None else f", {placement.gigabytes(plan.peak)} of {placement.gigabytes(plan.usable)}"
    terminal.say(f"plan: {plan.strategy}, batches of up to {plan.batch}{tiled}{least}")
    say_placements(plan)


def say_placements(plan: Plan) -> None:
    """Where each network is, and why."""
    terminal.table(("component", "precision", "place", "segments", "takes"), placed(plan))
    for reason in plan.reasons:
        terminal.say(f"- {reason}")


def find_card(gpu: str, memory_gb: float | None = None) -> Target:
    """The target with a memory that is known, or given. Raises UserError for another one."""
    target = gpus.limited(gpus.find_target(gpu), memory_gb)
    if target.memory_gb is None:
        problem = f"{gpu} is no product, so its memory is not known" if target.capabilities else "the CPU is no GPU"
        raise UserError(problem, f"--gpu rtx3060, for example, or --gpu-memory 12; {gpus.NAMES}")
    return target


def sizes_of(model: Model) -> list[int]:
    """Sides of the pictures to plan for, in pixels; a small model's own, if it makes none of the usual ones."""
    usual = [size for size in SIZES if model.size_multiple <= size <= model.max_size]
    return usual if model.default_size >= SIZES[0] else sorted({model.default_size, model.max_size})


def overview(subject: Subject, precision: str | None, sizes: Sequence[int]) -> list[tuple[str, ...]]:
    """A row for each GPU: its name, memory, precision, and for each size the peak and what is done about it."""
    rows: list[tuple[str, ...]] = []
    for gpu in gpus.GPUS:
        target = Target(gpu.name, (gpu.capability,), gpu.memory_gb)
        able = precision is None or precision in gpus.precisions(gpu.capability)
        if not able:
            rows.append((gpu.name, f"{gpu.memory_gb} GB", f"no {precision}", *("" for _ in sizes)))
            continue
        chosen, parts = subject.parts(target, precision)
        plans = [placement.make_plan(parts, subject.model, target, side, least_batch(subject.model)) for side in sizes]
        rows.append((gpu.name, f"{gpu.memory_gb} GB", chosen, *map(cell, plans)))
    return rows


def cell(plan: Plan) -> str:
    """A plan in a few characters: the peak in GB, the strategy, and the tile."""
    tiled = f", tile {plan.vae_tile}" if plan.vae_tile else ""
    return f"{plan.peak / 1e9:.1f} {plan.strategy}{tiled}" if plan.fits else f"does not fit: {plan.peak / 1e9:.1f}"


def phases(side: int, plan: Plan) -> tuple[str, ...]:
    """A row of a GPU's table: the size, the strategy, the tile, each phase's peak, and what there is."""
    strategy = plan.strategy if plan.fits else f"does not fit: needs {placement.gigabytes(plan.peak)}"
    peaks = (placement.gigabytes(plan.peaks[phase]) for phase in placement.PHASES)
    return (f"{side} x {side}", strategy, str(plan.vae_tile or "-"), *peaks, placement.gigabytes(plan.usable or 0))


def placed(plan: Plan) -> list[tuple[str, ...]]:
    """A row for each network: what it is in, where it is, in how many segments, and the bytes that it takes there."""
    return [
        (name, plan.precisions[name], p.residency, segments_of(p), placement.gigabytes(plan.sizes[name]))
        for name, p in plan.placements.items()
    ]


def segments_of(placement: Placement) -> str:
    """How many segments a network is in, and how many of them are loaded in turn, where the others stay."""
    partly = 0 < placement.on_demand < placement.segments
    return f"{placement.segments}, {placement.on_demand} in turn" if partly else str(placement.segments)


def read_subject(source: CheckpointSource, precision: str | None, size: int | None) -> Subject:
    """Look at the checkpoint, or at the export in its place. Raises UserError if it is neither."""
    if (source.path / manifest.FILE_NAME).is_file():
        if source.text_encoders != "all":
            problem = f"{source.path} is exported already, with text encoders or without"
            raise UserError(problem, "leave out --text-encoders")
        return exported(source.path, precision, size)
    from ditforge.export.checkpoint.source import opened

    source = downloaded(source, weights=False)
    with opened(source) as checkpoint:
        return measured(checkpoint, precision, size)


def check_size(model: Model, size: int | None) -> None:
    """Raise UserError if the model makes no pictures of that many pixels."""
    if size is not None and not model.size_multiple <= size <= model.max_size:
        problem = f"{model.name} makes pictures of {model.size_multiple} to {model.max_size} pixels, got {size}"
        raise UserError(problem, f"--size {model.default_size}")


def exported(folder: Path, precision: str | None, size: int | None) -> Subject:
    """What `export` wrote. Raises UserError if another precision is asked for, or if nobody measured it."""
    found = manifest.read(folder, "onnx")
    if precision is not None:
        raise UserError(f"{folder} is exported already, in a precision of its own", "leave out --precision")
    parts = placement.parts_of(found.components)
    if parts is None:
        raise UserError(f"{folder} does not say what its networks take of memory", "ditforge export   it again")
    check_size(found.model, size)
    return Subject(found.model, {}, parts)


def measured(checkpoint: Checkpoint, precision: str | None, size: int | None = None) -> Subject:
    """The footprints of a checkpoint's networks, in all precisions that may be asked for."""
    from ditforge.export.families import read_networks
    from ditforge.export.graph.measure_footprint import measure, runs
    from ditforge.export.quantisation.precision import EIGHT_BIT, Precision

    footprints: dict[str, dict[str, Footprint]] = {}
    model, _, networks = read_networks(checkpoint, Precision("fp32" if precision == "fp32" else "bf16"))  # or fp16
    check_size(model, size)
    with terminal.progress("plan") as report:
        total, done = sum(len(runs(network, model)) for network in networks), 0
        for network in networks:

            def step(name: str = network.name) -> None:
                nonlocal done
                done += 1
                report(name, done, total)

            found = measure(network, model, step)
            eight_bit = {scheme: found.footprint(scheme) for scheme in EIGHT_BIT if network.linears}
            footprints[network.name] = {"plain": found.footprint(), **eight_bit}
    return Subject(model, footprints)
