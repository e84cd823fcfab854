"""The cache, a folder with files that ditforge can make again: what `up` made, and kernels for this machine's GPU."""

import os
from pathlib import Path


def default_cache() -> Path:
    """$XDG_CACHE_HOME/ditforge, or ~/.cache/ditforge (freedesktop.org's base directories)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ditforge"
