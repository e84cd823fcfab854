"""`ditforge plan`: tells what will be in a GPU's memory, and when."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ditforge import terminal
from ditforge.options import PRECISION_HELP, SOURCE_HELP, GpuMemory, RandomWeights, SourceFlags, path_or_repository
from ditforge.reports import Json, show

if TYPE_CHECKING:
    from ditforge.engines.speed import Estimate
    from ditforge.plan_report import Fit, GpuPlan, PlanReport

HOW_RECKONED = (
    "Times are estimates: the DiT's operations at 38 to 56 % of the GPU's published rate, as ONNX Runtime and compiled "
    "PyTorch were measured on an H100. Text encoding, decoding and what is loaded in each step come on top."
)


def plan(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            help=f"{SOURCE_HELP} Or an export, or the name of a published model.", parser=path_or_repository
        ),
    ],
    source: SourceFlags,
    gpu: Annotated[str | None, typer.Option(help="A name that ditforge gpus lists, or local; by default, all.")] = None,
    precision: Annotated[str | None, typer.Option(help=f"{PRECISION_HELP} By default the GPU's.")] = None,
    size: Annotated[int | None, typer.Option(help="Pictures of up to that many pixels; by default several.")] = None,
    random_weights: RandomWeights = False,
    gpu_memory: GpuMemory = None,
    as_json: Json = False,
) -> None:
    """What will be in a GPU's memory, and when, and how long a step takes; nothing is made.

    The exit code is 1 where the model does not fit the GPU that is named, for pictures of --size or of its own size.

    Example: ditforge plan flux.1-dev --gpu rtx3060
    """
    from ditforge.plan_report import make_report
    from ditforge.plan_subject import Wanted

    wanted = Wanted(source.of(checkpoint, random_weights=random_weights), precision, size)
    report = make_report(wanted, gpu, gpu_memory)
    show(report, say, as_json)
    if report.fits is False:
        raise typer.Exit(1)


def say(report: PlanReport) -> None:
    """Print the table of one GPU and where its networks are, or a row for each GPU if none was named."""
    if report.fits is None:
        sizes = next(gpu.sizes for gpu in report.gpus if gpu.sizes)
        headings = ("--gpu", "memory", "precision", *(str(fit.size) for fit in sizes))
        terminal.table(headings, [gpu_row(gpu, len(sizes)) for gpu in report.gpus])
    else:
        say_one(report, report.gpus[0])
    if any(fit.estimate for gpu in report.gpus for fit in gpu.sizes):
        terminal.say("")
        terminal.say(HOW_RECKONED)


def gpu_row(gpu: GpuPlan, count: int) -> tuple[str, ...]:
    """The row of a GPU, with a cell for each of `count` sizes."""
    cells = tuple(map(cell, gpu.sizes)) or ("",) * count
    return gpu.gpu, f"{gpu.memory_gb:g} GB", gpu.precision or "lacks it", *cells


def cell(fit: Fit) -> str:
    """The plan for a size in a few characters: the peak in GB, the strategy, the tile, and the seconds of a step."""
    if not fit.fits:
        return f"does not fit: {fit.peak / 1e9:.1f}"
    tiled = f", tile {fit.vae_tile}" if fit.vae_tile else ""
    return f"{fit.peak / 1e9:.1f} {fit.strategy}{tiled}" + (f", {step(fit.estimate)}" if fit.estimate else "")


def step(estimate: Estimate) -> str:
    """The estimated seconds of a step, as a range."""
    return f"{seconds(estimate.step_fast)}-{seconds(estimate.step_slow)} s"


def say_one(report: PlanReport, gpu: GpuPlan) -> None:
    """Print the table of a GPU, and where the networks are for pictures of one size."""
    from ditforge.engines.memory.memory_plan import PHASES, gigabytes
    from ditforge.plan_report import say_places, segments_of

    terminal.say(f"{report.model} on {gpu.gpu}, {gpu.memory_gb:g} GB, precision {gpu.precision}")
    rows = []
    for fit in gpu.sizes:
        strategy = fit.strategy if fit.fits else f"does not fit: needs {gigabytes(fit.peak)}"
        peaks = (gigabytes(fit.peaks[phase]) for phase in PHASES)
        times = (step(fit.estimate), picture(fit.estimate)) if fit.estimate else ("-", "-")
        tile = str(fit.vae_tile or "-")
        rows.append((f"{fit.size} x {fit.size}", strategy, tile, *peaks, gigabytes(fit.usable or 0), *times))
    headings = ("pictures up to", "strategy", "tile", *PHASES, "of", "a step", f"{report.steps} steps")
    terminal.table(headings, rows)
    shown = next(fit for fit in gpu.sizes if fit.size == report.shown)
    terminal.say("")
    terminal.say(f"for pictures of up to {shown.size} x {shown.size}:")
    say_places([(p.name, p.precision, p.place, segments_of(p), p.size) for p in shown.places], shown.reasons)


def picture(estimate: Estimate) -> str:
    """The estimated seconds of all steps of a picture, as a range."""
    return f"{seconds(estimate.picture_fast)}-{seconds(estimate.picture_slow)} s"


def seconds(number: float) -> str:
    """A number of seconds with two significant digits, or as a whole number if it is larger."""
    return f"{number:.2g}" if number < 10 else f"{number:.0f}"
