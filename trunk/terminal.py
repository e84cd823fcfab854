"""What commands print: progress on standard error, results on standard output."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from ditforge.errors import UserError

if TYPE_CHECKING:
    from rich.progress import ProgressColumn

WIDE = 200
DONE = "done"
Report = Callable[[str, int, int], None]
Unit = Literal["steps", "bytes"]


@contextmanager
def progress(title: str, unit: Unit = "steps", begins: str = "") -> Iterator[Report]:
    """A bar that is fed with (what is being done, how many are done, how many there are), shown from then on.

    It is closed where "done" is what is being done, so that another one can follow it. What is no terminal gets a line
    when the bar is closed. The line `begins` comes before the first bar.
    """
    from rich.console import Console
    from rich.progress import Progress, TaskID

    bar: Progress | None = None
    task = TaskID(0)
    begun = False

    def report(doing: str, done: int, total: int) -> None:
        nonlocal bar, task, begun
        if bar is None:
            console = Console(stderr=True)
            if begins and not begun:
                print(begins, file=sys.stderr, flush=True)
            begun = True
            bar = Progress(*columns(unit), console=console)
            bar.start()
            task = bar.add_task(title, total=total)
        bar.update(task, description=f"{title} {doing}", completed=done, total=total)
        if doing == DONE:
            close()

    def close() -> None:
        nonlocal bar
        if bar is not None:
            bar.stop()
        bar = None

    try:
        yield report
    finally:
        close()


def columns(unit: Unit) -> tuple[ProgressColumn, ...]:
    """What a bar shows: bytes with their speed and the time left, steps with the time that has passed."""
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    named = TextColumn("{task.description}"), BarColumn()
    if unit == "steps":
        return *named, MofNCompleteColumn(), TimeElapsedColumn()
    return *named, DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(elapsed_when_finished=True)


@contextmanager
def written() -> Iterator[None]:
    """While results are printed. Raises UserError where standard output cannot be written; a pipe that nobody reads
    any more is BrokenPipeError, which ends a command without words.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        problem = f"cannot write to standard output: {error.strerror}"
        full = "free some space, or " if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise UserError(problem, f"{full}send the output elsewhere") from None


def say(line: str) -> None:
    """One line of results, at once: a log file or a program that waits for it reads it as it is said.

    It is one write, so that lines of two threads do not run into each other. Raises as written() does.
    """
    with written():
        print(f"{line}\n", end="", flush=True)


def tell(line: str) -> None:
    """say(), of a service that outlives its readers: from the first line that cannot be written, nothing is."""
    try:
        print(f"{line}\n", end="", flush=True)
    except OSError:
        give_up_output()


def give_up_output() -> None:
    """Have standard output lead nowhere, where it cannot be written: Python would fail once more as it ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Rows of text under headings."""
    from rich.console import Console
    from rich.table import Table

    shown = Table(box=None, pad_edge=False)
    for heading in headings:
        shown.add_column(heading, overflow="fold")
    for row in rows:
        shown.add_row(*row)
    console = Console(soft_wrap=False)
    if not console.is_terminal:
        console.width = WIDE  # a program that reads rows wants them whole
    with written():
        console.print(shown)
