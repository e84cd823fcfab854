"""Checkpoints that commands are given as repositories of the Hub: downloaded, with progress, before anything else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ditforge import terminal


def downloaded(
    checkpoint: Path,
    base: Path | None = None,
    loras: Sequence[tuple[Path, float]] = (),
    text_encoders: str = "all",
    weights: bool = True,
) -> tuple[Path, Path | None, Sequence[tuple[Path, float]]]:
    """A checkpoint, its base and LoRAs, as `ditforge.export.checkpoint.hub.localised` makes them: on this machine.

    `weights` False: a folder's configurations and tokenizers are enough.
    """
    from ditforge.export.checkpoint import hub

    with terminal.progress("download", unit="bytes", begins="downloading from the Hugging Face Hub") as report:
        return hub.localised(checkpoint, base, loras, text_encoders, weights, report)
