"""The report of `ditforge plan`: which network is where and when on a GPU, and how long a step takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from shlex import quote

from ditforge import terminal, verbosity
from ditforge.contract import DIT
from ditforge.engines import gpus
from ditforge.engines.compilers import find_compiler
from ditforge.engines.compilers.choice import check_compiler, choose
from ditforge.engines.gpus import Target
from ditforge.engines.memory import memory_plan
from ditforge.engines.memory.fitting import least_batch
from ditforge.engines.memory.memory_plan import Part, Plan, Traits
from ditforge.engines.speed import Estimate, estimate
from ditforge.errors import UserError
from ditforge.model import Model
from ditforge.placement import Placement
from ditforge.plan_subject import Subject, Wanted, choose_precision, read_subject

SIZES = (512, 768, 1024, 1536, 2048)


@dataclass(frozen=True)
class Place:
    """Where a network is in memory.

    place: resident, on-demand, streamed or cpu. size: the bytes that it takes there; if streamed, of the GPU's memory.
    segments, on_demand: the number of segments, and how many of these are loaded for each call and then freed.
    """

    name: str
    precision: str
    place: str
    segments: int
    on_demand: int
    size: int


@dataclass(frozen=True)
class Fit:
    """Whether, and how, a model makes pictures of up to `size` x `size` pixels on a GPU.

    peaks, peak: the bytes of the GPU's memory that are used in each phase, and the largest of these.
    usable: the bytes that engines can have, or None if the memory of the GPU is not known.
    vae_tile: the side in pixels of the autoencoder's tiles, or None if it takes whole pictures.
    estimate: how long it takes, or None if the GPU's speed is not known or it does not fit.
    """

    size: int
    fits: bool
    strategy: str
    vae_tile: int | None
    peak: int
    peaks: dict[str, int]
    usable: int | None
    places: tuple[Place, ...]
    reasons: tuple[str, ...]
    estimate: Estimate | None


@dataclass(frozen=True)
class GpuPlan:
    """The plan for a model on one GPU, for each size.

    compiler: whose engines are planned. precision: empty if the GPU lacks the one that is asked for.
    """

    gpu: str
    memory_gb: float
    compiler: str
    precision: str
    sizes: tuple[Fit, ...]


@dataclass(frozen=True)
class PlanReport:
    """The plans for a model on the GPU that the user named, or on every GPU of the table.

    steps: the number of steps of a picture.
    shown: the model's default size, or the nearest one that was planned.
    fits: whether the model fits the named GPU with pictures of that size, or None if no GPU was named.
    """

    model: str
    steps: int
    shown: int
    fits: bool | None
    gpus: tuple[GpuPlan, ...]


def make_report(
    wanted: Wanted, gpu: str | None = None, gpu_memory: float | None = None, compiler: str | None = None
) -> PlanReport:
    """Plan for one GPU, or for every GPU of the table, and engines of a compiler: by default, the one `build` takes.

    Raises UserError if the GPU or the model allows no plan.
    """
    if gpu_memory is not None and gpu is None:
        raise UserError("--gpu-memory is that of one GPU", "name it as well: --gpu rtx3060, or --gpu sm_86")
    target = None if gpu is None else find_card(gpu, gpu_memory)
    if target:
        choose_precision(target, wanted.precision)  # before anything is measured
    subject = read_subject(wanted)
    sizes = [wanted.size] if wanted.size else sizes_of(subject.model)
    shown = min(sizes, key=lambda side: abs(side - subject.model.default_size))
    if target and compiler:
        check_compiler(compiler, target)
    targets = [target] if target else [Target(one.name, (one.capability,), one.memory_gb) for one in gpus.GPUS]
    plans = tuple(plan_for(one, subject, wanted.precision, sizes, compiler) for one in targets)
    fits = next(fit.fits for fit in plans[0].sizes if fit.size == shown) if target else None
    return PlanReport(subject.model.name, subject.model.default_steps, shown, fits, plans)


def plan_for(
    target: Target, subject: Subject, precision: str | None, sizes: Sequence[int], compiler: str | None
) -> GpuPlan:
    """Plan a model on one GPU. The result has no sizes if the GPU lacks the precision."""
    memory, maker = float(target.memory_gb or 0), compiler or choose(target)[0]
    if precision is not None and any(precision not in gpus.precisions(one) for one in target.capabilities):
        return GpuPlan(target.name, memory, maker, "", ())
    chosen, parts = subject.parts(target, precision)
    traits = find_compiler(maker).traits
    fits = tuple(fit_of(target, subject.model, parts, chosen, side, traits) for side in sizes)
    return GpuPlan(target.name, memory, maker, chosen, fits)


def fit_of(target: Target, model: Model, parts: Sequence[Part], precision: str, side: int, traits: Traits) -> Fit:
    """Plan pictures of one size on a GPU, for engines with these traits."""
    batch = least_batch(model)
    plan = memory_plan.make_plan(parts, model, target, side, batch, traits=traits)
    places = (
        Place(name, plan.precisions[name], p.residency, p.segments, p.on_demand, plan.sizes[name])
        for name, p in plan.placements.items()
    )
    dit = next((one for one in parts if one.name == DIT), None)
    time = None
    if dit and plan.fits and (flops := next(iter(dit.footprints.values())).flops_at(side)):
        computed = next(iter(dit.footprints)) if precision == "as exported" else precision
        time = estimate(product_of(target), computed, batch * flops, model.default_steps)
    return Fit(
        side,
        plan.fits,
        plan.strategy,
        plan.vae_tile,
        plan.peak,
        dict(plan.peaks),
        plan.usable,
        tuple(places),
        tuple(plan.reasons),
        time,
    )


def product_of(target: Target) -> str:
    """The name of a GPU in the table. A `local` GPU has its driver's name, which contains the name of the product."""
    named = [
        gpu.name
        for gpu in gpus.GPUS
        if gpu.capability in target.capabilities and f"{gpu.product} " in f"{target.name} "
    ]
    return target.name if not named else max(named, key=len)


