"""Memory in /dev/shm of which the front gives Triton parts, and copies nothing to it."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

ALIGNMENT = 64  # bytes


class Arena:
    """So many bytes of memory, in the new file `file`; without one, the memory is this process's alone.

    Only what has been taken needs room in /dev/shm.
    """

    def __init__(self, size: int, file: Path | None = None) -> None:
        self.size, self.file = size, file
        self.descriptor = -1
        if file is not None:
            self.descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
            os.ftruncate(self.descriptor, size)
        self.memory = mmap.mmap(self.descriptor, size)
        self.used: list[tuple[int, int]] = []  # where each part that is taken begins and ends, in their order

    def take(self, size: int) -> int | None:
        """Take a part of so many bytes. Returns where it begins, or None if there is no such room."""
        size = -(-size // ALIGNMENT) * ALIGNMENT
        start, place = 0, 0
        for begin, end in self.used:
            if begin - start >= size:
                break
            start, place = end, place + 1
        if self.size - start < size:
            return None
        if self.descriptor >= 0 and size:
            try:
                os.posix_fallocate(self.descriptor, start, size)  # else, writing to a full /dev/shm ends the process
            except OSError:
                return None
        self.used.insert(place, (start, start + size))
        return start

    def free(self, start: int) -> None:
        """Give back the part that begins there."""
        place = next(number for number, (begin, _) in enumerate(self.used) if begin == start)
        del self.used[place]
