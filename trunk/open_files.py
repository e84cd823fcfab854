"""Errors whose cause is that the process has as many open files, sockets and pipes as it may have."""

from __future__ import annotations

import os
from errno import EMFILE, ENFILE

FIX = "ulimit -n 1024   before the command, or more"


def are_too_many(error: BaseException | None) -> bool:
    """Whether that is why `error` was raised, by the system or by native code, which says so in words alone."""
    while error is not None:
        if getattr(error, "errno", None) in (EMFILE, ENFILE) or os.strerror(EMFILE) in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def problem() -> str:
    """Say what the limit is."""
    import resource  # imported here, because clients also run on systems that do not have it

    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return f"too many open files: this process may have {most} files, sockets and pipes at a time (ulimit -n)"
