"""`ditforge plan`: what will be in a GPU's memory, and when."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ditforge.options import (
    PRECISION_HELP,
    SOURCE_HELP,
    Base,
    GpuMemory,
    RandomWeights,
    TextEncoders,
    path_or_repository,
)


def plan(
    checkpoint: Annotated[Path, typer.Argument(help=f"{SOURCE_HELP} Or what export wrote.", parser=path_or_repository)],
    gpu: Annotated[str | None, typer.Option(help="A name that ditforge gpus lists, or local; by default, all.")] = None,
    precision: Annotated[str | None, typer.Option(help=f"{PRECISION_HELP} By default the GPU's.")] = None,
    size: Annotated[int | None, typer.Option(help="Pictures of up to that many pixels; by default several.")] = None,
    random_weights: RandomWeights = False,
    base: Base = None,
    gpu_memory: GpuMemory = None,
    text_encoders: TextEncoders = "all",
) -> None:
    """What will be in a GPU's memory, and when; nothing is written.

    Example: ditforge plan flux.1-dev --random-weights --gpu rtx3060
    """
    from ditforge import plan_report

    plan_report.show(checkpoint, gpu, precision, size, random_weights, base, gpu_memory, text_encoders)
