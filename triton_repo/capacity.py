"""Limits how much the front takes at once: the calls, the messages that are being read, and the bytes that are held.

Whatever exceeds a limit is refused (RESOURCE_EXHAUSTED), so that the server does not run out of memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import TypeVar

import grpc

from ditforge.triton_repo.limits import BadRequest
from ditforge.triton_repo.refusal import Refused

MOST_AT_ONCE = 512  # requests that are read and answered, probes aside
MOST_BYTES = 256 << 20  # of all requests for models that are read, and of all that are answered
LEAST_READERS = 4  # requests that are read at once, however large they may be
UNDISTURBED = 2.0  # seconds in which a message can arrive however many others wait
ARRIVAL = 30.0  # seconds within which the message of a request has to arrive
BUSY = grpc.StatusCode.RESOURCE_EXHAUSTED
T = TypeVar("T")


class Capacity:
    """What is being taken at the moment, if a request has at most `largest` bytes."""

    def __init__(self, largest: int) -> None:
        self.readers = asyncio.Semaphore(max(MOST_BYTES // largest, LEAST_READERS))
        self.waiting = 0  # requests whose message waits until others are read
        self.calls = 0  # calls that are being answered, without probes
        self.held = 0  # bytes of the requests that are being answered, and of answers until they are taken

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        """A context in which one call is read and answered. Raises Refused if there are too many calls."""
        if self.calls >= MOST_AT_ONCE:
            raise Refused(BUSY, "the server answers as many requests as it can; ask again later")
        self.calls += 1
        try:
            yield
        finally:
            self.calls -= 1

    @contextlib.contextmanager
    def holding(self, size: int) -> Iterator[None]:
        """A context in which a message of `size` bytes is held. Raises Refused if all together are too large."""
        if self.held and self.held + size > MOST_BYTES:
            raise Refused(BUSY, "the server holds as many messages as it can; ask again later")
        self.held += size
        try:
            yield
        finally:
            self.held -= size

    async def receive(self, context: grpc.aio.ServicerContext) -> bytes:
        """Read the message of an inference request, once few enough others are being read.

        Raises Refused if that takes too long.
        """
        self.waiting += 1
        try:
            await asyncio.wait_for(self.readers.acquire(), ARRIVAL)
        except asyncio.TimeoutError:
            raise Refused(BUSY, "the server reads as many messages as it can; ask again later") from None
        finally:
            self.waiting -= 1
        try:
            return await arrived(context, others_wait=lambda: self.waiting > 0)
        finally:
            self.readers.release()


async def arrived(context: grpc.aio.ServicerContext, others_wait: Callable[[], bool] = lambda: False) -> bytes:
    """The message of a call. Raises BadRequest where there is none.

    Raises Refused where it does not come within ARRIVAL seconds, or within UNDISTURBED ones while others wait.
    """
    reading = started(context.read())  # it ends with the call
    deadline = time.monotonic() + ARRIVAL
    while (left := deadline - time.monotonic()) > 0 and not reading.done():
        await asyncio.wait([reading], timeout=min(left, UNDISTURBED))
        if others_wait() and not reading.done():
            raise Refused(BUSY, "the message arrives slowly, and others wait; repeat it")
    if not reading.done():
        late = f"the message of the request did not arrive within {ARRIVAL:g} s"
        raise Refused(grpc.StatusCode.DEADLINE_EXCEEDED, late)
    message = reading.result()
    if not isinstance(message, bytes):
        raise BadRequest("the call has no message")
    return message


def started(work: Awaitable[T]) -> asyncio.Future[T]:
    """Start the work as a future. An error of it is not reported if nobody awaits the future any more."""
    future = asyncio.ensure_future(work)
    future.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
    return future
