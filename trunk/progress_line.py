"""Says in words how far some work is and how long it may still take. Nothing is printed here."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Literal

# What is counted: bytes, steps that take about the same time each, or other steps, which do not allow an estimate.
Unit = Literal["bytes", "equal steps", "steps"]
WINDOW = 60.0  # seconds; the pace is that of the last minute
LEAST = 5.0  # seconds that must have passed before a pace means something
SHARE = 0.2  # the share of the bytes that must be done too, because there is other work between two networks


class Pace:
    """Measures how fast some work goes, which is counted in a `unit`."""

    def __init__(self, unit: Unit, clock: Callable[[], float] = time.monotonic) -> None:
        self.unit = unit
        self.clock = clock
        self.began = clock()
        self.doing, self.done, self.total = "", 0, 1
        self.worked = 0  # the part of `done` that was really done now, without what was there already
        self.past: deque[tuple[float, int]] = deque([(self.began, 0)])

    def note(self, doing: str, done: int, total: int) -> None:
        """Note what is being done, how much of it is done, and how much there is."""
        # Bytes that were kept from an earlier export come together with a new name, and are not counted as work.
        if doing == self.doing or self.unit != "bytes":
            self.worked += max(0, done - self.done)
        self.doing, self.done, self.total = doing, done, total
        now = self.clock()
        self.past.append((now, self.worked))
        while len(self.past) > 2 and now - self.past[1][0] > WINDOW:
            self.past.popleft()

    @property
    def passed(self) -> float:
        """The seconds since the work began."""
        return self.clock() - self.began

    @property
    def left(self) -> float | None:
        """The seconds that the rest takes at the pace of the last minute, or None if no estimate is possible yet."""
        (since, before), now = self.past[0], self.clock()
        made = self.worked - before
        rest = self.total - self.done
        if self.unit == "steps" or now - since < LEAST or made <= 0 or rest <= 0:
            return None
        if self.unit == "bytes" and self.worked < SHARE * (self.worked + rest):
            return None
        return rest * (now - since) / made

    def amount(self) -> str:
        """How much is done, and of how much, in words."""
        if self.unit != "bytes":
            return f"{self.done} of {self.total}"
        scale, unit = (1e9, "GB") if self.total >= 1e9 else (1e6, "MB")
        return f"{self.done / scale:.1f} of {self.total / scale:.1f} {unit}"

    def time(self) -> str:
        """How long it may still take, or how long it has taken if that is not known, in words."""
        left = self.left
        return duration(self.passed) if left is None else f"about {duration(left)} left"

    def line(self, title: str) -> str:
        """A line with all of this, for output on which no bar can be shown."""
        return f"[{title}] {self.doing}: {self.amount()}, {self.time()}"


def duration(seconds: float) -> str:
    """A duration in words, in seconds, minutes or hours, rounded as people would."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 10:
        return f"{minutes} min {rest} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
