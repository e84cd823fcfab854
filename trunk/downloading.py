"""Downloads a checkpoint that is given as a repository of the Hugging Face Hub, before a command does anything else."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ditforge import terminal

if TYPE_CHECKING:
    from ditforge.export.checkpoint.source import CheckpointSource


def downloaded(source: CheckpointSource, weights: bool = True) -> CheckpointSource:
    """Return the checkpoint with local paths, after downloading what is not on this machine.

    If `weights` is false, only configurations and tokenizers are downloaded.
    """
    from ditforge.export.checkpoint.source import localised

    with terminal.progress("download", unit="bytes", begins="from the Hugging Face Hub") as report:
        return localised(source, weights, report)
