"""`ditforge up`: everything that `serve` needs, in a cache, and then the server."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ditforge import terminal
from ditforge.cache import default_cache
from ditforge.commands.repo import say_written
from ditforge.commands.serve import serve_in_foreground
from ditforge.contract import DIT
from ditforge.errors import UserError
from ditforge.options import (
    PRECISION_HELP,
    Gpu,
    MaxBatch,
    RandomWeights,
    Ranges,
    ServeFlags,
    SizeFlags,
    Source,
    SourceFlags,
    T5Precision,
)

if TYPE_CHECKING:
    from ditforge.triton_repo.server import Options

LONGEST_NAME = 80  # of a folder in the cache, before the digest


def up(
    checkpoint: Source,
    source: SourceFlags,
    sizes: SizeFlags,
    server: ServeFlags,
    gpu: Gpu = "cpu",
    precision: Annotated[str | None, typer.Option(help=f"{PRECISION_HELP} By default the GPU's.")] = None,
    calibration: Ranges = None,
    random_weights: RandomWeights = False,
    t5_precision: T5Precision = None,
    max_batch: MaxBatch = None,
    cache: Annotated[Path | None, typer.Option(help="Where the stages' folders are kept; ~/.cache/ditforge.")] = None,
) -> None:
    """Export, build, repo and serve in one; what is there already from the last time is kept.

    Example: ditforge up models/flux-tiny
    """
    options = server.options()
    check(options)
    check_cache(cache)
    repository = prepare(
        checkpoint,
        gpu,
        precision,
        max_batch,
        cache,
        calibration=calibration,
        text_encoders=source.text_encoders,
        random=random_weights,
        base=source.base,
        loras=source.loras,
        t5_precision=t5_precision,
        **asdict(sizes),
    )
    serve_in_foreground(repository, options)


def check(options: Options) -> None:
    """Raise UserError for options of `serve` that cannot be, or ports that are in use, before anything is made."""
    from ditforge.triton_repo.serve_options import make_options
    from ditforge.triton_repo.server import claim_ports

    claim_ports(make_options(Path(), dict(options)))


def check_cache(cache: Path | None) -> None:
    """Raise UserError where folders cannot be kept in `cache`, which need not exist; nothing is made."""
    folder = cache or default_cache()
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if there.is_dir() and os.access(there, os.W_OK):
        return
    problem = f"nothing can be kept in --cache {folder}: {there} is {'read-only' if there.is_dir() else 'no folder'}"
    raise UserError(problem, "--cache FOLDER, with another one")


def prepare(
    checkpoint: Path,
    gpu: str,
    precision: str | None,
    max_batch: int | None,
    cache: Path | None,
    *,
    compiler: str | None = None,
    resolutions: str | None = None,
    static: str | None = None,
    gpu_memory: float | None = None,
    calibration: Path | None = None,
    text_encoders: str = "all",
    random: bool = False,
    base: Path | None = None,
    loras: Sequence[tuple[Path, float]] = (),
    t5_precision: str | None = None,
) -> Path:
    """Export, build and repo into a cache folder of this checkpoint, each only where something changed.

    `calibration` to `t5_precision` are those of the export. Precision and compiler are by default the GPU's; with a
    calibration, fp8 is. Raises UserError for what the GPU cannot do, and for sizes that the model does not
    have, before the export.
    """
    from ditforge import folders

    folders.check_checkpoint(checkpoint)

    from ditforge.engines import gpus
    from ditforge.export.quantisation.precision import EIGHT_BIT, parse_precision, with_t5

    target = gpus.limited(gpus.find_target(gpu), gpu_memory)
    compiler = compiler or gpus.default_compiler(target)
    if precision is None and calibration:
        precision = "fp8"
        terminal.say(f"precision {precision}: a calibration is given")
    elif precision is None:
        precision, reason = gpus.default_precision(target)
        if target.capabilities:
            terminal.say(f"precision {precision}: {reason}")
    activations = gpus.default_activations(target)
    if target.capabilities:
        gpus.check_compiler(compiler, target)
        gpus.check_precision(DIT, precision, activations if precision in EIGHT_BIT else precision, target)

    from ditforge.engines.build import build
    from ditforge.engines.profile import make_profiles
    from ditforge.export.checkpoint.source import opened
    from ditforge.export.families import read_networks
    from ditforge.export.onnx_export import export_checkpoint
    from ditforge.plan_report import say_plan
    from ditforge.triton_repo.repository import check_max_batch, write_repository

    exported = f"{precision}-{activations}" if precision in EIGHT_BIT else precision
    exported += "" if text_encoders == "all" else f"-{text_encoders}"
    exported += f"-t5-{t5_precision}" if t5_precision else ""
    exported += f"-{calibration.stem}-{digest(calibration.resolve())}" if calibration else ""
    folder = (cache or default_cache()) / folder_name(checkpoint, base, loras, random) / exported
    asked = with_t5(parse_precision(precision, activations), t5_precision)
    if max_batch is not None:
        check_max_batch(max_batch)
    if resolutions or static:  # of which an export knows nothing, and it takes a while
        with opened(checkpoint, base, loras, text_encoders, random) as found:
            make_profiles(read_networks(found, asked)[0], resolutions, static, None)
    with terminal.progress("export", unit="bytes", begins=f"exporting {checkpoint} to ONNX") as report:
        export_checkpoint(
            checkpoint,
            folder / "onnx",
            asked,
            calibration,
            progress=report,
            text_encoders=text_encoders,
            random=random,
            base=base,
            loras=loras,
        )
    made, batch = folder / str(target), max_batch if target.capabilities else None
    with terminal.progress("build", begins=f"building engines for {target}") as report:
        build(
            folder / "onnx",
            made / "engines",
            gpu,
            compiler,
            report,
            resolutions=resolutions,
            static=static,
            gpu_memory=gpu_memory,
            batch=batch,
            planned=say_plan,
        )
    say_written(made / "repo", write_repository(made / "engines", made / "repo", max_batch))
    return made / "repo"


def folder_name(checkpoint: Path, base: Path | None, loras: Sequence[tuple[Path, float]], random: bool) -> str:
    """What the checkpoint is called in the cache: names for people, and a digest of all paths and strengths."""
    path = checkpoint.resolve() if checkpoint.exists() else checkpoint  # else the name of a published model
    name = "+".join([path.name.removesuffix(".safetensors"), *(lora.stem for lora, _ in loras)])[:LONGEST_NAME]
    paths = [path, base.resolve() if base else None, *((lora.resolve(), strength) for lora, strength in loras)]
    return f"{name}{'-random' if random else ''}-{digest(*paths)}"


def digest(*parts: object) -> str:
    """Eight characters that tell one list of paths and numbers from another."""
    return sha256(repr([str(part) for part in parts]).encode()).hexdigest()[:8]
