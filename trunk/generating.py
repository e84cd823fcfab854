"""`ditforge generate`: the client, a progress bar, and pictures on disk."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ditforge import terminal
from ditforge.client.client import run
from ditforge.client.connection import Connection
from ditforge.client.picture_file import check_writable, read_info, save_picture
from ditforge.client.request import make_request
from ditforge.client.sampling import Step
from ditforge.client.settings import ConnectionSettings
from ditforge.errors import UserError

MAX_COUNT = 1000  # all of them are in memory at once


def generate(
    prompt: str, settings: ConnectionSettings, out: Path | None, count: int, options: dict[str, Any]
) -> list[Path]:
    """Make `count` pictures and write them to `out`, numbered if there are several; prints their paths.

    Everything that can be wrong with the paths is found out before the first step.
    """
    if not 1 <= count <= MAX_COUNT:
        raise UserError(f"the number of pictures must be from 1 to {MAX_COUNT}, got {count}", "--count 1")
    check_writable(out or Path("picture.png"))
    with closing(Connection(settings)) as connection:
        calls = connection.begin()
        request = make_request(calls.model, [prompt] * count, **options)
        with bar() as progress:
            task = progress.add_task(calls.model.name, total=request.steps, each="")
            last = progress.get_time()

            def show(step: Step) -> None:
                nonlocal last
                now = progress.get_time()
                each = f"{(now - last) * 1000:.0f} ms a step" if step.index else ""
                last = now
                progress.update(task, completed=step.index, each=each)

            images = run(calls, request, show)
            progress.update(task, completed=request.steps)
    paths = list[Path]()
    try:
        for index, image in enumerate(images):
            path = out or Path(f"picture-{read_info(image)['seed']}.png")
            if out and count > 1:
                path = out.with_stem(f"{out.stem}-{index}")
            save_picture(image, path)
            paths.append(path)
    finally:  # once all are kept: that a line cannot be printed costs no picture
        for path in paths:
            terminal.say(str(path))
    return paths


def bar() -> Progress:
    """Step, time of the last step, time left."""
    columns = (
        TextColumn("{task.description}", markup=False),  # a model's name, as the server has it
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[each]}"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(stderr=True))
