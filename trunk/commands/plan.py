"""`ditforge plan`: what will be in a GPU's memory, and when."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ditforge.options import PRECISION_HELP, SOURCE_HELP, GpuMemory, RandomWeights, SourceFlags, path_or_repository


def plan(
    checkpoint: Annotated[Path, typer.Argument(help=f"{SOURCE_HELP} Or what export wrote.", parser=path_or_repository)],
    source: SourceFlags,
    gpu: Annotated[str | None, typer.Option(help="A name that ditforge gpus lists, or local; by default, all.")] = None,
    precision: Annotated[str | None, typer.Option(help=f"{PRECISION_HELP} By default the GPU's.")] = None,
    size: Annotated[int | None, typer.Option(help="Pictures of up to that many pixels; by default several.")] = None,
    random_weights: RandomWeights = False,
    gpu_memory: GpuMemory = None,
) -> None:
    """What will be in a GPU's memory, and when; nothing is written.

    Example: ditforge plan flux.1-dev --random-weights --gpu rtx3060
    """
    from ditforge import plan_report

    plan_report.show(source.of(checkpoint, random_weights=random_weights), gpu, precision, size, gpu_memory)
