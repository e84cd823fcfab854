"""The options that several commands share: their types, and dataclasses for options that belong together.

A command takes such a dataclass as one parameter, and `grouped` makes a command-line option of each of its fields.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, fields, is_dataclass
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from typing_extensions import get_type_hints  # works as in Python 3.11 on 3.10 too, where TensorRT 8.6 is tried

from ditforge import completion, verbosity
from ditforge.real_path import current_folder

if TYPE_CHECKING:
    from ditforge.export.checkpoint.source import CheckpointSource
    from ditforge.triton_repo.server import Options

Out = Annotated[Path, typer.Option("--out", help="The folder to write; it appears whole or not at all.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what is in --out even if it is of another model.")]
PRECISION_HELP = "fp32, fp16, bf16; for the DiT's linears also fp8, fp8-weights, int8-weights."
Precision = Annotated[
    str | None,
    typer.Option(help=f"{PRECISION_HELP} By default the GPU's.", autocompletion=completion.PRECISION),
]
GPU_HELP = "What to compile for: a name that ditforge gpus lists, sm_89, several (sm_86,sm_89), local, or cpu."
Gpu = Annotated[str, typer.Option("--gpu", help=GPU_HELP, autocompletion=completion.GPU)]
GpuOrNone = Annotated[str | None, typer.Option("--gpu", help=GPU_HELP, autocompletion=completion.GPU)]
COMPILER_HELP = "onnxruntime, inductor, tensorrt-rtx, tensorrt, or another that is installed; by default the GPU's."
Compiler = Annotated[str | None, typer.Option(help=COMPILER_HELP, autocompletion=completion.COMPILER)]
Resolutions = Annotated[
    str | None, typer.Option(metavar="MIN-MAX", help="Heights and widths in pixels, or MIN-BEST-MAX.")
]
Static = Annotated[
    str | None, typer.Option(metavar="WxH", help="Only these sizes, each with a profile; or W1xH1,W2xH2.")
]
Batch = Annotated[int | None, typer.Option(help="The largest batch that the engines take.")]
VaeTile = Annotated[
    int | None, typer.Option(help="The autoencoder takes tiles of this many pixels, to save memory; by default, all.")
]
SEGMENTS_HELP = "Compile the DiT in that many parts, which takes less memory; auto: as ditforge plan has it."
Segments = Annotated[str, typer.Option(metavar="N", help=SEGMENTS_HELP)]
Residency = Annotated[
    str | None, typer.Option(metavar="WHEN", help="resident; or on-demand: loaded for each call and then freed.")
]
GPU_MEMORY_HELP = "Plan as if the GPU had that many GiB of memory; by default, what it has."
GpuMemory = Annotated[float | None, typer.Option(metavar="GiB", help=GPU_MEMORY_HELP)]
MAX_BATCH_HELP = "The most samples that Triton puts into one call; by default 8, or what the engines take."
MaxBatch = Annotated[int | None, typer.Option(help=MAX_BATCH_HELP)]
PORT_HELP = "The port that clients reach, for gRPC; 0 picks a free one."
Port = Annotated[int, typer.Option(metavar="PORT", help=PORT_HELP)]
HOST_HELP = "The IPv4 address or name to listen at; 0.0.0.0 is every network, and needs TLS, or --insecure."
Host = Annotated[str, typer.Option(metavar="HOST", help=HOST_HELP)]
LOG_HELP = "The server's log is appended to this file. By default it is a temporary file, removed after a clean stop."
Log = Annotated[Path | None, typer.Option(metavar="FILE", help=LOG_HELP)]
TIMEOUT_HELP = "How long the models may take to be loaded before the start counts as failed."
Timeout = Annotated[float, typer.Option(metavar="SECONDS", help=TIMEOUT_HELP)]
GRACE_HELP = "When the server stops, unfinished pictures get this long to be finished, and no others are begun."
Grace = Annotated[float, typer.Option(metavar="SECONDS", help=GRACE_HELP)]
HTTP_HELP = "Open Triton's own HTTP port too. It is not protected: who reaches it can end Triton (docs/security.md)."
HttpPort = Annotated[int | None, typer.Option(metavar="PORT", help=HTTP_HELP)]
METRICS_HELP = "Serve metrics for Prometheus at http://HOST:PORT/metrics, unencrypted and without a token."
MetricsPort = Annotated[int | None, typer.Option(metavar="PORT", help=METRICS_HELP)]
TLS_CERT_HELP = "Encrypt gRPC with this certificate, a PEM file; it needs --tls-key."
TlsCert = Annotated[Path | None, typer.Option(metavar="FILE", help=TLS_CERT_HELP)]
TLS_KEY_HELP = "The private key to --tls-cert, a PEM file that is not encrypted."
TlsKey = Annotated[Path | None, typer.Option(metavar="FILE", help=TLS_KEY_HELP)]
TLS_CLIENT_CA_HELP = "Serve only clients that show a certificate signed by an authority in this PEM file (mutual TLS)."
TlsClientCa = Annotated[Path | None, typer.Option(metavar="FILE", help=TLS_CLIENT_CA_HELP)]
TOKEN_FILE_HELP = "Serve only clients that send the token in this file, one word of visible ASCII characters."
TokenFile = Annotated[Path | None, typer.Option(metavar="FILE", help=TOKEN_FILE_HELP)]
INSECURE_HELP = "Allow a --host that others can reach without TLS together with a token or client certificates."
Insecure = Annotated[bool, typer.Option("--insecure", help=INSECURE_HELP)]

Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Say on standard error what is being done, and why.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors and results alone.")]


def path_or_repository(text: str) -> Path:
    """Make a path of the given text. A relative path that begins with ./ or ../ and does not exist is made absolute.

    Otherwise it would be taken for a repository of the Hub, OWNER/NAME.
    """
    return Path(text).absolute() if text.startswith(("./", "../")) and not Path(text).exists() else Path(text)


SOURCE_HELP = (
    "A folder in diffusers' layout, a .safetensors or .gguf file, or a repository of the Hugging Face Hub: OWNER/NAME, "
    "OWNER/NAME@REVISION, OWNER/NAME/FILE.safetensors@REVISION."
)
Source = Annotated[Path, typer.Argument(metavar="CHECKPOINT", help=SOURCE_HELP, parser=path_or_repository)]
BASE_HELP = "The diffusers folder, or repository, with what a single file lacks."
Base = Annotated[Path | None, typer.Option(metavar="FOLDER", help=BASE_HELP, parser=path_or_repository)]
LORA_HELP = "A LoRA to add to the weights, a file or as OWNER/NAME; again for more."
Loras = Annotated[list[str] | None, typer.Option(metavar="FILE:STRENGTH", help=LORA_HELP)]
Ranges = Annotated[Path | None, typer.Option(metavar="FILE", help="What calibrate wrote; fp8 needs it.")]
TextEncoders = Annotated[
    str, typer.Option(help="all; or clip: without T5, for models that can do without it, to save memory.")
]
T5Precision = Annotated[
    str | None, typer.Option(metavar="P", help="T5's own: int8-weights for half the memory, fp32 for the CPU, …")
]
RandomWeights = Annotated[
    bool,
    typer.Option("--random-weights", help="CHECKPOINT's sizes, not its weights; a published model's name will do."),
]
VARIANT_HELP = "Which of several variants is meant, of files (fp16, bf16) or of a model; again for more."
Variants = Annotated[list[str] | None, typer.Option("--variant", metavar="NAME", help=VARIANT_HELP)]
TextLength = Annotated[
    int | None, typer.Option(metavar="TOKENS", help="How many tokens of a prompt T5 reads; by default the model's own.")
]
STRICT_HELP = "Stop, in place of a warning, if a part of the checkpoint's files has no effect on the export."
Strict = Annotated[bool, typer.Option("--strict", help=STRICT_HELP)]


@dataclass(frozen=True)
class ServeFlags:
    """How a repository is served. `ditforge.triton_repo.serve_options.ServeOptions` describes each field."""

    port: Port = 8001
    host: Host = "127.0.0.1"
    log: Log = None
    timeout: Timeout = 600
    grace: Grace = 30
    http_port: HttpPort = None
    metrics_port: MetricsPort = None
    tls_cert: TlsCert = None
    tls_key: TlsKey = None
    tls_client_ca: TlsClientCa = None
    token_file: TokenFile = None
    insecure: Insecure = False

    def options(self) -> Options:
        """The options of `ditforge.triton_repo.server.start`."""
        return {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[return-value]


@dataclass(frozen=True)
class SourceFlags:
    """What belongs to a checkpoint beside its own path."""

    base: Base = None
    lora: Loras = None
    text_encoders: TextEncoders = "all"
    variant: Variants = None
    text_length: TextLength = None
    strict: Strict = False

    def of(self, path: Path, t5_precision: str | None = None, random_weights: bool = False) -> CheckpointSource:
        """The checkpoint at `path` with all of these options. Raises UserError if a LoRA's strength is not a number."""
        from ditforge.export.checkpoint.source import CheckpointSource, parse_lora

        loras = tuple(parse_lora(option) for option in self.lora or ())
        variant = tuple(self.variant or ())
        return CheckpointSource(
            path,
            self.base,
            loras,
            self.text_encoders,
            t5_precision,
            random_weights,
            self.strict,
            variant,
            self.text_length,
        )


