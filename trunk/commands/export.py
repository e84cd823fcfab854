"""`ditforge export`: a checkpoint becomes ONNX."""

from __future__ import annotations

import os
from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from ditforge import terminal
from ditforge.downloading import downloaded
from ditforge.options import Out, Precision, RandomWeights, Ranges, Source, SourceFlags, T5Precision


def export(
    checkpoint: Source,
    out: Out,
    source: SourceFlags,
    precision: Precision = "fp32",
    activations: Annotated[str, typer.Option(help="What surrounds 8-bit weights: bf16, fp16 or fp32.")] = "bf16",
    calibration: Ranges = None,
    max_error: Annotated[
        float | None, typer.Option(help="Keep the worst linears 16-bit until the velocity errs no more, e.g. 0.02.")
    ] = None,
    random_weights: RandomWeights = False,
    t5_precision: T5Precision = None,
) -> None:
    """Checkpoint to ONNX.

    Example: ditforge export models/flux-tiny --out out/onnx --precision fp8-weights
    """
    from ditforge import folders

    folders.check_checkpoint(checkpoint)

    from ditforge.export.onnx_export import ExportOptions, export_checkpoint
    from ditforge.manifest import check_replaceable

    options = ExportOptions(precision, activations, calibration, max_error)
    origin = source.of(checkpoint, t5_precision, random_weights)
    asked = options.asked(origin)
    check_replaceable(Path(os.path.realpath(out)), "onnx", ())  # before gigabytes are downloaded for it
    origin = downloaded(origin, weights=not random_weights)
    with terminal.progress("export", unit="bytes") as report, terminal.progress("measure") as measured:
        exported = export_checkpoint(origin, out, options, report, measured)
    if exported.fresh:
        terminal.say(f"{out} is up to date")
        return
    components = exported.manifest.components
    for name, component in components.items():
        if component.layers or component.precision not in ("none", precision):
            terminal.say(f"{name} is {component.precision}: {component.reason}")
    if exported.choice:
        errors, keep = exported.choice.errors, exported.choice.keep
        rows = [(name, f"{error:.4f}", asked.base if name in keep else asked.name) for name, error in errors.items()]
        terminal.table(("linear", "error in 8 bits", "becomes"), rows)
        terminal.say(f"relative error of the velocity: {exported.choice.velocity:.4f}")
    size = sum(file.size for component in components.values() for file in component.files.values())
    terminal.say(f"wrote {out}: {len(components)} components, {size / 1e9:.2f} GB")
    terminal.say(f"next: ditforge build {quote(str(out))} --gpu GPU --out DIR")
