"""The command line. Each command imports what it needs when it runs: `ditforge --help` loads nothing heavy."""

from __future__ import annotations

import io
import os
import shutil
import signal
import sys
import threading
import warnings
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from ditforge import __version__
from ditforge.errors import DitforgeError, DitforgeWarning, UserError

if TYPE_CHECKING:
    from ditforge.triton_repo.server import Options

app = typer.Typer(
    name="ditforge",
    help="Text-to-image diffusion transformers as engines for one GPU, served by Triton.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Out = Annotated[Path, typer.Option("--out", help="The folder to write; it appears whole or not at all.")]
PRECISION_HELP = "fp32, fp16, bf16; for the DiT's linears also fp8, fp8-weights, int8-weights."
Precision = Annotated[str, typer.Option(help=PRECISION_HELP)]
GPU_HELP = "What to compile for: a name that ditforge gpus lists, sm_89, several (sm_86,sm_89), local, or cpu."
Gpu = Annotated[str, typer.Option("--gpu", help=GPU_HELP)]
Compiler = Annotated[str | None, typer.Option(help="onnxruntime, tensorrt-rtx or tensorrt; by default the GPU's.")]
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
GPU_MEMORY_HELP = "Plan as if the GPU had that many GB of memory; by default, what it has."
GpuMemory = Annotated[float | None, typer.Option(metavar="GB", help=GPU_MEMORY_HELP)]
MAX_BATCH_HELP = "The most samples that Triton puts into one call; by default 8, or what the engines take."
MaxBatch = Annotated[int | None, typer.Option(help=MAX_BATCH_HELP)]
PORT_HELP = "The port that clients reach, for gRPC; 0 picks a free one."
Port = Annotated[int, typer.Option(metavar="PORT", help=PORT_HELP)]
HOST_HELP = "The IPv4 address or name to listen at; 0.0.0.0 is every network, and needs TLS, or --insecure."
Host = Annotated[str, typer.Option(metavar="HOST", help=HOST_HELP)]
URL_HELP = "A server's gRPC port, by default localhost:8001; again for others that serve the same engines."
Urls = Annotated[list[str] | None, typer.Option("--url", metavar="HOST:PORT", help=URL_HELP)]
TLS_HELP = "Encrypt the connection, and trust the public authorities; not needed beside the next three."
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
Source = Annotated[
    Path, typer.Argument(metavar="CHECKPOINT", help="A folder in diffusers' layout, or a .safetensors file.")
]
Base = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="The diffusers folder with what a single file lacks.")
]
Loras = Annotated[
    list[str] | None, typer.Option(metavar="FILE:STRENGTH", help="A LoRA to add to the weights; again for more.")
]
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


