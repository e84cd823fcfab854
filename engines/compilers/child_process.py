"""Compiling in a process of its own, so that all the memory a compiler took is given back, and Ctrl-C ends it at once.

`python -m ditforge.engines.compilers.child_process` is the child. It reads a call from its standard input, and writes
progress and the outcome to its standard output. It ends when its input is closed, and so when its parent dies.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, TypeVar

from ditforge.engines.compilers import Job, Progress, find_compiler
from ditforge.errors import DitforgeError
from ditforge.option import are_flags, as_flags, option

T = TypeVar("T")
NOTHING: Mapping[str, str] = MappingProxyType({})


def compile_apart(compiler_name: str, job: Job) -> list[Path]:
    """Compile a graph as the compiler's own `compile` does, with the same progress and the same errors.

    Raises DitforgeError if the process is killed, for example by the system when memory runs out.
    """
    silent = replace(job, progress=print)  # which can be pickled; the child's own progress takes its place
    return call_apart(compile_with, compiler_name, silent, name=job.name, progress=job.progress)


def compile_with(compiler_name: str, job: Job, *, progress: Progress) -> list[Path]:
    """Compile a graph with the compiler of this name."""
    return find_compiler(compiler_name).compile(replace(job, progress=progress))


def call_apart(
    function: Callable[..., T], *arguments: Any, name: str, progress: Progress, environment: Mapping[str, str] = NOTHING
) -> T:
    """Call a function of a module in a process of its own, and return what it returns.

    The function takes the arguments and `progress`. `name` is that of the network that it compiles, and `environment`
    is added to the process's. Raises what the function raises, and DitforgeError if the process is killed.
    """
    variables = {**os.environ, "PYTHONSAFEPATH": "1", **environment}  # what lies in the user's folder is not imported
    command = [sys.executable, "-m", __name__]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=variables) as child:
        try:
            assert child.stdin and child.stdout
            pickle.dump((function, arguments, are_flags()), child.stdin)
            child.stdin.flush()
            while True:
                kind, content = pickle.load(child.stdout)
                if kind == "progress":
                    progress(*content)
                elif kind == "result":
                    result: T = content
                    return result
                else:
                    raise content
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):  # the last for half a message
            code = child.wait()
            how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"gone with exit code {code}"
            problem = f"the compiler was {how} while it compiled {name}"
            fixes = {
                -signal.SIGKILL: f"{option('segments')} with a larger number, or free some memory",
                -signal.SIGSEGV: "if CXX names a C++ compiler, leave it out or CXX=/usr/bin/g++; or report it",
            }
            raise DitforgeError(problem, fixes.get(code, "report it")) from None
        finally:
            child.kill()


def serve(source: BinaryIO, sink: BinaryIO) -> None:
    """The child's work: read a call from `source`, make it, and write progress and the outcome to `sink`."""
    function, arguments, flags = pickle.load(source)
    threading.Thread(target=end_with, args=(source,), daemon=True).start()

    def tell(kind: str, content: Any) -> None:
        sink.write(pickle.dumps((kind, content)))
        sink.flush()

    try:
        with as_flags(flags):
            tell("result", function(*arguments, progress=lambda *step: tell("progress", step)))
    except (DitforgeError, OSError, ModuleNotFoundError) as error:  # all others are ours: their traceback is printed
        tell("error", error)


def end_with(source: BinaryIO) -> None:
    """End this process when `source` is closed, or cannot be read any more."""
    try:
        source.read()
    finally:
        os._exit(1)


def main() -> None:
    """Run the child. Whatever the compiler's libraries print goes to standard error, not to the parent."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    sink = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    serve(sys.stdin.buffer, sink)


if __name__ == "__main__":
    main()