def find_card(gpu: str, memory_gb: float | None = None) -> Target:
    """Find the target of that name, with its memory. Raises UserError if its memory is neither known nor given.

    Also raises UserError for the CPU.
    """
    target = gpus.limited(gpus.find_target(gpu), memory_gb)
    if not target.capabilities:
        fix = "leave out --gpu, which plans for all GPUs; or name one: --gpu rtx3060   (ditforge gpus lists them)"
        raise UserError("the CPU is no GPU, and a plan is for a GPU's memory", fix)
    if target.memory_gb is None:
        example = next(one.name for one in gpus.GPUS if one.capability == target.capabilities[0])
        problem = f"{gpu} is no product, so its memory is not known"
        here = f"--gpu {quote(gpu)} --gpu-memory 12   with the GiB that it has"
        raise UserError(problem, f"{here}; or a product: --gpu {quote(example)}")
    return target


def sizes_of(model: Model) -> list[int]:
    """The sides of pictures to plan for, in pixels: the usual ones, or the model's own if it makes none of these."""
    usual = [size for size in SIZES if model.size_multiple <= size <= model.max_size]
    return usual if model.default_size >= SIZES[0] else sorted({model.default_size, model.max_size})


def say_plan(plan: Plan) -> None:
    """Print the plan that `build` has made, unless there was nothing to decide."""
    simple = plan.rank == 0 and all(placement.segments == 1 for placement in plan.placements.values())
    if simple or verbosity.is_quiet():
        return
    tiled = f", tiles of {plan.vae_tile} pixels" if plan.vae_tile else ""
    least = (
        "" if plan.usable is None else f", {memory_plan.gibibytes(plan.peak)} of {memory_plan.gibibytes(plan.usable)}"
    )
    terminal.say(f"plan: {plan.strategy}, batches of up to {plan.batch}{tiled}{least}")
    places = [
        (name, plan.precisions[name], p.residency, segments_of(p), plan.sizes[name])
        for name, p in plan.placements.items()
    ]
    say_places(places, plan.reasons)


def say_places(places: Sequence[tuple[str, str, str, str, int]], reasons: Sequence[str]) -> None:
    """Print where each network is, as its name, precision, place, segments and bytes, and then the reasons."""
    rows = [(*words, memory_plan.gibibytes(size)) for *words, size in places]
    terminal.table(("component", "precision", "place", "segments", "takes"), rows)
    for reason in reasons:
        terminal.say(f"- {reason}")


def segments_of(place: Place | Placement) -> str:
    """The number of segments of a network in words. It adds how many are loaded on demand if not all of them are."""
    partly = 0 < place.on_demand < place.segments
    return f"{place.segments}, {place.on_demand} on demand" if partly else str(place.segments)
