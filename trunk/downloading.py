"""Downloads checkpoints that are given as repositories of the Hub, before a command does anything else."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ditforge import terminal

if TYPE_CHECKING:
    from ditforge.export.checkpoint.source import CheckpointSource


def downloaded(source: CheckpointSource, weights: bool = True) -> CheckpointSource:
    """The same checkpoint on this machine. Without `weights`, only configurations and tokenizers are downloaded."""
    from ditforge.export.checkpoint.source import localised

    with terminal.progress("download", unit="bytes", begins="from the Hugging Face Hub") as report:
        return localised(source, weights, report)
