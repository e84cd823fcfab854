"""`ditforge up`: makes everything that `serve` needs in a cache, and then runs the server."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from ditforge import terminal
from ditforge.cache import default_cache
from ditforge.commands.repo import say_written
from ditforge.commands.serve import serve_in_foreground
from ditforge.downloading import downloaded
from ditforge.errors import UserError
from ditforge.option import renamed
from ditforge.options import (
    Gpu,
    MaxBatch,
    Precision,
    RandomWeights,
    Ranges,
    ServeFlags,
    SizeFlags,
    Source,
    SourceFlags,
    T5Precision,
)
from ditforge.real_path import real_path

if TYPE_CHECKING:
    from ditforge.engines.gpus import Target
    from ditforge.export.checkpoint.source import CheckpointSource
    from ditforge.export.onnx_export import ExportOptions
    from ditforge.triton_repo.server import Options

OWN_FLAGS = {"--out": "--cache", "--batch": "--max-batch"}  # what the stages call its options → its own names
LONGEST_NAME = 80  # characters of the name of a folder in the cache, without the digest


def up(
    checkpoint: Source,
    source: SourceFlags,
    sizes: SizeFlags,
    server: ServeFlags,
    gpu: Gpu = "cpu",
    precision: Precision = None,
    calibration: Ranges = None,
    random_weights: RandomWeights = False,
    t5_precision: T5Precision = None,
    max_batch: MaxBatch = None,
    cache: Annotated[Path | None, typer.Option(help="Where the stages' folders are kept; ~/.cache/ditforge.")] = None,
) -> None:
    """Export, build, repo and serve in one. What is there already from the last time is kept.

    Example: ditforge up models/flux-tiny
    """
    options = server.options()
    check(options)
    check_cache(cache)
    origin = source.of(checkpoint, t5_precision, random_weights)
    with renamed(OWN_FLAGS):
        repository = prepare(Wanted(origin, gpu, precision, calibration, sizes, max_batch), cache)
    serve_in_foreground(repository, options)


def check(options: Options) -> None:
    """Raise UserError for wrong options of `serve` or ports that are in use. It is called before anything is made."""
    from ditforge.triton_repo.serve_options import make_options
    from ditforge.triton_repo.server import claim_ports

    claim_ports(make_options(Path(), dict(options)))


def check_cache(cache: Path | None) -> None:
    """Raise UserError if no folders can be made in `cache`, which need not exist. Nothing is made here."""
    folder = cache or default_cache()
    whole = real_path(folder)
    there = next(path for path in (whole, *whole.parents) if path.exists())
    if there.is_dir() and os.access(there, os.W_OK):
        return
    state = "read-only" if there.is_dir() else "no folder"
    problem = f"nothing can be kept in --cache {quote(str(folder))}: {there} is {state}"
    raise UserError(problem, "--cache FOLDER, with another one")


@dataclass(frozen=True)
class Wanted:
    """What to serve: a checkpoint on a GPU, in a precision (by default the GPU's), for these sizes and batches."""

    source: CheckpointSource
    gpu: str = "cpu"
    precision: str | None = None
    calibration: Path | None = None
    sizes: SizeFlags = field(default_factory=SizeFlags)
    max_batch: int | None = None


def prepare(wanted: Wanted, cache: Path | None) -> Path:
    """Run export, build and repo in a cache folder for this checkpoint, each only if something has changed.

    Precision and compiler are by default those that suit the GPU. With a calibration, the default precision is fp8.
    Returns the model repository. Raises UserError, before the export, for something that the GPU cannot do, and for
    sizes that the model cannot make.
    """
    from ditforge import folders

    folders.check_checkpoint(wanted.source.path)

    from ditforge.engines import gpus
    from ditforge.engines.build import BuildOptions, build
    from ditforge.export.checkpoint.source import opened

    with terminal.waiting("up", "importing PyTorch"):
        from ditforge.export.families import read_networks
        from ditforge.export.onnx_export import export_checkpoint
    from ditforge.plan_report import say_plan
    from ditforge.triton_repo.repository import check_max_batch, write_repository

    source, sizes = wanted.source, wanted.sizes
    target = gpus.limited(gpus.find_target(wanted.gpu), sizes.gpu_memory)
    options = choose_options(wanted, target)
    asked = options.asked(source)
    if wanted.max_batch is not None:
        check_max_batch(wanted.max_batch)
    folder = (cache or default_cache()) / folder_name(source) / options_name(source, options)
    name, source = source.path, downloaded(source, weights=not source.random_weights)
    if sizes.resolutions or sizes.static:  # checked here, because the export takes a while and does not check them
        from ditforge.engines.profile import make_profiles

        with opened(source) as checkpoint:
            make_profiles(read_networks(checkpoint, asked)[0], sizes.resolutions, sizes.static, None)
    with terminal.progress("export", unit="bytes", begins=f"{name} to ONNX in {asked.name}") as report:
        export_checkpoint(source, folder / "onnx", options, report)
    made, batch = folder / str(target), wanted.max_batch if target.capabilities else None
    built_for = BuildOptions(wanted.gpu, **asdict(sizes), batch=batch, force=True)
    with terminal.progress("build", begins=f"engines for {target}") as report:
        build(folder / "onnx", made / "engines", built_for, report, say_plan)
    say_written(made / "repo", write_repository(made / "engines", made / "repo", wanted.max_batch, force=True))
    return made / "repo"


def choose_options(wanted: Wanted, target: Target) -> ExportOptions:
    """The options of an export for the target. Raises UserError if the precision or the compiler does not suit it."""
    from ditforge.engines.compilers.choice import check_compiler, choose
    from ditforge.export.onnx_export import ExportOptions
    from ditforge.suited import suited

    if target.capabilities:
        compiler = wanted.sizes.compiler
        check_compiler(choose(target)[0] if compiler is None else compiler, target)
    options, reason = suited(ExportOptions(wanted.precision, calibration=wanted.calibration), target)
    if wanted.precision is None and (target.capabilities or wanted.calibration):
        terminal.note(f"precision {options.precision}: {reason}")
    return replace(options, force=True)  # the folder belongs to this checkpoint, so that anything in it can be replaced


def folder_name(source: CheckpointSource) -> str:
    """The name of the checkpoint's folder in the cache: names for people, and a digest of all paths and strengths."""
    path = placed(source.path)
    name = "+".join(
        [path.name.removesuffix(".safetensors").removesuffix(".gguf"), *(lora.stem for lora, _ in source.loras)]
    )[:LONGEST_NAME]
    base = placed(source.base) if source.base else None
    paths = [path, base, *((placed(lora), strength) for lora, strength in source.loras)]
    return f"{name}{'-random' if source.random_weights else ''}-{digest(*paths)}"


def options_name(source: CheckpointSource, options: ExportOptions) -> str:
    """The name of an export's folder in the cache: its precisions, its text encoders, and the calibration."""
    from ditforge.export.quantisation.precision import EIGHT_BIT

    name = options.asked(source).name
    name += f"-{options.activations}" if options.precision in EIGHT_BIT else ""
    name += "" if source.text_encoders == "all" else f"-{source.text_encoders}"
    name += "".join(f"-{variant}" for variant in source.variant)
    name += f"-text-{source.text_length}" if source.text_length else ""
    name += f"-t5-{source.t5_precision}" if source.t5_precision else ""
    ranges = options.calibration
    return name + (f"-{ranges.stem}-{digest(ranges.resolve())}" if ranges else "")


def placed(path: Path) -> Path:
    """The absolute path if it exists. Otherwise it is a repository, or a published model's name, and is kept."""
    return path.resolve() if path.exists() else path


def digest(*parts: object) -> str:
    """Eight characters that distinguish one list of paths and numbers from another."""
    return sha256(repr([str(part) for part in parts]).encode()).hexdigest()[:8]
