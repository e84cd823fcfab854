"""`ditforge gpus`: the GPU table."""

from __future__ import annotations

from ditforge import terminal


def gpus() -> None:
    """The GPUs by name: what they can do, and what is chosen for them.

    Example: ditforge gpus
    """
    from ditforge.engines.gpus import table

    headings = ("--gpu", "product", "capability", "memory", "FP8", "compilers", "default precision")
    terminal.table(headings, table())
