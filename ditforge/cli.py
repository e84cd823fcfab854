"""The command line. Each command imports what it needs when it runs: `ditforge --help` loads nothing heavy."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

from ditforge import __version__
from ditforge.errors import DitforgeError, DitforgeWarning

app = typer.Typer(
    name="ditforge",
    help="Text-to-image diffusion transformers as engines for one GPU, served by Triton.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Out = Annotated[Path, typer.Option("--out", help="The folder to write; it appears whole or not at all.")]
Precision = Annotated[str, typer.Option(help="fp32, fp16 or bf16, where a network can bear it.")]
Gpu = Annotated[str, typer.Option("--gpu", help="The device to compile for: cpu.")]
Compiler = Annotated[str, typer.Option(help="onnxruntime.")]
MaxBatch = Annotated[int, typer.Option(help="The most samples that Triton puts into one call.")]
Port = Annotated[int, typer.Option(help="The gRPC port; 0 picks a free one.")]
Host = Annotated[str, typer.Option(help="The address to listen at; 0.0.0.0 for all.")]
Log = Annotated[Path | None, typer.Option(help="The server's log file; by default a temporary file.")]


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
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint's folder in diffusers' layout.")],
    out: Out,
    precision: Precision = "fp32",
) -> None:
    """Checkpoint to ONNX.

    Example: ditforge export models/flux-tiny --out out/onnx
    """
    from ditforge import terminal
    from ditforge.export.onnx_export import export_checkpoint

    with terminal.progress("export") as report:
        exported = export_checkpoint(checkpoint, out, precision, report)
    if exported.fresh:
        terminal.say(f"{out} is up to date")
        return
    for name, component in exported.manifest.components.items():
        if component.precision not in ("none", precision):
            terminal.say(f"{name} is {component.precision}: {component.reason}")


@app.command()
def build(
    onnx: Annotated[Path, typer.Argument(metavar="ONNX_DIR", help="What export wrote.")],
    out: Out,
    gpu: Gpu = "cpu",
    compiler: Compiler = "onnxruntime",
) -> None:
    """ONNX to engines for one device; engines that are there already are kept.

    Example: ditforge build out/onnx --gpu cpu --out out/engines
    """
    from ditforge import terminal
    from ditforge.engines import build as building
    from ditforge.engines.targets import find_target

    with terminal.progress("build") as report:
        built = building.build(onnx, out, find_target(gpu), compiler, report)
    for name, reason in built.rebuilt.items():
        terminal.say(f"built {name}: {reason}")
    if not built.rebuilt:
        terminal.say(f"{out} is up to date: nothing to build")


@app.command()
def verify(
    engines: Annotated[Path, typer.Argument(metavar="ENGINE_DIR", help="What build wrote.")],
    against: Annotated[
        Path | None, typer.Option(metavar="ONNX_DIR", help="Compare outputs with these graphs'.")
    ] = None,
) -> None:
    """Check that a build is undamaged, and what its engines compute.

    Example: ditforge verify out/engines --against out/onnx
    """
    from ditforge import terminal
    from ditforge.engines.verify import compare, verify_files

    count = verify_files(engines)
    terminal.say(f"{engines}: {count} files, all as the manifest says")
    if against is not None:
        with terminal.progress("verify") as report:
            rows = compare(engines, against, report)
        terminal.table(
            ("component", "output", "largest difference", "relative error", "cosine"), [row.row() for row in rows]
        )


@app.command()
def repo(
    engines: Annotated[Path, typer.Argument(metavar="ENGINE_DIR", help="What build wrote.")],
    out: Out,
    max_batch: MaxBatch = 8,
) -> None:
    """Engines to a Triton model repository.

    Example: ditforge repo out/engines --out out/repo
    """
    from ditforge import terminal
    from ditforge.triton_repo.repository import write_repository

    written = write_repository(engines, out, max_batch)
    terminal.say(f"{out}: {', '.join(written.components)}")


@app.command()
def serve(
    repository: Annotated[Path, typer.Argument(metavar="REPO_DIR", help="What repo wrote.")],
    port: Port = 8001,
    host: Host = "127.0.0.1",
    log: Log = None,
) -> None:
    """Run Triton on a model repository until Ctrl-C or SIGTERM, which let requests in flight finish.

    Example: ditforge serve out/repo --port 8001
    """
    from ditforge import serving

    serving.serve(repository, host, port, log)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What the picture shows.")],
    url: Annotated[str, typer.Option(metavar="HOST:PORT", help="The server's gRPC port.")] = "localhost:8001",
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="A .png file; by default picture-SEED.png.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed, the same picture; by default random.")] = None,
    steps: Annotated[int | None, typer.Option(help="Sampler steps; by default the model's.")] = None,
    height: Annotated[int | None, typer.Option(help="In pixels; by default the model's.")] = None,
    width: Annotated[int | None, typer.Option(help="In pixels; by default the model's.")] = None,
    guidance: Annotated[float | None, typer.Option(help="How strictly the prompt is followed.")] = None,
    sampler: Annotated[str, typer.Option(metavar="NAME", help="euler, heun or dpmpp_2m.")] = "euler",
    count: Annotated[int, typer.Option(help="How many pictures, of the seeds SEED, SEED + 1, …")] = 1,
) -> None:
    """A picture for a prompt, from a running server.

    Example: ditforge generate "a large red circle" --seed 0 --out circle.png
    """
    from ditforge import generating

    options = {"seed": seed, "steps": steps, "height": height, "width": width, "guidance": guidance, "sampler": sampler}
    generating.generate(prompt, url, out, count, options)


@app.command()
def up(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint's folder in diffusers' layout.")],
    gpu: Gpu = "cpu",
    precision: Precision = "fp32",
    max_batch: MaxBatch = 8,
    port: Port = 8001,
    host: Host = "127.0.0.1",
    log: Log = None,
    cache: Annotated[Path | None, typer.Option(help="Where the stages' folders are kept; ~/.cache/ditforge.")] = None,
) -> None:
    """Export, build, repo and serve in one; what is there already from the last time is kept.

    Example: ditforge up models/flux-tiny
    """
    from ditforge import serving

    repository = serving.prepare(checkpoint, gpu, precision, max_batch, cache)
    serving.serve(repository, host, port, log)


@app.command()
def doctor() -> None:
    """What this machine can do, and what to install for the rest.

    Example: ditforge doctor
    """
    from ditforge import terminal
    from ditforge.doctor import findings

    terminal.table(("what", "here", "fix"), findings())


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


def main() -> None:
    """Run the command line. Exit code 0, 2 for the user's mistakes, 1 for ours, 130 after Ctrl-C, 143 after SIGTERM."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that temporary files are removed
    warnings.simplefilter("ignore")  # the libraries' remarks to their developers
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.simplefilter("default", DitforgeWarning)
    warnings.showwarning = lambda message, *args, **kwargs: print(f"warning: {message}", file=sys.stderr)
    try:
        code = app(standalone_mode=False)
        if code == 130:  # which is how typer reports Ctrl-C
            print("interrupted", file=sys.stderr)
        sys.exit(code)
    except DitforgeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except USAGE_ERROR as error:
        command = error.ctx.command_path if error.ctx else "ditforge"
        print(f"error: {usage_problem(error)}\nfix:   {command} --help", file=sys.stderr)
        sys.exit(2)
    except ModuleNotFoundError as error:
        from ditforge.doctor import extra_for

        module = (error.name or "").split(".")[0]
        extra = extra_for(module)
        if extra is None:
            raise
        print(f"error: this command needs {module}, which is not installed", file=sys.stderr)
        print(f"fix:   pip install 'ditforge[{extra}]'", file=sys.stderr)
        sys.exit(2)
