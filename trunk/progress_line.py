"""How far something is and how long it may still take, in words; nothing of that is printed here."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Literal

# What is counted: bytes; steps of which one takes as long as another; or others, that say nothing of the time.
Unit = Literal["bytes", "equal steps", "steps"]
WINDOW = 60.0  # seconds of the past from which the pace is taken
LEAST = 5.0  # seconds after which a pace means something
SHARE = 0.2  # of the bytes, too: between those of two networks there is work of other kinds


class Pace:
    """How fast the work of a `unit` goes."""

    def __init__(self, unit: Unit, clock: Callable[[], float] = time.monotonic) -> None:
        self.unit = unit
        self.clock = clock
        self.began = clock()
        self.doing, self.done, self.total = "", 0, 1
        self.worked = 0  # of what is done, without what was there already
        self.past: deque[tuple[float, int]] = deque([(self.began, 0)])

    def note(self, doing: str, done: int, total: int) -> None:
        """What is being done, how much is done, and how much there is."""
        if doing == self.doing or self.unit != "bytes":  # what was kept from an earlier export comes with the next name
            self.worked += max(0, done - self.done)
        self.doing, self.done, self.total = doing, done, total
        now = self.clock()
        self.past.append((now, self.worked))
        while len(self.past) > 2 and now - self.past[1][0] > WINDOW:
            self.past.popleft()

    @property
    def passed(self) -> float:
        """Seconds since it began."""
        return self.clock() - self.began

    @property
    def left(self) -> float | None:
        """Seconds that the rest takes at the pace of the last minute; None where nothing can be said of it yet."""
        (since, before), now = self.past[0], self.clock()
        made = self.worked - before
        rest = self.total - self.done
        if self.unit == "steps" or now - since < LEAST or made <= 0 or rest <= 0:
            return None
        if self.unit == "bytes" and self.worked < SHARE * (self.worked + rest):
            return None
        return rest * (now - since) / made

    def amount(self) -> str:
        """How much is done, of how much."""
        if self.unit != "bytes":
            return f"{self.done} of {self.total}"
        scale, unit = (1e9, "GB") if self.total >= 1e9 else (1e6, "MB")
        return f"{self.done / scale:.1f} of {self.total / scale:.1f} {unit}"

    def time(self) -> str:
        """How long it may still take, or, where that is not known, how long it has taken."""
        left = self.left
        return duration(self.passed) if left is None else f"about {duration(left)} left"

    def line(self, title: str) -> str:
        """All of it, where no bar can be shown."""
        return f"[{title}] {self.doing}: {self.amount()}, {self.time()}"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, as exactly as anybody wants to know."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 10:
        return f"{minutes} min {rest} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