# Any mistake in the arguments, of which BadParameter is one: typer has no public name for it before it took click in.
USAGE_ERROR: type[typer.BadParameter] = typer.BadParameter.__mro__[1]


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    """Checkpoint → export → build → repo → serve → generate."""
    if version:
        print(f"ditforge {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(2)


@app.command()
def export(
    checkpoint: Source,
    out: Out,
    precision: Precision = "fp32",
    activations: Annotated[str, typer.Option(help="What surrounds 8-bit weights: bf16, fp16 or fp32.")] = "bf16",
    calibration: Ranges = None,
    max_error: Annotated[
        float | None, typer.Option(help="Keep the worst linears 16-bit until the velocity errs no more, e.g. 0.02.")
    ] = None,
    text_encoders: TextEncoders = "all",
    random_weights: RandomWeights = False,
    base: Base = None,
    lora: Loras = None,
    t5_precision: T5Precision = None,
) -> None:
    """Checkpoint to ONNX.

    Example: ditforge export models/flux-tiny --out out/onnx --precision fp8-weights
    """
    from ditforge import terminal
    from ditforge.export.checkpoint.source import parse_lora
    from ditforge.export.onnx_export import export_checkpoint
    from ditforge.export.quantisation.precision import parse_precision, with_t5

    asked = with_t5(parse_precision(precision, activations), t5_precision)
    loras = [parse_lora(option) for option in lora or ()]
    with terminal.progress("export", unit="bytes") as report, terminal.progress("measure") as measured:
        exported = export_checkpoint(
            checkpoint, out, asked, calibration, max_error, report, text_encoders, random_weights, base, loras, measured
        )
    if exported.fresh:
        terminal.say(f"{out} is up to date")
        return
    for name, component in exported.manifest.components.items():
        if component.layers or component.precision not in ("none", precision):
            terminal.say(f"{name} is {component.precision}: {component.reason}")
    if exported.choice:
        errors, keep = exported.choice.errors, exported.choice.keep
        rows = [(name, f"{error:.4f}", asked.base if name in keep else asked.name) for name, error in errors.items()]
        terminal.table(("linear", "error in 8 bits", "becomes"), rows)
        terminal.say(f"relative error of the velocity: {exported.choice.velocity:.4f}")


@app.command()
def calibrate(
    checkpoint: Source,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The JSON file to write.")],
    prompts: Annotated[Path | None, typer.Option(metavar="FILE", help="One a line; by default 128 of ours.")] = None,
    steps: Annotated[int | None, typer.Option(help="Sampler steps; by default the model's.")] = None,
    base: Base = None,
    lora: Loras = None,
    text_encoders: TextEncoders = "all",
) -> None:
    """Activation ranges for fp8: runs the checkpoint over prompts and notes the largest inputs.

    Example: ditforge calibrate models/flux-tiny --out out/ranges.json
    """
    from ditforge import terminal
    from ditforge.export.checkpoint.source import parse_lora
    from ditforge.export.quantisation import calibration

    texts, loras = calibration.read_prompts(prompts), [parse_lora(option) for option in lora or ()]
    with terminal.progress("calibrate") as report:
        ranges = calibration.calibrate(checkpoint, out, texts, steps, report, base, loras, text_encoders)
    terminal.say(
        f"{out}: ranges of {len(ranges.amax)} linears over {ranges.prompts} prompts, {ranges.steps} steps each"
    )


@app.command()
def build(
    onnx: Annotated[Path, typer.Argument(metavar="ONNX_DIR", help="What export wrote.")],
    out: Out,
    gpu: Gpu = "cpu",
    compiler: Compiler = None,
    resolutions: Resolutions = None,
    static: Static = None,
    batch: Batch = None,
    vae_tile: VaeTile = None,
    segments: Segments = "auto",
    residency: Residency = None,
    gpu_memory: GpuMemory = None,
) -> None:
    """ONNX to engines for one device; engines that are there already are kept.

    Example: ditforge build out/onnx --gpu rtx4090 --resolutions 512-1536 --out out/engines
    """
    from ditforge import planning, terminal
    from ditforge.engines import build as building
    from ditforge.engines.memory import fitting

    parts = fitting.parse_segments(segments)
    with terminal.progress("build") as report:
        built = building.build(
            onnx,
            out,
            gpu,
            compiler,
            report,
            resolutions=resolutions,
            static=static,
            batch=batch,
            vae_tile=vae_tile,
            segments=parts,
            residency=residency,
            gpu_memory=gpu_memory,
            planned=planning.say_plan,
        )
    for name, reason in built.rebuilt.items():
        terminal.say(f"built {name}: {reason}")
    if not built.rebuilt:
        terminal.say(f"{out} is up to date: nothing to build")


@app.command()
def plan(
    checkpoint: Annotated[
        Path, typer.Argument(help="A folder in diffusers' layout, a .safetensors file, or what export wrote.")
    ],
    gpu: Annotated[str | None, typer.Option(help="A name that ditforge gpus lists, or local; by default, all.")] = None,
    precision: Annotated[str | None, typer.Option(help=f"{PRECISION_HELP} By default the GPU's.")] = None,
    size: Annotated[int | None, typer.Option(help="Pictures of up to that many pixels; by default several.")] = None,
    random_weights: RandomWeights = False,
    base: Base = None,
    gpu_memory: GpuMemory = None,
    text_encoders: TextEncoders = "all",
) -> None:
    """What will be in a GPU's memory, and when; nothing is written.

    Example: ditforge plan flux.1-dev --random-weights --gpu rtx3060
    """
    from ditforge import planning

    planning.show(checkpoint, gpu, precision, size, random_weights, base, gpu_memory, text_encoders)


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What build or export wrote.")],
    against: Annotated[Path | None, typer.Option(metavar="ONNX_DIR", help="Compare with this fp32 export.")] = None,
) -> None:
    """Check that engines or an export are undamaged, and what they compute.

    Example: ditforge verify out/engines --against out/onnx
    """
    from ditforge import terminal
    from ditforge.engines.verify import HEADINGS, compare, verify_files

    count = verify_files(folder)
    terminal.say(f"{folder}: {count} files, all as the manifest says")
    if against is not None:
        with terminal.progress("verify") as report:
            rows = compare(folder, against, report)
        terminal.table(HEADINGS, [row.row() for row in rows])


