"""`ditforge generate`: the client, a progress bar, and pictures on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ditforge.client import Client
from ditforge.client.picture import check_writable, read_info, save_picture
from ditforge.client.sampling import Step
from ditforge.errors import UserError


def generate(prompt: str, url: str, out: Path | None, count: int, options: dict[str, Any]) -> list[Path]:
    """Make `count` pictures and write them to `out`, numbered if there are several; prints their paths.

    Everything that can be wrong with the paths is found out before the first step.
    """
    if count < 1:
        raise UserError(f"the number of pictures must be at least 1, got {count}", "--count 1")
    check_writable(out or Path("picture.png"))
    with Client(url) as client, bar() as progress:
        task = progress.add_task(client.model.name, total=None, each="")
        last = progress.get_time()

        def show(step: Step) -> None:
            nonlocal last
            now = progress.get_time()
            each = f"{(now - last) * 1000:.0f} ms a step" if step.index else ""
            last = now
            progress.update(task, total=step.total, completed=step.index, each=each)

        images = client.generate([prompt] * count, callback=show, **options)
        progress.update(task, completed=progress.tasks[0].total)
    paths = []
    for index, image in enumerate(images):
        path = out or Path(f"picture-{read_info(image)['seed']}.png")
        if out and count > 1:
            path = out.with_stem(f"{out.stem}-{index}")
        save_picture(image, path)
        paths.append(path)
        print(path)
    return paths


def bar() -> Progress:
    """Step, time of the last step, time left."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[each]}"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(stderr=True))
