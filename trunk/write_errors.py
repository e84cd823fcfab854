"""Why a file could not be written, and what to do about it."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT)


def reason(error: OSError) -> str:
    """Say why a file could not be written. For a file that is too large, name the limit if it is the process's own."""
    if error.errno == errno.EFBIG and (limit := size_limit()) is not None:
        return f"{error.strerror}: no file of this process may have more than {limit:,} bytes (ulimit -f)"
    return error.strerror or str(error)


def fix(error: OSError, otherwise: str) -> str:
    """What to do about it. `otherwise` helps in any case, such as writing elsewhere."""
    if error.errno in FULL:
        return f"free some space, or {otherwise}"
    if error.errno == errno.EFBIG and size_limit() is not None:
        return "ulimit -f unlimited   before the command"
    return otherwise


def is_full(error: BaseException | None) -> bool:
    """Whether `error` was raised for want of space, by the system or by native code, which says so in words alone."""
    while error is not None:
        if getattr(error, "errno", None) in FULL or any(os.strerror(number) in str(error) for number in FULL):
            return True
        error = error.__cause__ or error.__context__
    return False


def size_limit() -> int | None:
    """The most bytes that a file of this process may have, or None if there is no such limit."""
    import resource  # imported here, because clients also run on systems that do not have it

    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    return None if limit == resource.RLIM_INFINITY else limit


def check_room(folder: Path, size: int) -> None:
    """Raise OSError if no file of `size` bytes can be written in `folder`.

    It is for what was written by native code whose errors do not say why.
    """
    with tempfile.TemporaryFile(dir=folder) as file:
        os.posix_fallocate(file.fileno(), 0, size)
