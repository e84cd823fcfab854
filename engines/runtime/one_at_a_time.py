"""Keeps a second engine that is loaded on demand out of the GPU's memory, across processes: Triton has one a model.

A memory plan counts one such engine at a time. Without a lock there would be more in the GPU's memory when several
users ask at once, or when a server starts and tries all of its engines.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256

from ditforge import temporary_folder

VISIBLE = "CUDA_VISIBLE_DEVICES"  # where servers have GPUs of their own, they need not wait for each other


@contextmanager
def gpu_lock() -> Iterator[None]:
    """Hold the lock of this user on the GPUs that are visible, once no other process has it; all wait for it.

    The system releases the lock of a process that ends. Raises UserError if the lock's file cannot be written.
    """
    import fcntl

    gpus = sha256(os.environ.get(VISIBLE, "").encode()).hexdigest()[:8]
    folder = temporary_folder.find()
    path = folder / f"ditforge-{os.getuid()}-{gpus}.lock"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise temporary_folder.unwritable(folder, error) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
