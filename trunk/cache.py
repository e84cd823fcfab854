"""The cache, a folder with files that ditforge can make again: what `up` made, and kernels for this machine's GPU."""

import os
from collections.abc import Iterable
from pathlib import Path


def default_cache() -> Path:
    """$XDG_CACHE_HOME/ditforge, or ~/.cache/ditforge (freedesktop.org's base directories)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ditforge"


def forget_oldest(files: Iterable[Path], most: int) -> None:
    """Remove all of the files but the `most` that were changed last. Raises OSError."""
    for path in sorted(files, key=lambda path: path.stat().st_mtime)[:-most]:
        path.unlink(missing_ok=True)
