"""`ditforge gpus`: prints the table of GPUs."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

from ditforge import terminal
from ditforge.reports import Json, show

if TYPE_CHECKING:
    from ditforge.engines.gpu_table import GpuTable


def gpus(as_json: Json = False) -> None:
    """The GPUs by name: what they can do, and what suits them.

    Example: ditforge gpus
    """
    from ditforge.engines.gpu_table import table

    show(table(), say, as_json)


def say(report: GpuTable) -> None:
    """Print a block for each compute capability, narrow enough for 80 columns."""
    names, products = (max(len(getattr(gpu, field)) for gpu in report.gpus) for field in ("name", "product"))
    for capability, group in groupby(report.gpus, lambda gpu: gpu.capability):
        first, *others = group
        default = f"{first.default_compiler} (the default)" if len(first.compilers) > 1 else first.default_compiler
        compilers = ", ".join([default, *(name for name in first.compilers if name != first.default_compiler)])
        terminal.say(f"{capability} computes in {', '.join(first.precisions)}")
        terminal.say(f"  compiled by {compilers}")
        terminal.say(f"  {'':{names + products + 13}}default precision")
        for gpu in (first, *others):
            row = f"  {gpu.name:{names}}  {gpu.product:{products}}  {gpu.memory_gb:3} GiB  {gpu.default_precision}"
            terminal.say(row)
