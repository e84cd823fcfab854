"""`ditforge bench`: tells how fast engines are on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ditforge import terminal
from ditforge.reports import Json, show

if TYPE_CHECKING:
    from ditforge.engines.bench import Bench, Timing

HEADINGS = ("network", "precision", "compiler", "ms", "fastest", "slowest", "load", "GPU memory")


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

    A call is timed from inputs to outputs in the machine's memory, without a server. Inputs are random.

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


def row(timing: Timing) -> tuple[str, ...]:
    """The row of a table for a network, in the columns of HEADINGS."""
    memory = "" if timing.gpu_memory is None else f"{timing.gpu_memory / 2**30:.1f} GiB"
    times = (f"{number:.3g}" for number in (timing.ms, timing.least_ms, timing.most_ms))
    return timing.component, timing.precision, timing.compiler, *times, f"{timing.load_s:.1f} s", memory
