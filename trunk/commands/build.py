"""`ditforge build`: ONNX becomes engines for one device."""

from __future__ import annotations

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

    parts = parse_segments(segments)
    with terminal.progress("build") as report:
        built = building.build(
            onnx,
            out,
            gpu,
            sizes.compiler,
            report,
            resolutions=sizes.resolutions,
            static=sizes.static,
            gpu_memory=sizes.gpu_memory,
            batch=batch,
            vae_tile=vae_tile,
            segments=parts,
            residency=residency,
            planned=plan_report.say_plan,
        )
    for name, reason in built.rebuilt.items():
        terminal.say(f"built {name}: {reason}")
    if not built.rebuilt:
        terminal.say(f"{out} is up to date: nothing to build")
