"""The process that serves: it runs the front and Triton, and starts Triton again when one of its processes dies.

    python -m ditforge.triton_repo.service OPTIONS FLAGS

is how `ditforge.triton_repo.server` runs it. OPTIONS is the JSON of ServeOptions, and FLAGS is true if errors write
options as the command line does. Events are written to standard
output, one JSON object per line. The line `stop SECONDS` on standard input ends the process after unfinished pictures
got that many seconds. The end of standard input ends it at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import logging
import os
import resource
import signal
import sys
import tempfile
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

from ditforge import open_files
from ditforge.contract import DIT
from ditforge.errors import DitforgeError, UserError
from ditforge.option import as_flags, option
from ditforge.triton_repo import tritonserver
from ditforge.triton_repo.front import Front
from ditforge.triton_repo.kept import KeptInputs
from ditforge.triton_repo.lent import LentTensors
from ditforge.triton_repo.listener import LEAST_CONNECTIONS, RESERVED, Listener, Report, token_of
from ditforge.triton_repo.local_tensors import LocalTensors
from ditforge.triton_repo.log import set_up
from ditforge.triton_repo.metrics import ENGINES, Metrics
from ditforge.triton_repo.serve_options import ServeOptions
from ditforge.triton_repo.served import read_models
from ditforge.triton_repo.tritonserver import Triton

T = TypeVar("T")
M_MMAP_THRESHOLD, LARGE = -3, 1 << 20
BACKOFF = (0.0, 0.5, 1.0, 2.0, 4.0)  # seconds before each restart in a row
DOUBT = 2.0  # seconds after which a process that Triton complains about counts as hanging, if it has not died
STABLE = 30.0  # seconds of service after which the count of deaths in a row starts again
log = logging.getLogger(__name__)


class Stop(Exception):
    """The service must end, after unfinished pictures got `grace` seconds."""

    def __init__(self, grace: float) -> None:
        super().__init__(grace)
        self.grace = grace


async def serve(options: ServeOptions, report: Report, stopped: asyncio.Future[float]) -> None:
    """Serve until `stopped` has a result. Raises DitforgeError if serving is impossible, or if Triton dies repeatedly.

    The reported events are `listening` (with `port` and `metrics_port`), `ready`, `died`, `draining`, and `stopped`.
    The last one has `unfinished`, the number of pictures that were cut off, and `cause`, the reason if they could not
    be finished.
    """
    models, engines = read_models(options.repo)
    metrics = Metrics(models)
    tritonserver.sweep()
    prefix = f"{tritonserver.namespace()}{os.getpid()}-"
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=tritonserver.SHM))
    places = (folder.with_name(folder.name + end) if DIT in models else None for end in tritonserver.SHARED)
    forgone = folder / tritonserver.FORGONE
    shared = (make(place) for make, place in zip((KeptInputs, LentTensors, LocalTensors), places, strict=True))
    front = Front(models, engines, token_of(options), metrics, forgone, *shared)
    listener = Listener(front, options)
    try:
        port = await listener.start()
        served = None
        if options.metrics_port is not None:
            try:
                served = metrics.serve(options.host, options.metrics_port, folder / "metrics", front.pictures.active)
            except OSError as error:
                raise UserError(
                    f"cannot listen on {options.host}, port {options.metrics_port} (metrics): {error.strerror}",
                    f"{option('metrics_port=0')} takes a free one",
                ) from None
        report("listening", port=port, metrics_port=served)
        await first_of(keep_running(options, folder, front, report, stopped), listener.keep(report))
    finally:
        await listener.stop()
        tritonserver.remove(folder)


async def keep_running(
    options: ServeOptions,
    folder: Path,
    front: Front,
    report: Report,
    stopped: asyncio.Future[float],
) -> None:
    """Run Triton behind the front until `stopped` has a result. Start it again whenever one of its processes dies."""
    deaths, loop, been_ready = 0, asyncio.get_running_loop(), False
    while True:
        triton = Triton(options, folder)
        try:
            channel = await unless(stopped, triton.start())
            for arena in (front.kept.arena, front.lent.arena):
                await arena.share(channel, triton.own_key)
            front.channel = channel
            front.metrics.ready.set(1)
            since, been_ready = loop.time(), True
            report("ready")
            ends = triton.died(), triton.fell_silent(), hangs(front), keep_engines(triton, front, report)
            process, end = await unless(stopped, first_of(*ends))
            deaths = 0 if loop.time() - since >= STABLE else deaths
            problem = DitforgeError(in_words(process, end, front), f"look at the log, {options.log}")
        except Stop as stop:
            report("draining", message=stopping(front.pictures.unfinished(), stop.grace))
            cause = "" if front.channel else "the models were being started"
            try:
                if front.channel:  # if Triton loses a model, it never finishes them, so its end is awaited too
                    cause = await first_of(drained(front, stop.grace), end_of(triton, front))
            finally:  # also where it is to end at once, and this is cancelled
                report("stopped", unfinished=front.pictures.unfinished(), cause=cause)
            await triton.stop()
            return
        except DitforgeError as error:
            if not been_ready:
                raise  # it never became ready, so starting it again would fail in the same way
            process, problem = "tritonserver", error
        except OSError as error:  # a temporary lack of file descriptors, processes or memory
            if not been_ready:
                raise
            process = "tritonserver"
            problem = DitforgeError(f"tritonserver was lost: {error.strerror}", f"look at the log, {options.log}")
        finally:
            front.channel = None
            front.metrics.ready.set(0)
            await triton.kill()
        deaths += 1
        front.metrics.restarts.labels(process).inc()
        if deaths > len(BACKOFF):
            raise DitforgeError(
                f"{problem.problem}; that was the {deaths}th death in a row, and it is not started again", problem.fix
            )
        wait = BACKOFF[deaths - 1]
        report(
            "died", message=f"{problem.problem.splitlines()[0]}; starting again" + (f" in {wait:g} s" if wait else "")
        )
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.shield(stopped), wait)


async def keep_engines(triton: Triton, front: Front, report: Report) -> tuple[str, str]:
    """Report and count each death of the engine process, which the models start again. Never returns."""
    while True:
        how = await triton.engines_died()
        front.metrics.restarts.labels(ENGINES).inc()
        report("engines died", message=f"the engine process {how}; it was started again")


def in_words(process: str, end: str, front: Front) -> str:
    """Say as text which process ended, and how."""
    return f"the process of the model {process} {end}" if process in front.models else f"{process} {end}"


async def end_of(triton: Triton, front: Front) -> str:
    """Wait until one of Triton's processes dies. Return as text which one, and how."""
    return in_words(*await triton.died(), front)