@app.command()
def repo(
    engines: Annotated[Path, typer.Argument(metavar="ENGINE_DIR", help="What build wrote.")],
    out: Out,
    max_batch: MaxBatch = None,
) -> None:
    """Engines to a Triton model repository; one that is there already is kept.

    Example: ditforge repo out/engines --out out/repo
    """
    from ditforge import serving
    from ditforge.triton_repo.repository import write_repository

    serving.say_written(out, write_repository(engines, out, max_batch))


@app.command()
def serve(
    repository: Annotated[Path, typer.Argument(metavar="REPO_DIR", help="What repo wrote.")],
    port: Port = 8001,
    host: Host = "127.0.0.1",
    log: Log = None,
    timeout: Timeout = 600,
    grace: Grace = 30,
    http_port: HttpPort = None,
    metrics_port: MetricsPort = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    tls_client_ca: TlsClientCa = None,
    token_file: TokenFile = None,
    insecure: Insecure = False,
) -> None:
    """Run Triton on a model repository until Ctrl-C or SIGTERM, which let unfinished pictures be finished.

    Example: ditforge serve out/repo --port 8001
    """
    from ditforge import serving

    options: Options = {
        "port": port,
        "host": host,
        "log": log,
        "timeout": timeout,
        "grace": grace,
        "http_port": http_port,
        "metrics_port": metrics_port,
        "tls_cert": tls_cert,
        "tls_key": tls_key,
        "tls_client_ca": tls_client_ca,
        "token_file": token_file,
        "insecure": insecure,
    }
    serving.serve(repository, options)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What the picture shows.")],
    url: Urls = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="A .png file; by default picture-SEED.png.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed, the same picture; by default random.")] = None,
    steps: Annotated[int | None, typer.Option(help="Sampler steps; by default the model's.")] = None,
    height: Annotated[int | None, typer.Option(help="In pixels; by default the model's.")] = None,
    width: Annotated[int | None, typer.Option(help="In pixels; by default the model's.")] = None,
    guidance: Annotated[float | None, typer.Option(help="How strictly the prompt is followed.")] = None,
    sampler: Annotated[str, typer.Option(metavar="NAME", help="euler, heun or dpmpp_2m.")] = "euler",
    count: Annotated[int, typer.Option(help="How many pictures, of the seeds SEED, SEED + 1, …")] = 1,
    negative_prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What the picture should not be; needs guidance above 1.")
    ] = None,
    true_cfg: Annotated[
        float | None,
        typer.Option(help="The negative prompt's scale in models that have guidance built in; by default 1, off."),
    ] = None,
    skip_layer_guidance: Annotated[
        float | None, typer.Option(help="Its scale, for models that have it; 2.8 is usual, by default 0, off.")
    ] = None,
    t5: Annotated[
        str | None, typer.Option(metavar="WHEN", help="always, never, or auto: not for short and plain prompts.")
    ] = None,
    vae_tile: Annotated[
        int | None, typer.Option(help="Decode in tiles of this many pixels, to save memory; by default as need be.")
    ] = None,
    timeout: Annotated[float, typer.Option(metavar="SECONDS", help="How long the pictures may take in all.")] = 1800,
    connect_timeout: Annotated[
        float, typer.Option(metavar="SECONDS", help="How long to wait at first until a server answers and is ready.")
    ] = 10,
    step_timeout: Annotated[
        float, typer.Option(metavar="SECONDS", help="How long a server may take for a call, before it is repeated.")
    ] = 300,
    retry_timeout: Annotated[
        float, typer.Option(metavar="SECONDS", help="How long a call that failed is repeated; 0: at each server once.")
    ] = 60,
    token_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A file with the token that the server wants, and nothing else.")
    ] = None,
    tls: Annotated[bool, typer.Option("--tls", help=TLS_HELP)] = False,
    tls_ca: Annotated[
        Path | None, typer.Option(metavar="FILE", help="PEM: encrypt, and trust who signed these certificates.")
    ] = None,
    tls_cert: Annotated[
        Path | None, typer.Option(metavar="FILE", help="PEM: our own certificate, for a server that asks for it.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(metavar="FILE", help="PEM: the key to our certificate.")] = None,
) -> None:
    """A picture for a prompt, from a running server, or from several: where one fails, it goes on at another.

    Example: ditforge generate "a large red circle" --seed 0 --out circle.png
    """
    from ditforge import generating
    from ditforge.client.address import DEFAULT_URL
    from ditforge.client.option import TOKEN
    from ditforge.client.settings import make_settings
    from ditforge.client.tls import TLS
    from ditforge.credentials import read_token

    options = {"seed": seed, "steps": steps, "height": height, "width": width, "guidance": guidance, "sampler": sampler}
    options |= {"negative_prompt": negative_prompt, "true_cfg": true_cfg, "skip_layer_guidance": skip_layer_guidance}
    options |= {"t5": t5, "vae_tile": vae_tile}
    settings = make_settings(
        url or DEFAULT_URL,
        timeout=timeout,
        connect_timeout=connect_timeout,
        step_timeout=step_timeout,
        retry_timeout=retry_timeout,
        token=read_token(token_file, TOKEN) if token_file else None,
        tls=TLS(tls_ca, tls_cert, tls_key) if tls or tls_ca or tls_cert or tls_key else None,
    )
    generating.generate(prompt, settings, out, count, options)


@app.command()
def up(
    checkpoint: Source,
    gpu: Gpu = "cpu",
    precision: Annotated[str | None, typer.Option(help=f"{PRECISION_HELP} By default the GPU's.")] = None,
    calibration: Ranges = None,
    text_encoders: TextEncoders = "all",
    random_weights: RandomWeights = False,
    base: Base = None,
    lora: Loras = None,
    t5_precision: T5Precision = None,
    compiler: Compiler = None,
    resolutions: Resolutions = None,
    static: Static = None,
    gpu_memory: GpuMemory = None,
    max_batch: MaxBatch = None,
    port: Port = 8001,
    host: Host = "127.0.0.1",
    log: Log = None,
    timeout: Timeout = 600,
    grace: Grace = 30,
    http_port: HttpPort = None,
    metrics_port: MetricsPort = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    tls_client_ca: TlsClientCa = None,
    token_file: TokenFile = None,
    insecure: Insecure = False,
    cache: Annotated[Path | None, typer.Option(help="Where the stages' folders are kept; ~/.cache/ditforge.")] = None,
) -> None:
    """Export, build, repo and serve in one; what is there already from the last time is kept.

    Example: ditforge up models/flux-tiny
    """
    from ditforge import serving
    from ditforge.export.checkpoint.source import parse_lora

    options: Options = {
        "port": port,
        "host": host,
        "log": log,
        "timeout": timeout,
        "grace": grace,
        "http_port": http_port,
        "metrics_port": metrics_port,
        "tls_cert": tls_cert,
        "tls_key": tls_key,
        "tls_client_ca": tls_client_ca,
        "token_file": token_file,
        "insecure": insecure,
    }
    serving.check(options)
    repository = serving.prepare(
        checkpoint,
        gpu,
        precision,
        max_batch,
        cache,
        compiler=compiler,
        resolutions=resolutions,
        static=static,
        gpu_memory=gpu_memory,
        calibration=calibration,
        text_encoders=text_encoders,
        random=random_weights,
        base=base,
        loras=[parse_lora(option) for option in lora or ()],
        t5_precision=t5_precision,
    )
    serving.serve(repository, options)


@app.command()
def gpus() -> None:
    """The GPUs by name: what they can do, and what is chosen for them.

    Example: ditforge gpus
    """
    from ditforge import terminal
    from ditforge.engines.gpus import table

    headings = ("--gpu", "product", "capability", "memory", "FP8", "compilers", "default precision")
    terminal.table(headings, table())


@app.command()
def doctor() -> None:
    """What this machine can do, and what to install for the rest.

    Example: ditforge doctor
    """
    from ditforge import terminal
    from ditforge.doctor import findings, lines

    for line in lines(findings(), shutil.get_terminal_size().columns if sys.stdout.isatty() else None):
        terminal.say(line)


@app.command()
def inspect(path: Annotated[Path, typer.Argument(help="A folder that a stage wrote, or a picture.")]) -> None:
    """What a folder holds, or what made a picture.

    Example: ditforge inspect picture.png
    """
    from ditforge import inspection

    inspection.show(path)


def usage_problem(error: typer.BadParameter) -> str:
    """What is wrong with the arguments. Typer 0.29 does not say which value it could not convert; its cause does."""
    causes: list[dict[str, object]] = getattr(error.__cause__, "errors", list)()
    return error.format_message() + "".join(f", got {cause['input']!r}" for cause in causes)


def flush_output() -> None:
    """What is printed is there once a command has ended. Raises UserError where it cannot be."""
    from ditforge import terminal

    if sys.stdout is None:
        return
    try:
        with terminal.written():
            sys.stdout.flush()
    except BrokenPipeError:
        terminal.give_up_output()
        sys.exit(1)
    except UserError:
        terminal.give_up_output()
        raise


def main() -> None:
    """Run the command line. Exit code 0, 2 for the user's mistakes, 1 for ours, 130 after Ctrl-C, 143 after SIGTERM."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that temporary files are removed
    interrupted = threading.Event()

    def interrupt(number: int, frame: FrameType | None) -> None:
        interrupted.set()
        signal.default_int_handler(number, frame)

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell's background job ignores it
        signal.signal(signal.SIGINT, interrupt)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name in the terminal's encoding, whatever that is
    warnings.simplefilter("ignore")  # the libraries' remarks to their developers
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # what matters of it is in the errors
    warnings.simplefilter("default", DitforgeWarning)
    warnings.showwarning = lambda message, *args, **kwargs: print(f"warning: {message}", file=sys.stderr)
    try:
        code = app(standalone_mode=False)
        flush_output()
        if code == 130:  # which is how typer reports Ctrl-C
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # another one changes nothing any more
            print("interrupted", file=sys.stderr)
        sys.exit(code)
    except DitforgeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except USAGE_ERROR as error:
        command = error.ctx.command_path if error.ctx else "ditforge"
        print(f"error: {usage_problem(error)}\nfix:   {command} --help", file=sys.stderr)
        sys.exit(2)
    except ImportError as error:
        if interrupted.is_set():  # native modules make this of KeyboardInterrupt
            print("interrupted", file=sys.stderr)
            sys.exit(130)
        if not isinstance(error, ModuleNotFoundError):
            raise
        from ditforge.doctor import extra_for

        module = (error.name or "").split(".")[0]
        extra = extra_for(module)
        if extra is None:
            raise
        print(f"error: this command needs {module}, which is not installed", file=sys.stderr)
        print(f"fix:   pip install 'ditforge[{extra}]'", file=sys.stderr)
        sys.exit(2)
