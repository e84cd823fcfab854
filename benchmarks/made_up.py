"""What benchmarks with random weights make up: a calibration, whose values change neither time nor memory."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ditforge.export.checkpoint.diffusers_folder import Checkpoint
from ditforge.export.quantisation.calibration import Calibration, config_digest

AMAX = 16.0  # the range of every linear


def write_calibration(model: str, checkpoint: Checkpoint, linears: Iterable[str], file: Path) -> None:
    """Write a calibration of the model that has the same range for each of the linears."""
    ranges = Calibration(
        model=model,
        config_sha256=config_digest(checkpoint),
        prompts_sha256="",
        prompts=0,
        steps=0,
        seed=0,
        guidance=0.0,
        height=0,
        width=0,
        amax=dict.fromkeys(linears, AMAX),
    )
    file.write_text(ranges.model_dump_json())
