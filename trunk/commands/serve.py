"""`ditforge serve`: runs a server in the foreground."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from ditforge import terminal
from ditforge.errors import DitforgeError
from ditforge.option import option
from ditforge.options import ServeFlags

if TYPE_CHECKING:
    from ditforge.triton_repo.server import Options, Server


def serve(
    repository: Annotated[Path, typer.Argument(metavar="REPO_DIR", help="What repo wrote.")], flags: ServeFlags
) -> None:
    """Run Triton on a model repository until Ctrl-C or SIGTERM. These let unfinished pictures be finished.

    Example: ditforge serve out/repo --port 8001
    """
    serve_in_foreground(repository, flags.options())


def serve_in_foreground(repository: Path, options: Options) -> None:
    """Serve `repository` until SIGINT or SIGTERM, then let unfinished pictures be finished.

    Raises DitforgeError if the server ends by itself, or if pictures were cut off. Until the server is ready, the
    signals end this like any other command.
    """
    from ditforge.triton_repo.server import how_it_ended, start

    with start(repository, terminal.tell, **options) as server:
        signal.signal(signal.SIGTERM, interrupt)
        in_time = True
        try:
            say_where(repository, server)
            code = server.wait()
        except KeyboardInterrupt:
            in_time = end(server)
        else:
            raise DitforgeError(
                f"the server {how_it_ended(code)}, and nobody had told it to stop", f"look at its log, {server.log}"
            )
    if server.unfinished:
        raise cut_off(server, in_time)
    if in_time and (code := server.wait()) != 0:
        problem = f"the server {how_it_ended(code)} while it was stopping: pictures may have been cut off"
        raise DitforgeError(problem, f"look at its log, {server.log}")
    kept = options.get("log") is None and server.log.exists()
    terminal.tell(f"stopped; the log is {server.log}" if kept else "stopped")


def say_where(repository: Path, server: Server) -> None:
    """Print where a server listens, how it is protected, and where its log is."""
    host, access = server.options.host, ["gRPC", *server.options.access]
    terminal.tell(f"serving {repository} at {server.url} ({', '.join(access)}), log {server.log}")
    if server.ports.http is not None:
        terminal.tell(f"Triton's own HTTP at {host}:{server.ports.http}")
    if server.ports.metrics is not None:
        terminal.tell(f"metrics at http://{host}:{server.ports.metrics}/metrics, in clear text")
    if not server.options.closed and not server.options.on_loopback:
        terminal.tell(f"warning: anyone who reaches {host} can use this server, or read what it is sent")


def interrupt(number: int, frame: FrameType | None) -> None:
    """Treat SIGTERM like Ctrl-C."""
    raise KeyboardInterrupt


def end(server: Server) -> bool:
    """Stop the server. Returns whether it had time to stop; False if a second signal ended it at once."""
    try:
        server.stop()
    except KeyboardInterrupt:
        return False
    finally:  # the server has ended, and the rest takes so little time that signals can be ignored
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return True


def cut_off(server: Server, in_time: bool) -> DitforgeError:
    """The error for pictures that were not finished when the server ended.

    `in_time` is false if the server was told to stop at once.
    """
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
