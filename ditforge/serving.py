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


def prepare(checkpoint: Path, gpu: str, precision: str, max_batch: int, cache: Path | None) -> Path:
    """Export, build and repo into a cache folder of this checkpoint, each only where something changed."""
    from ditforge.engines.build import build
    from ditforge.engines.targets import find_target
    from ditforge.export.onnx_export import export_checkpoint
    from ditforge.triton_repo.repository import write_repository

    target = find_target(gpu)
    key = sha256(str(checkpoint.resolve()).encode()).hexdigest()[:8]
    folder = (cache or default_cache()) / f"{checkpoint.resolve().name}-{key}" / precision
    with terminal.progress("export") as report:
        export_checkpoint(checkpoint, folder / "onnx", precision, report)
    with terminal.progress("build") as report:
        build(folder / "onnx", folder / target / "engines", target, progress=report)
    write_repository(folder / target / "engines", folder / target / "repo", max_batch)
    return folder / target / "repo"


def default_cache() -> Path:
    """$XDG_CACHE_HOME/ditforge, or ~/.cache/ditforge (freedesktop.org's base directories)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ditforge"
