"""`ditforge serve` and `ditforge up`: a server in the foreground, and everything before it."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from ditforge import folders, terminal
from ditforge.cache import default_cache
from ditforge.errors import DitforgeError
from ditforge.option import option

if TYPE_CHECKING:
    from ditforge.triton_repo.server import Options, Server

LONGEST_NAME = 80  # of a folder in the cache, before the digest


def serve(repository: Path, options: Options) -> None:
    """Serve `repository` until SIGINT or SIGTERM, then let unfinished pictures be finished.

    Raises DitforgeError where the server ends by itself, and where pictures were cut off. Until the server is ready,
    the signals end this like any other command.
    """
    from ditforge.triton_repo.server import start

    with start(repository, terminal.tell, **options) as server:
        signal.signal(signal.SIGTERM, interrupt)
        in_time = True
        try:
            say_where(repository, server)
            code = server.wait()
        except KeyboardInterrupt:
            in_time = end(server)
        else:
            raise DitforgeError(f"the server ended by itself with exit code {code}", f"look at its log, {server.log}")
    if server.unfinished:
        raise cut_off(server, in_time)
    if in_time and (code := server.wait()) != 0:
        problem = f"the server ended with exit code {code} while it was stopping: pictures may have been cut off"
        raise DitforgeError(problem, f"look at its log, {server.log}")
    kept = options.get("log") is None and server.log.exists()
    terminal.tell(f"stopped; the log is {server.log}" if kept else "stopped")


def check(options: Options) -> None:
    """Raise UserError for options of `serve` that cannot be, before anything is made for it."""
    from ditforge.triton_repo.serve_options import make_options

    make_options(Path(), dict(options))


def say_where(repository: Path, server: Server) -> None:
    """Say where a server listens, who can listen too, and where its log is."""
    host, access = server.options.host, ["gRPC", *server.options.access]
    terminal.tell(f"serving {repository} at {server.url} ({', '.join(access)}), log {server.log}")
    if server.ports.http is not None:
        terminal.tell(f"Triton's own HTTP at {host}:{server.ports.http}")
    if server.ports.metrics is not None:
        terminal.tell(f"metrics at http://{host}:{server.ports.metrics}/metrics, in clear text")
    if not server.options.closed and not server.options.on_loopback:
        terminal.tell(f"warning: anyone who reaches {host} can use this server, or read what it is sent")


def interrupt(number: int, frame: FrameType | None) -> None:
    """SIGTERM is as Ctrl-C."""
    raise KeyboardInterrupt


def end(server: Server) -> bool:
    """Stop the server. Returns whether it had its time: another signal ends it at once."""
    try:
        server.stop()
    except KeyboardInterrupt:
        return False
    finally:  # it has ended, and what remains to be done takes no time
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return True


def cut_off(server: Server, in_time: bool) -> DitforgeError:
    """Pictures were not finished when the server ended: within its time, or because it was told to end at once."""
    count, grace = server.unfinished, server.options.grace
    pictures = "1 picture was" if count == 1 else f"{count} pictures were"
    elsewhere = "the client goes on at another server, where it has one"
    if not in_time:
        return DitforgeError(f"{pictures} not finished: the server was told to stop at once", f"wait; {elsewhere}")
    if server.cause:
        problem = f"{pictures} not finished: {server.cause}, while the server was stopping (log: {server.log})"
        return DitforgeError(problem, elsewhere)
    longer = option(f"grace={max(60, 2 * grace):g}")
    problem = f"{pictures} not finished within --grace {grace:g} seconds, and cut off (log: {server.log})"
    return DitforgeError(problem, f"{longer}; {elsewhere}")


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
    calibration, fp8 is. Raises UserError for what the GPU cannot do, before the export.
    """
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
        gpus.check_precision("dit", precision, activations if precision in EIGHT_BIT else precision, target)

    from ditforge.engines.build import build
    from ditforge.export.onnx_export import export_checkpoint
    from ditforge.planning import say_plan
    from ditforge.triton_repo.repository import write_repository

    exported = f"{precision}-{activations}" if precision in EIGHT_BIT else precision
    exported += "" if text_encoders == "all" else f"-{text_encoders}"
    exported += f"-t5-{t5_precision}" if t5_precision else ""
    exported += f"-{calibration.stem}-{digest(calibration.resolve())}" if calibration else ""
    folder = (cache or default_cache()) / folder_name(checkpoint, base, loras, random) / exported
    asked = with_t5(parse_precision(precision, activations), t5_precision)
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


def say_written(repository: Path, reason: str) -> None:
    """Say why a repository was written, or, where there is no reason, that it was not."""
    terminal.say(f"wrote {repository}: {reason}" if reason else f"{repository} is up to date")
