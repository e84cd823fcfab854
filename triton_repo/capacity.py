"""How much the front takes at once: calls, messages that are being read, and bytes that are held.

What is more is refused (RESOURCE_EXHAUSTED) rather than taken until there is no memory left.
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
    """What is taken now, of requests that have at most `largest` bytes."""

    def __init__(self, largest: int) -> None:
        self.readers = asyncio.Semaphore(max(MOST_BYTES // largest, LEAST_READERS))
        self.waiting = 0  # requests whose message is not yet read, since others are
        self.calls = 0  # that are being answered, probes aside
        self.held = 0  # bytes of the requests that are being answered, and of answers until they are taken

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        """While a call is read and answered. Raises Refused where there are too many."""
        if self.calls >= MOST_AT_ONCE:
            raise Refused(BUSY, "the server answers as many requests as it can; ask again later")
        self.calls += 1
        try:
            yield
        finally:
            self.calls -= 1

    @contextlib.contextmanager
    def holding(self, size: int) -> Iterator[None]:
        """While a request or an answer of `size` bytes is held. Raises Refused where they are too many in all."""
        if self.held and self.held + size > MOST_BYTES:
            raise Refused(BUSY, "the server holds as many messages as it can; ask again later")
        self.held += size
        try:
            yield
        finally:
            self.held -= size

    async def receive(self, context: grpc.aio.ServicerContext) -> bytes:
        """The message of an inference, once few enough others are read. Raises Refused where that takes too long."""
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
    """A future of the work, whose error is not reported as one that was never asked for: nobody may be left to ask."""
    future = asyncio.ensure_future(work)
    future.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
    return future
