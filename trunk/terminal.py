"""What commands print: progress on standard error, results on standard output."""

from __future__ import annotations

import errno
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ditforge import verbosity
from ditforge.errors import UserError
from ditforge.progress_line import Pace, Unit

if TYPE_CHECKING:
    from rich.console import Console

WIDE = 200
DONE = "done"
EVERY = 5.0  # seconds between two lines of progress where there is no terminal
SILENCE = 2.0  # seconds that something may take there before a line says what it is
Report = Callable[[str, int, int], None]


@contextmanager
def progress(title: str, unit: Unit = "steps", begins: str = "") -> Iterator[Report]:
    """What is fed with (what is being done, how many are done, how many there are), and shows it: see Bar and Lines.

    It ends where "done" is what is being done, so that another one can follow it. The line `begins` comes before the
    first one.
    """
    if verbosity.is_quiet():
        yield lambda doing, done, total: None
        return
    from rich.console import Console

    console = Console(stderr=True)
    shown: Bar | Lines | None = None

    def report(doing: str, done: int, total: int) -> None:
        nonlocal shown, begins
        if begins:
            tell_aside(title, begins)
            begins = ""
        if shown is None:
            shown = Bar(title, Pace(unit), console) if console.is_terminal else Lines(title, Pace(unit))
        shown.show(doing, done, total)
        if doing == DONE:
            close()

    def close() -> None:
        nonlocal shown
        if shown is not None:
            shown.close()
        shown = None

    try:
        yield report
    finally:
        close()


class Bar:
    """A bar on a terminal, with how much is done and how long it may still take."""

    def __init__(self, title: str, pace: Pace, console: Console) -> None:
        from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
        from rich.text import Text

        class Words(ProgressColumn):
            def render(self, task: Task) -> Text:
                return Text(f"{pace.amount()}, {pace.time()}")

        self.title, self.pace = title, pace
        name = TextColumn("{task.description}", markup=False)  # a prompt, or a model's name as a server has it
        self.bar = Progress(name, BarColumn(), Words(), console=console)
        self.bar.start()
        self.task = self.bar.add_task(title)

    def show(self, doing: str, done: int, total: int) -> None:
        self.pace.note(doing, done, total)
        self.bar.update(self.task, description=f"{self.title} {doing}", completed=done, total=total)

    def close(self) -> None:
        self.bar.stop()


class Lines:
    """A line every few seconds where there is no terminal, and one in the end."""

    def __init__(self, title: str, pace: Pace) -> None:
        self.title, self.pace = title, pace
        self.last = time.monotonic()

    def show(self, doing: str, done: int, total: int) -> None:
        self.pace.note(doing, done, total)
        if time.monotonic() - self.last >= EVERY and doing != DONE:
            self.last = time.monotonic()
            self.close()

    def close(self) -> None:
        print(self.pace.line(self.title), file=sys.stderr, flush=True)


@contextmanager
def waiting(title: str, what: str) -> Iterator[None]:
    """While something is done that does not tell how far it is: what it is, on a terminal, or where it takes long."""
    if verbosity.is_quiet():
        yield
        return
    from rich.console import Console

    console = Console(stderr=True)
    if console.is_terminal:
        with console.status(f"{title} {what}"):
            yield
        return
    timer = threading.Timer(SILENCE, tell_aside, (title, what))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def tell_aside(title: str, line: str) -> None:
    """A line of progress, on standard error."""
    print(f"[{title}] {line}", file=sys.stderr, flush=True)


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


def note(line: str) -> None:
    """say(), of what was done rather than asked for: --quiet leaves it out."""
    if not verbosity.is_quiet():
        say(line)


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
