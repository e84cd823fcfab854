"""`ditforge plan`: tells what will be in a GPU's memory, and when."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ditforge import terminal
from ditforge.options import (
    PRECISION_HELP,
    SOURCE_HELP,
    Compiler,
    GpuMemory,
    RandomWeights,
    SourceFlags,
    path_or_repository,
)
from ditforge.reports import Json, show

if TYPE_CHECKING:
    from ditforge.engines.speed import Estimate
    from ditforge.plan_report import Fit, GpuPlan, PlanReport

HOW_RECKONED = """
Times are estimates: the DiT's operations at 38 to 56 % of the GPU's published
rate, as ONNX Runtime and compiled PyTorch were measured on an H100. Encoding,
decoding, and the loading of segments in each step come on top."""


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
    compiler: Compiler = None,
    as_json: Json = False,
) -> None:
    """What will be in a GPU's memory, and how long a step takes. Nothing is made.

    The exit code is 1 where the model does not fit the GPU that is named, for pictures of --size or of its own size.

    Example: ditforge plan flux.1-dev --gpu rtx3060
    """
    from ditforge.plan_report import make_report
    from ditforge.plan_subject import Wanted

    wanted = Wanted(source.of(checkpoint, random_weights=random_weights), precision, size)
    report = make_report(wanted, gpu, gpu_memory, compiler)
    show(report, say, as_json)
    if report.fits is False:
        raise typer.Exit(1)


def say(report: PlanReport) -> None:
    """Print the table of one GPU and where its networks are, or a row for each GPU if none was named."""
    if report.fits is None:
        terminal.say(f"{report.model}, pictures of up to {report.shown} x {report.shown} (--size plans for others):")
        headings = ("--gpu", "memory", "engines of", "precision", "takes", "strategy", "tile", "a step")
        terminal.table(headings, [gpu_row(gpu, report.shown) for gpu in report.gpus])
    else:
        say_one(report, report.gpus[0])
    if any(fit.estimate for gpu in report.gpus for fit in gpu.sizes):
        terminal.say(HOW_RECKONED)


def gpu_row(gpu: GpuPlan, size: int) -> tuple[str, ...]:
    """The row of a GPU, for pictures of that size."""
    from ditforge.engines.memory.memory_plan import gibibytes

    known = gpu.gpu, f"{gpu.memory_gb:g} GiB", gpu.compiler
    if not gpu.sizes:
        return *known, "lacks it", "", "", "", ""
    fit = next(fit for fit in gpu.sizes if fit.size == size)
    return *known, gpu.precision, gibibytes(fit.peak), strategy(fit), tile(fit), step(fit.estimate)


def strategy(fit: Fit) -> str:
    """What is done to save memory."""
    return fit.strategy if fit.fits else "does not fit"


def tile(fit: Fit) -> str:
    """The side of the autoencoder's tiles."""
    return str(fit.vae_tile or "-")


def step(estimate: Estimate | None) -> str:
    """The estimated seconds of a step, as a range."""
    return "-" if estimate is None else f"{seconds(estimate.step_fast)}-{seconds(estimate.step_slow)} s"


def say_one(report: PlanReport, gpu: GpuPlan) -> None:
    """Print the table of a GPU, and where the networks are for pictures of one size."""
    from ditforge.engines.memory.memory_plan import PHASES, gibibytes
    from ditforge.plan_report import say_places, segments_of

    terminal.say(
        f"{report.model} on {gpu.gpu}, {gpu.memory_gb:g} GiB, engines of {gpu.compiler}, precision {gpu.precision}"
    )
    rows = [
        (f"{f.size} x {f.size}", strategy(f), tile(f), gibibytes(f.peak), step(f.estimate), picture(f.estimate))
        for f in gpu.sizes
    ]
    usable = gibibytes(next(fit.usable or 0 for fit in gpu.sizes))
    terminal.table(("pictures", "strategy", "tile", f"of {usable}", "a step", f"{report.steps} steps"), rows)
    shown = next(fit for fit in gpu.sizes if fit.size == report.shown)
    terminal.say("")
    terminal.say(f"pictures of up to {shown.size} x {shown.size} take of the {usable}:")
    terminal.table(PHASES, [[gibibytes(shown.peaks[phase]) for phase in PHASES]])
    terminal.say("")
    say_places([(p.name, p.precision, p.place, segments_of(p), p.size) for p in shown.places], shown.reasons)


def picture(estimate: Estimate | None) -> str:
    """The estimated seconds of all steps of a picture, as a range."""
    return "-" if estimate is None else f"{seconds(estimate.picture_fast)}-{seconds(estimate.picture_slow)} s"


def seconds(number: float) -> str:
    """A number of seconds with two significant digits, or as a whole number if it is larger."""
    return f"{number:.0f}" if number >= 10 else f"{number:.2g}" if number >= 1e-3 else "0.001"
