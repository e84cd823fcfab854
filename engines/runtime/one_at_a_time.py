"""Engines that are loaded on demand take turns, also those of other processes: each is a model of Triton's in its own.

A plan reckons with one of them in the GPU's memory at a time. With several users, or while a server starts and tries
all of its engines at once, there would be more.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

VISIBLE = "CUDA_VISIBLE_DEVICES"  # where servers have GPUs of their own, they need not wait for each other


@contextmanager
def turn() -> Iterator[None]:
    """Wait until no other process of this user is inside, for the same GPUs; flock(2) ends when a process does."""
    import fcntl

    gpus = sha256(os.environ.get(VISIBLE, "").encode()).hexdigest()[:8]
    path = Path(tempfile.gettempdir()) / f"ditforge-{os.getuid()}-{gpus}.turn"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
