"""Decides which failed calls are worth another try, says why they failed, and how long to wait before the next try.

A server keeps no state between two calls of a model, so every call can be repeated at any server.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

FIRST_WAIT = 0.1  # seconds
LONGEST_WAIT = 5.0
ENDING_WAIT = 3.0  # how long to wait for a new server at the address of one that shuts down, as in a rolling restart

WENT_AWAY, STOPPING, RESTARTING = "went away", "was stopping", "was restarting"
BUSY, SILENT = "was busy", "did not answer in time"
NOT_READY = "not ready"

# A message that is too large is too large the next time as well, though gRPC gives it the status of a busy server. The
# texts of gRPC's core, Go and Java are: "CLIENT: Received message larger than max (5 vs. 4)", "SERVER: Sent message
# larger than max (…)", "Decompressed message larger than max", "received metadata size exceeds hard limit (value length
# 5 vs. 4)", "… soft limit", "to-be-sent initial metadata size exceeds peer limit", "header list size to send violates
# the maximum size", "gRPC message exceeds maximum size 4: 5".
TOO_LARGE = ("larger than max", "metadata size exceeds", "header list size", "exceeds maximum size")
# Failures that the client itself has caused, or that another try does not help: a closed channel, or TLS.
FINAL = ("channel closed", "locally cancelled", "ssl_error", "handshake", "verification check")
# The message of ditforge's own server while it shuts down: it still finishes the pictures that it has begun.
ENDING_MESSAGES = ("begins no more pictures",)
BUSY_MESSAGES = ("maximum queue size", "queue is full", "timeout expired")  # Triton's messages about a model's queue
LOADING_MESSAGES = ("restart", "starting", "loading", NOT_READY)
GATEWAY = tuple(f"http2 header with status: {code}" for code in (502, 503, 504))  # gRPC's words for a proxy's answer


@dataclass(frozen=True)
class Failure:
    """How a call failed: gRPC's status, e.g. UNAVAILABLE, and the message that came with it.

    Source of the statuses: https://github.com/grpc/grpc/blob/master/doc/statuscodes.md. Triton's messages are those
    that its server sends.
    """

    status: str
    message: str

    @property
    def reason(self) -> str | None:
        """What happened to the server, as the end of a sentence ("the server was busy").

        None if another try would not help.
        """
        said = self.message.lower()
        if self.too_large or any(mark in said for mark in FINAL):
            return None
        if "no available versions" in said:  # the model was there before: Triton unloads its models when it stops
            return STOPPING
        if self.status == "UNAVAILABLE":
            if any(mark in said for mark in BUSY_MESSAGES):
                return BUSY
            if any(mark in said for mark in LOADING_MESSAGES):
                return RESTARTING
            return STOPPING if "stopping" in said or "shutting down" in said else WENT_AWAY
        if self.status == "INTERNAL" and "stub process" in said:  # the process of a model in Triton's Python backend
            return RESTARTING
        if self.status == "CANCELLED" or "rst_stream" in said or "stream removed" in said:
            return WENT_AWAY
        return {"RESOURCE_EXHAUSTED": BUSY, "DEADLINE_EXCEEDED": SILENT}.get(self.status)

    @property
    def too_large(self) -> bool:
        """Whether a message, or its metadata, is larger than the client or the server allows."""
        return any(mark in self.message.lower() for mark in TOO_LARGE)

    @property
    def ending(self) -> bool:
        """Whether the server says that it is shutting down. It will not recover, but another may take its place."""
        return any(mark in self.message.lower() for mark in ENDING_MESSAGES)

    @property
    def shown(self) -> str:
        """The message, without the part about all addresses of a host name that gRPC can put before it."""
        return self.message.rpartition("; last error: ")[2]

    @property
    def passing(self) -> bool:
        """Whether a server, or a proxy in front of it, answers that it is not ready now.

        It is worth waiting for such a server when the client connects.
        """
        gateway = any(mark in self.message for mark in GATEWAY)
        return gateway or self.reason in (STOPPING, RESTARTING, BUSY)


class Retries:
    """How long a call is repeated: until `timeout` seconds after its first failure, but not beyond `deadline`.

    Before each try there is a random wait between 0 and a limit, which is 0.1 s, 0.2 s, … up to 5 s. It is random so
    that clients which failed at the same time do not all come back at the same time ("full jitter", Brooker 2015,
    Exponential Backoff And Jitter, AWS). Times are those of time.monotonic.
    """

    def __init__(self, timeout: float, deadline: float, uniform: Callable[[float, float], float] = random.uniform):
        self.first: float | None = None  # the time of the first failure
        self.tries = 0
        self._timeout, self._deadline, self._uniform = timeout, deadline, uniform
        self._limit = FIRST_WAIT

    def failed(self, now: float) -> None:
        """Note that a try failed at the time `now`."""
        self.tries += 1
        self.first = now if self.first is None else self.first

    def wait(self, now: float) -> float | None:
        """The seconds to wait, from the time `now` on, before the next try, or None if there is no time for another."""
        end = min((now if self.first is None else self.first) + self._timeout, self._deadline)
        if now >= end:
            return None
        wait = self._uniform(0, self._limit)
        self._limit = min(2 * self._limit, LONGEST_WAIT)
        return min(wait, end - now)
