"""Where a path leads in the end, with errors for what has no such place."""

from __future__ import annotations

import os
from pathlib import Path
from shlex import quote

from ditforge.errors import UserError


def current_folder() -> Path:
    """The current folder. Raises UserError if it has been removed."""
    try:
        return Path.cwd()
    except FileNotFoundError:
        raise UserError("the current folder has been removed", "cd to a folder that exists") from None


def real_path(path: Path) -> Path:
    """The absolute path to which all symbolic links lead; it need not exist.

    Raises UserError if a link leads to itself, or if the path is relative and the current folder has been removed.
    """
    found = Path(os.path.realpath(path if path.is_absolute() else current_folder() / path))
    for part in (found, *found.parents):
        if part.is_symlink():
            raise UserError(f"{part} is a symbolic link that leads to itself", f"rm {quote(str(part))}")
    return found
