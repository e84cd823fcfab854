"""What commands print: progress on standard error, results on standard output."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

WIDE = 200
Report = Callable[[str, int, int], None]


@contextmanager
def progress(title: str) -> Iterator[Report]:
    """A bar that is fed with (what is being done, how many are done, how many there are); shown from then on."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    bar, task = Progress(*columns, console=Console(stderr=True)), None

    def report(doing: str, done: int, total: int) -> None:
        nonlocal task
        if task is None:
            bar.start()
            task = bar.add_task(title, total=total)
        bar.update(task, description=f"{title} {doing}", completed=done, total=total)

    try:
        yield report
    finally:
        if task is not None:
            bar.stop()


def say(line: str) -> None:
    """One line of results, at once: a log file or a program that waits for it reads it as it is said."""
    print(line, flush=True)


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Rows of text under headings."""
    shown = Table(box=None, pad_edge=False)
    for heading in headings:
        shown.add_column(heading, overflow="fold")
    for row in rows:
        shown.add_row(*row)
    console = Console(soft_wrap=False)
    if not console.is_terminal:
        console.width = WIDE  # a program that reads rows wants them whole
    console.print(shown)
