"""`ditforge serve` and `ditforge up`: a server in the foreground, and everything before it."""

from __future__ import annotations

import os
import signal
from hashlib import sha256
from pathlib import Path
from types import FrameType

from ditforge import terminal
from ditforge.errors import DitforgeError


def serve(repository: Path, host: str, port: int, log: Path | None) -> None:
    """Run Triton on `repository` until SIGINT or SIGTERM, then let it drain. Raises DitforgeError if it dies."""
    from ditforge.triton_repo.server import start

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    try:
        with start(repository, host=host, port=port, log=log) as server:
            terminal.say(f"serving {repository} at {server.url} (gRPC), log {server.log}")
            code = server.wait()
        raise DitforgeError(f"Triton ended by itself with exit code {code}", f"look at its log, {server.log}")
    except KeyboardInterrupt:
        terminal.say("stopped")


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
) -> Path:
    """Export, build and repo into a cache folder of this checkpoint, each only where something changed.

    Precision and compiler are by default the GPU's. Raises UserError for what the GPU cannot do, before the export.
    """
    from ditforge.engines import gpus
    from ditforge.export.precision import EIGHT_BIT, parse_precision

    target = gpus.find_target(gpu)
    compiler = compiler or gpus.default_compiler(target)
    if precision is None:
        precision, reason = gpus.default_precision(target)
        if target.capabilities:
            terminal.say(f"precision {precision}: {reason}")
    activations = gpus.default_activations(target)
    if target.capabilities:
        gpus.check_compiler(compiler, target)
        gpus.check_precision("dit", precision, activations if precision in EIGHT_BIT else precision, target)

    from ditforge.engines.build import build
    from ditforge.export.onnx_export import export_checkpoint
    from ditforge.triton_repo.repository import write_repository

    key = sha256(str(checkpoint.resolve()).encode()).hexdigest()[:8]
    exported = f"{precision}-{activations}" if precision in EIGHT_BIT else precision
    folder = (cache or default_cache()) / f"{checkpoint.resolve().name}-{key}" / exported
    with terminal.progress("export") as report:
        export_checkpoint(checkpoint, folder / "onnx", parse_precision(precision, activations), progress=report)
    made, batch = folder / str(target), max_batch if target.capabilities else None
    with terminal.progress("build") as report:
        build(
            folder / "onnx",
            made / "engines",
            gpu,
            compiler,
            report,
            resolutions=resolutions,
            static=static,
            batch=batch,
        )
    say_written(made / "repo", write_repository(made / "engines", made / "repo", max_batch))
    return made / "repo"


def say_written(repository: Path, reason: str) -> None:
    """Say why a repository was written, or, where there is no reason, that it was not."""
    terminal.say(f"wrote {repository}: {reason}" if reason else f"{repository} is up to date")


def default_cache() -> Path:
    """$XDG_CACHE_HOME/ditforge, or ~/.cache/ditforge (freedesktop.org's base directories)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ditforge"
