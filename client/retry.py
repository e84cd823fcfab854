"""Which failures of a call are worth another try, why in plain words, and how long to wait before it.

Each call of a model stands for itself: the server keeps nothing between two of them, so any can be repeated anywhere.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

FIRST_WAIT = 0.1  # seconds
LONGEST_WAIT = 5.0
ENDING_WAIT = 3.0  # for another server behind the address of one that ends, as in a rolling restart

WENT_AWAY, STOPPING, RESTARTING = "went away", "was stopping", "was restarting"
BUSY, SILENT = "was busy", "did not answer in time"
NOT_READY = "not ready"

# What is too large is so the next time as well, though gRPC gives it the status of a server that is busy. As gRPC's
# core, and its Go and Java put it: "CLIENT: Received message larger than max (5 vs. 4)", "SERVER: Sent message larger
# than max (…)", "Decompressed message larger than max", "received metadata size exceeds hard limit (value length 5 vs.
# 4)", "… soft limit", "to-be-sent initial metadata size exceeds peer limit", "header list size to send violates the
# maximum size", "gRPC message exceeds maximum size 4: 5".
TOO_LARGE = ("larger than max", "metadata size exceeds", "header list size", "exceeds maximum size")
# What the client itself brought about, or what is no better the next time: a closed channel, or TLS.
FINAL = ("channel closed", "locally cancelled", "ssl_error", "handshake", "verification check")
# Of ditforge's own server: it lets unfinished pictures be finished, and then ends.
ENDING_MESSAGES = ("begins no more pictures",)
BUSY_MESSAGES = ("maximum queue size", "queue is full", "timeout expired")  # Triton's, of a model's queue
LOADING_MESSAGES = ("restart", "starting", "loading", NOT_READY)
GATEWAY = tuple(f"http2 header with status: {code}" for code in (502, 503, 504))  # as gRPC puts what proxies answer


@dataclass(frozen=True)
class Failure:
    """How a call failed: gRPC's status, e.g. UNAVAILABLE, and the message that came with it.

    Source: https://github.com/grpc/grpc/blob/master/doc/statuscodes.md; Triton's messages as its server gives them.
    """

    status: str
    message: str

    @property
    def reason(self) -> str | None:
        """What became of the server, as the end of a sentence, where another try may do better; else None."""
        said = self.message.lower()
        if self.too_large or any(mark in said for mark in FINAL):
            return None
        if "no available versions" in said:  # of a model that was there: Triton unloads them when it stops
            return STOPPING
        if self.status == "UNAVAILABLE":
            if any(mark in said for mark in BUSY_MESSAGES):
                return BUSY
            if any(mark in said for mark in LOADING_MESSAGES):
                return RESTARTING
            return STOPPING if "stopping" in said or "shutting down" in said else WENT_AWAY
        if self.status == "INTERNAL" and "stub process" in said:  # which runs a model of Triton's Python backend
            return RESTARTING
        if self.status == "CANCELLED" or "rst_stream" in said or "stream removed" in said:
            return WENT_AWAY
        return {"RESOURCE_EXHAUSTED": BUSY, "DEADLINE_EXCEEDED": SILENT}.get(self.status)

    @property
    def too_large(self) -> bool:
        """Whether a message, or the metadata beside it, is larger than one side takes."""
        return any(mark in self.message.lower() for mark in TOO_LARGE)

    @property
    def ending(self) -> bool:
        """Whether the server says that it ends: another one may take its place, but it will not change its mind."""
        return any(mark in self.message.lower() for mark in ENDING_MESSAGES)

    @property
    def shown(self) -> str:
        """The message, without what gRPC says before it of all addresses of a name."""
        return self.message.rpartition("; last error: ")[2]

    @property
    def passing(self) -> bool:
        """Whether a server, or a proxy before it, is there and says that it cannot yet: worth waiting for at first."""
        gateway = any(mark in self.message for mark in GATEWAY)
        return gateway or self.reason in (STOPPING, RESTARTING, BUSY)


class Retries:
    """How long one call is repeated: for `timeout` seconds after its first failure, and not beyond `deadline`.

    Between tries it waits: up to 0.1 s, 0.2 s, … 5 s, each time somewhere between nothing and that, so that clients
    which failed together do not come back together ("full jitter", Brooker 2015, Exponential Backoff And Jitter, AWS).
    Times are those of time.monotonic.
    """

    def __init__(self, timeout: float, deadline: float, uniform: Callable[[float, float], float] = random.uniform):
        self.first: float | None = None  # when it first failed
        self.tries = 0
        self._timeout, self._deadline, self._uniform = timeout, deadline, uniform
        self._limit = FIRST_WAIT

    def failed(self, now: float) -> None:
        """A try failed at `now`."""
        self.tries += 1
        self.first = now if self.first is None else self.first

    def wait(self, now: float) -> float | None:
        """Seconds to wait at `now` before the next try; None: there is none any more."""
        end = min((now if self.first is None else self.first) + self._timeout, self._deadline)
        if now >= end:
            return None
        wait = self._uniform(0, self._limit)
        self._limit = min(2 * self._limit, LONGEST_WAIT)
        return min(wait, end - now)
