"""Prints for the commands: progress on standard error, and results on standard output."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from ditforge import verbosity, write_errors
from ditforge.errors import UserError
from ditforge.plain_text import plain
from ditforge.progress_line import Pace, Unit

if TYPE_CHECKING:
    from rich.console import Console

SHORT = 14  # characters of a cell that is not wrapped
UNBOUNDED = 1 << 20  # columns, of a terminal so wide that no cell is wrapped
DONE = "done"
EVERY = 5.0  # seconds between two lines of progress if the output is not a terminal
SILENCE = 2.0  # seconds that something may take, without a terminal, before a line says what it is
Report = Callable[[str, int, int], None]


@contextmanager
def progress(title: str, unit: Unit = "steps", begins: str = "") -> Iterator[Report]:
    """Yield a function that shows progress when it is called with (what is being done, steps done, steps in all).

    Progress is shown as a Bar on a terminal, and as Lines elsewhere. If "done" is being done, the bar ends, so that
    another one can follow it. The line `begins` is printed before the first progress. With --quiet, nothing is shown.
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
        from rich.table import Column
        from rich.text import Text

        class Words(ProgressColumn):
            def render(self, task: Task) -> Text:
                return Text(f"{pace.amount()}, {pace.time()}")

        self.title, self.pace = title, pace
        name = TextColumn("{task.description}", markup=False)  # names come from servers, and may look like markup
        self.bar = Progress(name, BarColumn(bar_width=None), Words(Column(no_wrap=True)), console=console, expand=True)
        self.bar.start()
        self.task = self.bar.add_task(title)

    def show(self, doing: str, done: int, total: int) -> None:
        self.pace.note(doing, done, total)
        self.bar.update(self.task, description=f"{self.title} {doing}", completed=done, total=total)

    def close(self) -> None:
        self.bar.stop()


class Lines:
    """A line of progress every few seconds, and one at the end, for output that is not a terminal."""

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
    """Show what is being done while the block runs, for work that does not report its progress.

    On a terminal it is shown at once, and elsewhere if the block takes more than SILENCE seconds.
    """
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


def open_closed_streams() -> None:
    """Open os.devnull in place of standard input, output or error where it is closed, and is None in Python.

    print() would write to standard output what was meant for a standard error that is None. And the next file that is
    opened would get the stream's number, and what native code and other processes write there.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            stream = open(os.devnull, mode)  # noqa: SIM115  it gets the stream's number, which is the lowest free one
            os.set_inheritable(stream.fileno(), True)
            setattr(sys, name, stream)


def tell_aside(title: str, line: str) -> None:
    """Print a line of progress on standard error."""
    print(f"[{title}] {line}", file=sys.stderr, flush=True)


@contextmanager
def written() -> Iterator[None]:
    """Wrap writing to standard output. Raises UserError if it cannot be written.

    If it is a pipe that nobody reads any more, it raises BrokenPipeError, which ends a command without a message.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        problem = f"cannot write to standard output: {write_errors.reason(error)}"
        raise UserError(problem, write_errors.fix(error, "send the output elsewhere")) from None


def say(line: str) -> None:
    """Print one line of results, without delay, so that a program that waits for it can read it at once.

    The line is written in one piece, so that the lines of two threads are not mixed.
    """
    print(f"{plain(line)}\n", end="", flush=True)


def note(line: str) -> None:
    """Print a line about what was done, like say(). Unlike a result, it is left out with --quiet."""
    if not verbosity.is_quiet():
        say(line)


def tell(line: str) -> None:
    """Print a line like say(), for a server that goes on when nobody reads its output any more.

    After the first line that cannot be written, nothing is written, and no error is raised.
    """
    try:
        print(f"{plain(line)}\n", end="", flush=True)
    except (OSError, UserError):
        give_up_output()


def give_up_output() -> None:
    """Redirect standard output, which cannot be written, to os.devnull. Otherwise Python would fail again at exit."""
    give_up(sys.stdout)


def give_up(stream: TextIO) -> None:
    """Redirect a stream that cannot be written to os.devnull."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


class Stream:
    """A stream of text, as another one but for what happens when it cannot be written."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


class Checked(Stream):
    """Standard output, as a command has it: whoever prints, a library too, gets what written() raises."""

    def write(self, text: str) -> int:
        with written():
            return self._stream.write(text)

    def flush(self) -> None:
        with written():
            self._stream.flush()


class Unfailing(Stream):
    """Standard error, whose loss stops no work: once it cannot be written, nothing is written there."""

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            give_up(self._stream)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            give_up(self._stream)


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print rows of text under headings.

    On a terminal, long cells are wrapped, and short ones stay whole. For a program that reads them, no cell is wrapped.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text  # plain: in a string, rich would read [words] in brackets as markup

    shown = Table(box=None, pad_edge=False)
    rows = list(rows)
    for heading, *cells in zip(headings, *rows, strict=True):
        shown.add_column(heading, overflow="fold", no_wrap=max(map(len, [heading, *cells])) <= SHORT)
    for row in rows:
        shown.add_row(*(Text(plain(cell)) for cell in row))
    console = Console()
    if not console.is_terminal:
        console.width = UNBOUNDED
    console.print(shown)
