"""The stages as Python functions. `import ditforge` offers them, together with `ditforge.Client`.

Each function imports what it needs when it is called, and prints nothing. It raises UserError for a wrong input, and
DitforgeError if something else fails. For an unknown option, the error suggests the nearest name.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from typing_extensions import TypedDict, Unpack

from ditforge.arguments import AnyPath, Lora, Name, Number, Variants, Whole, checked, read
from ditforge.option import check_names

if TYPE_CHECKING:
    from ditforge.engines.build import Built
    from ditforge.engines.memory.memory_plan import Plan
    from ditforge.export.onnx_export import Exported
    from ditforge.triton_repo.server import Options as ServeKeywords, Server

Progress = Callable[[str, int, int], None]
Planned = Callable[["Plan"], None]
Event = Callable[[str], object]
T = TypeVar("T")


class ExportKeywords(TypedDict, total=False):
    """The options of `export_checkpoint`: the fields of CheckpointSource and ExportOptions, and `gpu`."""

    base: AnyPath | None
    loras: Sequence[Lora]
    text_encoders: Name
    t5_precision: Name | None
    random_weights: bool
    variant: Variants
    text_length: Whole | None
    strict: bool
    gpu: Name | None
    precision: Name | None
    activations: Name | None
    calibration: AnyPath | None
    max_error: Number | None
    force: bool


class BuildKeywords(TypedDict, total=False):
    """The options of `build_engines`, which are the fields of BuildOptions."""

    gpu: Name
    compiler: Name | None
    resolutions: Name | None
    static: Name | None
    batch: Whole | None
    vae_tile: Whole | None
    segments: Whole | None
    residency: Name | None
    gpu_memory: Number | None
    force: bool


@checked
def export_checkpoint(
    checkpoint: AnyPath, out: AnyPath, progress: Progress | None = None, **options: Unpack[ExportKeywords]
) -> "Exported":
    """Export a checkpoint to ONNX in the folder `out`: the same as `ditforge export`.

    `checkpoint` is a folder in diffusers' layout, or a .safetensors or .gguf file. `progress` is called with (the
    network, as in "dit (4 of 5)", bytes of weights written, bytes in all). Options, by name:

    base: a folder in diffusers' layout with the components that a single file lacks.
    loras: files to add to the weights, or pairs of a file and its strength.
    text_encoders: "all", or "clip" to leave T5 out.
    t5_precision: the precision of T5, if it differs from the rest.
    random_weights: use random numbers in place of the weights; `checkpoint` may then be a published model's name.
    variant: which variant is meant, or a list of them, where files or configurations leave it open: of files, such as
        "fp16", or of a model, such as "dev".
    text_length: how many tokens of a prompt T5 reads; by default as many as the model was trained with.
    strict: raise an error, in place of warnings, if a part of the checkpoint's files has no effect on the export.
    gpu: what engines will be compiled for: a product such as "rtx4090", "sm_89", several ("sm_86,sm_89"), "local" or
        "cpu". It decides the precision and the activations that are not given.
    precision: fp32, fp16 or bf16; for the DiT's linears also fp8, fp8-weights or int8-weights. Without it and
        without `gpu`, it is fp32, and `build_engines` then refuses to make engines for a GPU.
    activations: the number format beside 8-bit weights: bf16, fp16 or fp32. It is bf16 without `gpu`.
    calibration: a file that `ditforge calibrate` wrote for this checkpoint; fp8 needs one.
    max_error: the largest relative error of the velocity. The linears with the largest 8-bit errors stay 16-bit until
        it is reached.
    force: also replace another model's export in `out`.

    Returns what was exported. If `out` holds the same export already, nothing is written, and `fresh` is true. Raises
    UserError, before anything is written, if the checkpoint is incomplete or of no known family, or if the disk has too
    little space.
    """
    given = keywords(ExportKeywords, options)
    from ditforge.engines.gpus import find_target
    from ditforge.export.checkpoint.source import CheckpointSource
    from ditforge.export.onnx_export import ExportOptions, export_checkpoint as export
    from ditforge.folders import check_checkpoint
    from ditforge.suited import suited

    check_checkpoint(Path(checkpoint))
    gpu = given.pop("gpu", None)
    chosen, _ = suited(made(ExportOptions, given), None if gpu is None else find_target(gpu))
    return export(made(CheckpointSource, {"path": checkpoint, **given}), Path(out), chosen, progress)


@checked
def build_engines(
    onnx: AnyPath,
    out: AnyPath,
    progress: Progress | None = None,
    planned: Planned | None = None,
    **options: Unpack[BuildKeywords],
) -> "Built":
    """Compile what `export_checkpoint` wrote into engines in the folder `out`: the same as `ditforge build`.

    `progress` is called with (what is being done, steps done, steps in all), and `planned` with the plan for the GPU's
    memory, if there is one. Options, by name:

    gpu: what to compile for: a product such as "rtx4090", "sm_89", several ("sm_86,sm_89"), "local", or "cpu" (the
        default).
    compiler: the name of a compiler; by default, the one that suits the GPU.
    resolutions: the range of heights and widths in pixels, "512-1536"; or with the one to be fastest at in between,
        "512-1024-1536".
    static: only these sizes, such as "1024x1024".
    batch: the largest batch.
    vae_tile: the side in pixels of the tiles in which the autoencoder takes pictures.
    segments: the number of engines into which the DiT is cut.
    residency: "resident", or "on-demand" for engines that are loaded for each call and then freed.
    gpu_memory: the GiB of the GPU's memory that the engines may take.
    force: also replace another model's engines in `out`.

    Returns the manifest, and the reason for each engine that was compiled. Raises UserError if the GPU cannot execute a
    component or has too little memory; `out` is then left as it was.
    """
    given = keywords(BuildKeywords, options)
    from ditforge.engines.build import BuildOptions, build

    return build(Path(onnx), Path(out), BuildOptions(**given), progress, planned)


@checked
def write_repository(engines: AnyPath, out: AnyPath, max_batch: Whole | None = None, force: bool = False) -> str:
    """Write a Triton model repository of what `build_engines` wrote: the same as `ditforge repo`.

    `max_batch` is how many samples Triton puts into one call of a model: by default 8, or what the engines take.
    `force` also replaces another model's repository in `out`. Returns the reason for writing it, or an empty string if
    `out` holds the same repository already. Raises UserError if the engines are damaged, or do not take such batches;
    `out` is then left as it was.
    """
    from ditforge.triton_repo.repository import write_repository as write

    return write(Path(engines), Path(out), max_batch, force)


@checked
def serve(repository: AnyPath, on_event: Event | None = None, **options: Unpack["ServeKeywords"]) -> "Server":
    """Run Triton on a model repository: the same as `ditforge serve`, but in the background.

    Returns once every model is ready. The server is a context manager that stops it, and `server.url` is where clients
    reach it. `on_event` is called from a thread, with a line of text whenever something happens to the server. The
    options are those of ditforge.triton_repo.serve_options.ServeOptions: port, host, log, timeout, grace, tls_cert, ….
    Raises UserError if the repository, an address, a file or the installation is at fault, and DitforgeError if the
    server does not get ready. Nothing is left running then.
    """
    from ditforge.triton_repo.server import start

    return start(Path(repository), on_event, **options)


def keywords(kind: Any, options: Mapping[str, object]) -> dict[str, Any]:
    """The options as the TypedDict `kind` has them. Raises UserError for an unknown one, and for one of another type.

    For an unknown option, the error suggests the nearest name.
    """
    check_names(options, kind.__annotations__)
    return dict(read(kind, options))


def made(record: type[T], given: Mapping[str, Any]) -> T:
    """Make a dataclass of those of the options that are its fields."""
    names = [field.name for field in fields(record)]  # type: ignore[arg-type]
    return record(**{name: given[name] for name in names if name in given})
