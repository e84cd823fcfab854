"""`ditforge build`: ONNX becomes engines for one device."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ditforge import terminal
from ditforge.options import Batch, Gpu, Out, Residency, Segments, SizeFlags, VaeTile


def build(
    onnx: Annotated[Path, typer.Argument(metavar="ONNX_DIR", help="What export wrote.")],
    out: Out,
    sizes: SizeFlags,
    gpu: Gpu = "cpu",
    batch: Batch = None,
    vae_tile: VaeTile = None,
    segments: Segments = "auto",
    residency: Residency = None,
) -> None:
    """ONNX to engines for one device; engines that are there already are kept.

    Example: ditforge build out/onnx --gpu rtx4090 --resolutions 512-1536 --out out/engines
    """
    from ditforge import plan_report
    from ditforge.engines import build as building
    from ditforge.engines.memory.fitting import parse_segments

    options = building.BuildOptions(
        gpu, **asdict(sizes), batch=batch, vae_tile=vae_tile, segments=parse_segments(segments), residency=residency
    )
    with terminal.progress("build") as report:
        built = building.build(onnx, out, options, report, plan_report.say_plan)
    for name, reason in built.rebuilt.items():
        terminal.say(f"built {name}: {reason}")
    if not built.rebuilt:
        terminal.say(f"{out} is up to date: nothing to build")
