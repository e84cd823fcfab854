"""Whoever computes on a device has it alone, and those who wait get it in the order in which they came."""

from __future__ import annotations

import threading
from collections import deque
from types import TracebackType


class Turns:
    """A lock for threads, as a context manager. Python's own locks let anyone of those who wait go first."""

    def __init__(self) -> None:
        self.mutex = threading.Lock()
        self.taken = False
        self.waiting: deque[threading.Lock] = deque()

    def __enter__(self) -> None:
        with self.mutex:
            if not self.taken:
                self.taken = True
                return
            mine = threading.Lock()
            mine.acquire()
            self.waiting.append(mine)
        mine.acquire()  # once more: until the one before hands over

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self.mutex:
            if self.waiting:
                self.waiting.popleft().release()
            else:
                self.taken = False