async def drained(front: Front, grace: float) -> str:
    """Wait until unfinished pictures are finished, or for `grace` seconds."""
    await front.drain(grace)
    return ""


async def hangs(front: Front) -> tuple[str, str]:
    """Wait until Triton complains about a model's process that is still alive after DOUBT seconds.

    Such a process hangs: it was suspended, or it waits forever. Returns the model, and what is wrong with it.
    """
    while not front.doubted.empty():  # complaints of the Triton before this one
        front.doubted.get_nowait()
    model = await front.doubted.get()
    await asyncio.sleep(DOUBT)
    return model, "does not answer any more"


def stopping(pictures: int, grace: float) -> str:
    """Return the message for people when the server is about to end; empty if it ends at once."""
    if not pictures:
        return ""
    what = "1 unfinished picture gets" if pictures == 1 else f"{pictures} unfinished pictures get"
    return f"stopping: {what} up to {grace:g} s; Ctrl-C again stops at once"


async def first_of(*waiting: Coroutine[Any, Any, T]) -> T:
    """Return the result of the first coroutine that ends, and cancel the others."""
    tasks = [asyncio.ensure_future(one) for one in waiting]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        results = [task.result() for task in done]  # raises the error of any of them
        return results[0]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def unless(stopped: asyncio.Future[float], waiting: Coroutine[Any, Any, T]) -> T:
    """Return the result of `waiting`. If `stopped` has a result first, cancel `waiting` and raise Stop."""
    task = asyncio.ensure_future(waiting)
    try:
        both: list[asyncio.Future[Any]] = [task, stopped]
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if stopped.done():
            raise Stop(stopped.result())
        return task.result()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def main() -> None:
    """Run the service with the options in the first argument. Report events, and obey standard input."""
    options = ServeOptions.model_validate_json(sys.argv[1])
    set_up()
    give_back_large_messages()

    def report(event: str, **details: object) -> None:
        if message := details.get("message"):
            log.warning("%s", message)
        with contextlib.suppress(OSError):
            print(json.dumps({"event": event, **details}), flush=True)

    try:
        with as_flags(json.loads(sys.argv[2])):
            allow_open_files()
            asyncio.run(obey(options, report))
    except DitforgeError as error:
        report("failed", problem=error.problem, fix=error.fix, user=isinstance(error, UserError))
        sys.exit(1)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        report("failed", problem=f"{error.strerror or error}{where}", fix=f"look at the log, {options.log}", user=False)
        raise


def allow_open_files() -> None:
    """Let this process have as many open files as the system allows: each client takes one.

    Raises UserError if they do not suffice for Triton, which would fail in one of many ways.
    """
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard < RESERVED + LEAST_CONNECTIONS:
        problem = f"a server needs {RESERVED + LEAST_CONNECTIONS} open files, and may have {hard} here (ulimit -Hn)"
        raise UserError(problem, open_files.FIX)


def give_back_large_messages() -> None:
    """Make glibc return the memory of each message of at least LARGE bytes to the system when it is freed.

    By default glibc raises this size to that of the largest block that was ever freed, and keeps such memory in heaps
    that become fragmented (mallopt(3)).
    """
    with contextlib.suppress(AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE)


async def obey(options: ServeOptions, report: Report) -> None:
    """Serve until standard input says `stop SECONDS` or ends, or until SIGTERM arrives."""
    loop = asyncio.get_running_loop()
    stopped: asyncio.Future[float] = loop.create_future()

    def stop(grace: float) -> None:
        if not stopped.done():
            stopped.set_result(grace)

    loop.add_signal_handler(signal.SIGTERM, stop, options.grace)
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)

    async def listen_to_owner() -> None:
        while line := await reader.readline():
            stop(float(line.split()[1]))

    # What cancels it in the middle of a drain is the end of the input: the owner has died, or waits no longer.
    await first_of(serve(options, report, stopped), listen_to_owner())


if __name__ == "__main__":
    main()
