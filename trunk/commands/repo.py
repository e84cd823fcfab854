"""`ditforge repo`: engines become a Triton model repository."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ditforge import terminal
from ditforge.options import Force, MaxBatch, Out


def repo(
    engines: Annotated[Path, typer.Argument(metavar="ENGINE_DIR", help="What build wrote.")],
    out: Out,
    max_batch: MaxBatch = None,
    force: Force = False,
) -> None:
    """Engines to a Triton model repository. One that is there already is kept.

    Example: ditforge repo out/engines --out out/repo
    """
    from ditforge import stage_folder

    stage_folder.check_early(out, "repository")

    from ditforge.triton_repo.repository import write_repository

    say_written(out, write_repository(engines, out, max_batch, force))


def say_written(repository: Path, reason: str) -> None:
    """Print that a repository was written and why, or, if there is no reason, that it was up to date."""
    from ditforge.triton_repo.repository import NEW

    if not reason:
        terminal.note(f"{repository} is up to date")
    elif reason == NEW:
        terminal.note(f"wrote {repository}")
    else:
        terminal.note(f"wrote {repository}: {reason}; a server that runs on it has to be started again")
