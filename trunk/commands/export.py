"""`ditforge export`: a checkpoint becomes ONNX."""

from __future__ import annotations

from typing import Annotated

import typer

from ditforge import terminal
from ditforge.downloading import downloaded
from ditforge.option import command
from ditforge.options import Force, GpuOrNone, Out, Precision, RandomWeights, Ranges, Source, SourceFlags, T5Precision


def export(
    checkpoint: Source,
    out: Out,
    source: SourceFlags,
    gpu: GpuOrNone = None,
    precision: Precision = None,
    activations: Annotated[
        str | None, typer.Option(help="What surrounds 8-bit weights: bf16, fp16 or fp32; by default, what the GPU has.")
    ] = None,
    calibration: Ranges = None,
    max_error: Annotated[
        float | None, typer.Option(help="Keep the worst linears 16-bit until the velocity errs no more, e.g. 0.02.")
    ] = None,
    random_weights: RandomWeights = False,
    t5_precision: T5Precision = None,
    force: Force = False,
) -> None:
    """Checkpoint to ONNX.

    Without --gpu and --precision it is fp32, for the CPU.

    Example: ditforge export models/flux-tiny --gpu rtx4090 --out out/onnx
    """
    from ditforge import folders, stage_folder
    from ditforge.engines import gpus

    folders.check_checkpoint(checkpoint)
    stage_folder.check_early(out, "onnx")
    target = None if gpu is None else gpus.find_target(gpu)

    with terminal.waiting("export", "importing PyTorch"):
        from ditforge.export.network import OF_THE_EXPORT
        from ditforge.export.onnx_export import ExportOptions, export_checkpoint
    from ditforge.suited import suited

    options, reason = suited(ExportOptions(precision, activations, calibration, max_error, force), target)
    origin = source.of(checkpoint, t5_precision, random_weights)
    asked = options.asked(origin)
    origin = downloaded(origin, weights=not random_weights)
    begins = f"{checkpoint} to ONNX in {asked.name}: {reason}"
    with (
        terminal.progress("export", unit="bytes", begins=begins) as report,
        terminal.progress("measure", unit="equal steps") as measured,
    ):
        exported = export_checkpoint(origin, out, options, report, measured)
    if exported.fresh:
        terminal.note(f"{out} is up to date, in {asked.name}: {reason}")
        return
    components = exported.manifest.components
    others = {
        name: component for name, component in components.items() if component.precision not in ("none", asked.name)
    }
    for name, component in components.items():
        if component.layers or (name in others and component.reason != OF_THE_EXPORT):
            terminal.note(f"{name} is {component.precision}: {component.reason}")
    if alike := [name for name, component in others.items() if component.reason == OF_THE_EXPORT]:
        terminal.note(f"{', '.join(alike)}: {asked.base}")
    if exported.choice:
        errors, keep = exported.choice.errors, exported.choice.keep
        rows = [(name, f"{error:.4f}", asked.base if name in keep else asked.name) for name, error in errors.items()]
        terminal.table(("linear", "error in 8 bits", "becomes"), rows)
        terminal.say(f"relative error of the velocity: {exported.choice.velocity:.4f}")
    size = sum(file.size for component in components.values() for file in component.files.values())
    terminal.note(f"wrote {out}: {len(components)} components in {asked.name}, {size / 1e9:.2f} GB")
    named = gpu or ("GPU" if options.precision else "cpu")
    terminal.note(f"next: {command('ditforge build {} --gpu {} --out DIR', out, named)}")
