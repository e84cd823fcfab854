"""Compiling in a process of its own, so that all the memory a compiler took is given back, and Ctrl-C ends it at once.

`python -m ditforge.engines.compilers.child_process` is the child. It reads a call from its standard input, and writes
progress, its log, its warnings and the outcome to its standard output. It ends when its input is closed, and so when
its parent dies. Whatever it starts is in its group of processes, and ends with it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from logging.handlers import QueueHandler
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, TypeVar

from ditforge.engines.compilers import Job, Progress, find_compiler
from ditforge.errors import DitforgeError, DitforgeWarning
from ditforge.option import are_flags, as_flags
from ditforge.verbosity import LOGGER, divert_warnings

T = TypeVar("T")
Tell = Callable[[str, Any], None]  # how a child tells its parent: the kind of what it tells, and that itself
NOTHING: Mapping[str, str] = MappingProxyType({})
FREE_MEMORY = "free some memory"


def compile_apart(compiler_name: str, job: Job) -> list[Path]:
    """Compile a graph as the compiler's own `compile` does, with the same progress and the same errors.

    Raises DitforgeError if the process is killed, for example by the system when memory runs out.
    """
    silent = replace(job, progress=print)  # which can be pickled; the child's own progress takes its place
    fix = f"{FREE_MEMORY}; or ditforge build ONNX_DIR --segments N --out DIR   with a larger number"
    return call_apart(compile_with, compiler_name, silent, name=job.name, progress=job.progress, if_killed=fix)


def compile_with(compiler_name: str, job: Job, *, progress: Progress) -> list[Path]:
    """Compile a graph with the compiler of this name."""
    return find_compiler(compiler_name).compile(replace(job, progress=progress))


def call_apart(
    function: Callable[..., T],
    *arguments: Any,
    name: str,
    progress: Progress,
    environment: Mapping[str, str] = NOTHING,
    if_killed: str = FREE_MEMORY,
) -> T:
    """Call a function of a module in a process of its own, and return what it returns.

    The function takes the arguments and `progress`. `name` is that of the network that it compiles, and `environment`
    is added to the process's. Raises what the function raises, and DitforgeError if the process ends before it does:
    with the fix `if_killed` where it was killed, as the system does when memory runs out.
    """
    variables = {**os.environ, "PYTHONSAFEPATH": "1", **environment}  # what lies in the user's folder is not imported
    command = [sys.executable, "-m", __name__]
    level = logging.getLogger(LOGGER).getEffectiveLevel()
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=variables, start_new_session=True
    ) as child:
        try:
            assert child.stdin and child.stdout
            pickle.dump((function, arguments, are_flags(), level), child.stdin)
            child.stdin.flush()
            while True:
                kind, content = pickle.load(child.stdout)
                if kind == "progress":
                    progress(*content)
                elif kind == "result":
                    result: T = content
                    return result
                else:
                    told(kind, content)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):  # the last for half a message
            raise ended(child.wait(), name, if_killed) from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)


def told(kind: str, content: Any) -> None:
    """Take what a child told: write its log, give its warning, or raise its error."""
    if kind == "log":
        logging.getLogger(content.name).handle(content)
    elif kind == "warning":
        warnings.warn(content, DitforgeWarning, stacklevel=2)
    else:
        raise content


def ended(code: int, name: str, if_killed: str = FREE_MEMORY) -> DitforgeError:
    """The error for a child that ended without an outcome, by its exit code, while it compiled the network `name`."""
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"gone with exit code {code}"
    fixes = {
        -signal.SIGKILL: if_killed,
        -signal.SIGSEGV: "if CXX names a C++ compiler, leave it out or CXX=/usr/bin/g++; or report it",
    }
    return DitforgeError(f"the compiler was {how} while it compiled {name}", fixes.get(code, "report it"))


def serve(source: BinaryIO, sink: BinaryIO) -> None:
    """The child's work: read a call from `source`, make it, and write progress and the outcome to `sink`."""
    function, arguments, flags, level = pickle.load(source)
    threading.Thread(target=end_with, args=(source,), daemon=True).start()

    def tell(kind: str, content: Any) -> None:
        sink.write(pickle.dumps((kind, content)))
        sink.flush()

    logging.getLogger(LOGGER).setLevel(level)
    log_to(tell)
    with as_flags(flags), errors_told(tell):
        tell("result", function(*arguments, progress=lambda *step: tell("progress", step)))


@contextlib.contextmanager
def errors_told(tell: Tell) -> Iterator[None]:
    """Tell an error that people can do something about. All others are ours: their traceback is printed."""
    try:
        yield
    except (DitforgeError, OSError, ModuleNotFoundError) as error:
        tell("error", error)


class Told(QueueHandler):
    """Tells the log to the parent."""

    def __init__(self, tell: Tell) -> None:
        super().__init__(tell)  # type: ignore[arg-type]
        self.tell = tell

    def enqueue(self, record: logging.LogRecord) -> None:
        self.tell("log", record)


def log_to(tell: Tell) -> None:
    """Tell the log and the warnings of this process, and write them nowhere else."""
    logging.getLogger(LOGGER).handlers[:] = [Told(tell)]
    divert_warnings(lambda message: tell("warning", message))


def end_with(source: BinaryIO) -> None:
    """End this process, and what it started, when `source` is closed or cannot be read any more.

    It is read without its buffer, whose lock a fork would inherit.
    """
    try:
        os.read(source.fileno(), 1)
    finally:
        os.killpg(0, signal.SIGKILL)


def main() -> None:
    """Run the child. Whatever the compiler's libraries print goes to standard error, not to the parent."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    sink = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    serve(sys.stdin.buffer, sink)


if __name__ == "__main__":
    main()
