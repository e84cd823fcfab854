"""`ditforge calibrate`: the activation ranges that fp8 needs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ditforge import terminal
from ditforge.downloading import downloaded
from ditforge.options import Source, SourceFlags


def calibrate(
    checkpoint: Source,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The JSON file to write.")],
    source: SourceFlags,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="One a line, # for comments; by default 128 of ours.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Sampler steps; by default the model's.")] = None,
) -> None:
    """Activation ranges for fp8. It runs the checkpoint over prompts and notes the largest inputs.

    The same calibration of the same files is kept in ~/.cache/ditforge, and not made again.

    Example: ditforge calibrate models/flux-tiny --out out/ranges.json
    """
    from ditforge import folders
    from ditforge.small_files import check_writable

    folders.check_checkpoint(checkpoint)
    check_writable(out, "ranges.json")

    with terminal.waiting("calibrate", "importing PyTorch"):
        from ditforge.export.quantisation import calibration
        from ditforge.export.quantisation.kept_calibration import calibrate_once

    calibration.check_steps(steps)
    texts = calibration.read_prompts(prompts)
    origin = downloaded(source.of(checkpoint))
    with terminal.progress("calibrate", unit="equal steps") as report:
        ranges, kept = calibrate_once(origin, out, texts, steps, report)
    terminal.note(
        f"{out}: ranges of {len(ranges.amax)} linears over {counted(ranges.prompts, 'prompt')}, "
        f"{counted(ranges.steps, 'step')} each{', kept from an earlier run' if kept else ''}"
    )


def counted(count: int, noun: str) -> str:
    """A number of things in words, with the noun in the singular or the plural."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
