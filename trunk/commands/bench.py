"""`ditforge bench`: tells how fast engines are on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ditforge import terminal
from ditforge.reports import Json, show

if TYPE_CHECKING:
    from ditforge.engines.bench import Bench, Step, Timing

HEADINGS = ("network", "precision", "compiler", "ms", "fastest", "slowest", "load", "GPU memory")
STEP = ("a step on", "compiler", "precision", "pixels", "samples", "ms", "of the limit", "steps/s", "GPU memory")


def bench(
    engines: Annotated[Path, typer.Argument(metavar="ENGINE_DIR", help="What build wrote, for this machine.")],
    size: Annotated[
        str | None, typer.Option(metavar="WxH", help="Width x height in pixels; by default the model's.")
    ] = None,
    batch: Annotated[int, typer.Option(metavar="N", help="Pictures at a time.")] = 1,
    runs: Annotated[int, typer.Option(metavar="N", help="Calls of each network that are timed.")] = 10,
    as_json: Json = False,
) -> None:
    """How fast engines are on this machine, each network by itself.

    A call is timed from inputs to outputs in the machine's memory, without a server. Inputs are random. The last table
    says how many times the limit a step takes: what its products and its attention alone would take, at rates that are
    measured then and there.

    Example: ditforge bench out/engines --size 1024x1024
    """
    from ditforge.engines.bench import bench

    with terminal.progress("bench") as report:
        found = bench(engines, size, batch, runs, report)
    show(found, say, as_json)


def say(found: Bench) -> None:
    """Print a row for each network, and what they add up to."""
    terminal.say(
        f"{found.model} on {found.device}, {found.width} x {found.height} pixels, "
        f"pictures at a time: {found.batch}, median of {found.runs} calls"
    )
    terminal.table(HEADINGS, map(row, found.timings))
    if found.picture_s is not None:
        pictures = "a picture" if found.batch == 1 else f"{found.batch} pictures"
        terminal.say(f"{pictures} of {found.steps} steps: {found.picture_s:.3g} s in these calls")
    if found.step is not None:
        terminal.table(STEP, [step_row(found, found.step)])
        if found.step.unknown:
            terminal.say(f"no limit: {found.step.unknown}")


def step_row(found: Bench, step: Step) -> tuple[str, ...]:
    """The row of the DiT's step, in the columns of STEP."""
    share = "" if step.of_limit is None else f"{step.of_limit:.2f} x {step.limit_ms:.4g} ms"
    pixels, rate = f"{found.width} x {found.height}", f"{step.steps_a_second:.3g}"
    made = found.device, step.compiler, step.precision, pixels, str(step.samples), f"{step.ms:.4g}", share, rate
    return *made, memory_of(step.gpu_memory)


def memory_of(size: int | None) -> str:
    """Bytes of a GPU's memory in words; empty where there is no GPU."""
    return "" if size is None else f"{size / 2**30:.1f} GiB"


def row(timing: Timing) -> tuple[str, ...]:
    """The row of a table for a network, in the columns of HEADINGS."""
    times = (f"{number:.3g}" for number in (timing.ms, timing.least_ms, timing.most_ms))
    return (
        timing.component,
        timing.precision,
        timing.compiler,
        *times,
        f"{timing.load_s:.1f} s",
        memory_of(timing.gpu_memory),
    )