@dataclass(frozen=True)
class SizeFlags:
    """For which sizes of pictures engines are compiled, by which compiler, and for how much of the GPU's memory."""

    compiler: Compiler = None
    resolutions: Resolutions = None
    static: Static = None
    gpu_memory: GpuMemory = None


def named_path(text: str | Path) -> Path:
    """Make a path of a user's text. Raises typer.BadParameter if it is empty, which would mean the current folder."""
    if text == "":
        raise typer.BadParameter("the path is empty; . is the current folder")
    return Path(text)


def not_empty(annotation: Any) -> Any:
    """Return the type of an option or argument, changed so that an empty path is refused."""
    kind, *rest = get_args(annotation) or (annotation,)
    if kind not in (Path, Path | None) or not rest:
        return annotation
    info = copy(rest[0])
    info.parser, info.metavar = named_path, info.metavar or "PATH"
    return Annotated[kind, info]


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Return the command in the form that typer needs.

    A parameter that is a dataclass becomes an option for each of its fields. The options that every command has,
    --verbose and --quiet, are added.
    """
    types, parameters, records = get_type_hints(command, include_extras=True), list[Parameter](), dict[str, type]()
    for name, parameter in signature(command).parameters.items():
        record = types[name]
        if isinstance(record, type) and is_dataclass(record):
            records[name] = record
            inner = get_type_hints(record, include_extras=True)
            parameters += [
                Parameter(
                    field.name, Parameter.KEYWORD_ONLY, default=field.default, annotation=not_empty(inner[field.name])
                )
                for field in fields(record)
            ]
        else:
            parameters.append(parameter.replace(kind=Parameter.KEYWORD_ONLY, annotation=not_empty(types[name])))

    parameters += [
        Parameter(name, Parameter.KEYWORD_ONLY, default=False, annotation=annotation)
        for name, annotation in (("verbose", Verbose), ("quiet", Quiet))
    ]

    def run(**values: Any) -> None:
        verbosity.choose_also(values.pop("verbose"), values.pop("quiet"))
        current_folder()
        made = {
            name: record(**{field.name: values.pop(field.name) for field in fields(record)})
            for name, record in records.items()
        }
        command(**values, **made)

    run.__name__, run.__doc__, run.__module__ = command.__name__, command.__doc__, command.__module__
    run.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run
