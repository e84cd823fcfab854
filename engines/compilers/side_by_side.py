"""Where Inductor's compilation is scheduled: tasks of several networks side by side, each in a process of its own.

The process that calls `run` has imported the compiler, and each task is done by a fork of it, so that the imports take
their time and their memory once. It must not have used the GPU, whose driver does not work after a fork, nor have
computed with several threads, which a fork would wait for.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import pickle
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from typing import Any, Protocol

from ditforge.engines.compilers import Progress
from ditforge.engines.compilers.child_process import ended, errors_told, log_to, told
from ditforge.machine_memory import read_memory
from ditforge.machine_processors import count_processors

MEMORY = 2 * 2**30  # bytes that a task may take, with the C++ compiler that it starts
FORK = multiprocessing.get_context("fork")


class Add(Protocol):
    """How a task adds tasks. No more than `most` tasks are begun at a time from now on, if that is not None."""

    def __call__(self, tasks: Sequence[Task], most: int | None) -> None: ...


@dataclass(frozen=True)
class Task:
    """A call of `function` with `arguments`, and with `add`, by which it can add tasks.

    name: the network that it is for. doing: what it does, for people.
    size: the bytes that it works on. Of the tasks that wait, the largest is begun first, so that none is left alone at
        the end (Graham 1969, "Bounds on multiprocessing timing anomalies").
    makes: what it makes, if another task may make the same. Such tasks are done one after the other, so that all but
        the first find it made.
    """

    name: str
    doing: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    size: int
    makes: str = ""


def how_many() -> int:
    """How many tasks are done at a time: as many as there are processors for, and memory."""
    limits = [round(count_processors())]
    if memory := read_memory():
        limits.append(memory.available // MEMORY)
    return max(1, min(limits))


def run(tasks: Sequence[Task], at_once: int, progress: Progress) -> list[Any]:
    """Do `tasks` and those that they add, `at_once` at a time. Returns what `tasks` return, in their order.

    If a task fails, the others are ended. Raises what it raises, and DitforgeError if its process is killed.
    """
    waiting = list(enumerate(tasks))
    running: dict[Connection, tuple[int, Task, ForkProcess]] = {}
    results: dict[int, Any] = {}
    known = len(waiting)
    gc.freeze()  # what is there already is not looked at again in forks, which would copy it
    try:
        while waiting or running:
            while len(running) < at_once:
                making = {task.makes for _, task, _ in running.values() if task.makes}
                free = [numbered for numbered in waiting if numbered[1].makes not in making]
                if not free:
                    break
                number, task = largest = max(free, key=lambda numbered: numbered[1].size)
                waiting.remove(largest)
                connection, process = begin(task)
                running[connection] = number, task, process
                progress(task.doing, len(results), known)
            ready = wait([*running])
            for connection in [one for one in running if one in ready]:
                number, task, process = running[connection]
                kind, content = receive(connection, task, process)
                if kind == "tasks":
                    added, most = content
                    waiting += enumerate(added, known)
                    known += len(added)
                    at_once = at_once if most is None else max(1, min(at_once, most))
                elif kind == "result":
                    results[number] = content
                    process.join()
                    del running[connection]
                    connection.close()
                    progress(task.doing, len(results), known)
                else:
                    told(kind, content)
    finally:
        for _, _, process in running.values():
            process.kill()
        for _, _, process in running.values():
            process.join()
        gc.unfreeze()
    return [results[number] for number in range(len(tasks))]


def begin(task: Task) -> tuple[Connection, ForkProcess]:
    """Fork a process that does a task, and return the connection on which it tells."""
    ours, theirs = FORK.Pipe(duplex=False)
    process = FORK.Process(target=work, args=(task, theirs), daemon=False)
    with theirs:  # the end of the process is the end of the connection, if nobody else has it open
        process.start()
    return ours, process


def receive(connection: Connection, task: Task, process: ForkProcess) -> tuple[str, Any]:
    """What a task's process tells next. Raises DitforgeError if it has ended without a result."""
    try:
        kind, content = connection.recv()
    except (EOFError, OSError, pickle.UnpicklingError):  # the latter two for half a message
        process.join()
        assert process.exitcode is not None
        raise ended(process.exitcode, task.name) from None
    return kind, content


def work(task: Task, connection: Connection) -> None:
    """Do a task in the process that was forked for it, and tell its outcome."""
    threading.Thread(target=end_with_parent, daemon=True).start()

    def tell(kind: str, content: Any) -> None:
        connection.send((kind, content))

    log_to(tell)
    with errors_told(tell):
        tell("result", task.function(*task.arguments, add=lambda tasks, most: tell("tasks", (tasks, most))))


def end_with_parent() -> None:
    """End this process when the one that forked it ends, however that is."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    with contextlib.suppress(OSError):
        parent.join()
    os._exit(1)
