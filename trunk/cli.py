"""The command line: it runs the commands, answers mistakes in their arguments, and sets the exit code."""

from __future__ import annotations

import io
import os
import signal
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout
from typing import Annotated, NoReturn, TextIO, cast

import typer

from ditforge import __version__, interrupt, open_files, terminal, verbosity
from ditforge.commands import commands
from ditforge.errors import DitforgeError, DitforgeWarning, UserError
from ditforge.option import as_flags
from ditforge.options import Quiet, Verbose, grouped
from ditforge.plain_text import plain

app = typer.Typer(
    name="ditforge",
    help="Text-to-image diffusion transformers as engines for one GPU, served by Triton.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# The class of all mistakes in the arguments, which is a base class of BadParameter. Older versions of typer, which use
# click as a separate package, have no public name for it.
USAGE_ERROR: type[typer.BadParameter] = typer.BadParameter.__mro__[1]


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Checkpoint → export → build → repo → serve → generate."""
    verbosity.choose(verbose, quiet)
    if version:
        print(f"ditforge {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(2)


for command in commands():
    app.command()(grouped(command))


def usage_problem(error: typer.BadParameter) -> str:
    """Say what is wrong with the arguments. Typer 0.29 does not show a value that it cannot convert, so it is added."""
    causes: list[dict[str, object]] = getattr(error.__cause__, "errors", list)()
    return error.format_message() + "".join(f", got {cause['input']!r}" for cause in causes)


def flush_output() -> None:
    """Flush standard output when a command has ended. Raises UserError if it cannot be written."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        terminal.give_up_output()
        sys.exit(1)
    except UserError:
        terminal.give_up_output()
        raise


def tell(text: str) -> None:
    """Print an error or a warning, which may quote a file or a server."""
    print(plain(text), file=sys.stderr)


def main() -> None:
    """Run the command line. Exit codes: 0, 2 for a wrong input, 1 for other failures, 130 (Ctrl-C), 143 (SIGTERM)."""
    terminal.open_closed_streams()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # a normal exit removes temporary files
    interrupt.heed()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # any name can be printed, whatever the terminal's encoding
    warnings.simplefilter("ignore")  # most warnings of the libraries are meant for developers
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # ditforge's errors say what matters of gRPC's log
    warnings.simplefilter("default", DitforgeWarning)
    verbosity.divert_warnings(lambda message: tell(f"warning: {message}"))
    output, errors = cast(TextIO, terminal.Checked(sys.stdout)), cast(TextIO, terminal.Unfailing(sys.stderr))
    with redirect_stdout(output), redirect_stderr(errors):
        run()


def run() -> NoReturn:
    """Run the command, and answer its errors."""
    try:
        with as_flags():
            code = app(standalone_mode=False)
        flush_output()
        if code == interrupt.CODE:  # typer's too
            interrupt.end()
        sys.exit(code)
    except KeyboardInterrupt:  # outside of typer's own care
        interrupt.end()
    except DitforgeError as error:
        tell(
            f"error: {error.problem}\nfix:   {open_files.FIX}" if open_files.are_too_many(error) else f"error: {error}"
        )
        sys.exit(error.exit_code)
    except USAGE_ERROR as error:
        command = error.ctx.command_path if error.ctx else "ditforge"
        tell(f"error: {usage_problem(error)}\nfix:   {command} --help")
        sys.exit(2)
    except Exception as error:
        if interrupt.happened():  # which native code turns into other errors
            interrupt.end()
        if open_files.are_too_many(error):
            tell(f"error: {open_files.problem()}\nfix:   {open_files.FIX}")
            sys.exit(2)
        if not isinstance(error, ModuleNotFoundError):
            raise
        from ditforge.install_hint import lacking

        missing = lacking(error, "this command")
        if missing is None:
            raise
        tell(f"error: {missing}")
        sys.exit(2)
