"""The folder for temporary files: whether files can be written there, and what to do where they cannot."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ditforge import write_errors
from ditforge.errors import UserError

NAMES = ("TMPDIR", "TEMP", "TMP")  # the variables that name it, in the order in which Python's tempfile reads them


def find() -> Path:
    """The folder that a variable names, or else the system's. Raises UserError if there is none.

    Python's tempfile would silently take another one where the one that is named is missing, and native code would not.
    """
    if name := naming():
        return Path(os.environ[name]).absolute()
    try:
        return Path(tempfile.gettempdir())
    except FileNotFoundError as error:
        raise UserError(f"there is no folder for temporary files: {error.strerror}", another()) from None


def check(room: int = 1) -> Path:
    """Return the folder for temporary files. Raises UserError unless `room` bytes can be written there."""
    folder = find()
    try:
        write_errors.check_room(folder, room)
    except OSError as error:
        raise unwritable(folder, error) from None
    return folder


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Yield a new folder for temporary files, which is removed when the block ends.

    Raises UserError if none can be written.
    """
    with tempfile.TemporaryDirectory(prefix="ditforge-", dir=check()) as folder:
        yield Path(folder)


@contextmanager
def filled(folder: Path) -> Iterator[None]:
    """Within this context, whatever cannot be written for want of space in a temporary folder is a UserError."""
    try:
        yield
    except Exception as error:  # native code has classes of its own for that
        if not write_errors.is_full(error):
            raise
        raise UserError(f"there is no space left for temporary files in {folder.parent}", more_room()) from error


def unwritable(folder: Path, error: OSError) -> UserError:
    """The error where no temporary file can be written in the folder."""
    named = f", which {naming()} names" if naming() else ""
    problem = f"no temporary files can be written in {folder}{named}: {write_errors.reason(error)}"
    return UserError(problem, write_errors.fix(error, another()))


def more_room() -> str:
    """The advice where the folder for temporary files is full."""
    return f"free some space, or {another()}"


def another() -> str:
    """The advice to have temporary files in another folder."""
    name = naming()
    return f"{name or NAMES[0]}=FOLDER   before the command, with one that can be written" + (
        f"; or unset {name}" if name else ""
    )


def naming() -> str | None:
    """The variable that names the folder for temporary files, if one does."""
    return next((name for name in NAMES if os.environ.get(name)), None)
