"""Locks a folder while it is written, so that the next run can recognise and remove what a killed run has left."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SUFFIX = ".partial"


@contextmanager
def partial_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder `.NAME.….partial` beside `target`, for the block to fill and to rename.

    If it has not been renamed when the block ends, it is removed. Folders of processes that were killed are removed
    first. Raises OSError if it cannot be made.
    """
    remove_abandoned(target)
    # Both names are chosen before a folder is made, so that an interrupt at any time leaves nothing behind.
    new = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
    folder = new.with_name(new.name + SUFFIX)
    lock = None
    try:
        new.mkdir(mode=0o700)
        lock = locked(new)
        new.rename(folder)  # only after the lock, because a folder with the suffix and no lock counts as abandoned
        yield folder
    finally:
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def remove_abandoned(target: Path) -> None:
    """Remove the partial folders beside `target` whose process has ended."""
    for folder in target.parent.iterdir():
        if not (folder.name.startswith(f".{target.name}.") and folder.name.endswith(SUFFIX) and folder.is_dir()):
            continue
        lock = locked(folder)
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def locked(folder: Path) -> int | None:
    """A descriptor that holds the folder's lock until it is closed or the process ends, or None if it is not available.

    The kernel releases such a lock (flock(2)) however a process ends. Some network file systems have no locks; there,
    no folder counts as abandoned.
    """
    import fcntl  # imported here, because clients also run on systems that do not have it

    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:  # its process has finished, and has removed it
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
