"""The `Transport` of `AsyncClient`: its calls and waits run in one event loop, with gRPC's asyncio API.

The methods that wait must be called in a greenlet; see `ditforge.client.greenlets`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TypeVar

import grpc

from ditforge.client.greenlets import in_greenlet, wait_for
from ditforge.client.retry import Failure
from ditforge.client.settings import ConnectionSettings
from ditforge.client.transport import CLOSED, OPTIONS, SERVICE, CallFailed, Metadata, Use, failure

T = TypeVar("T")


class EventLoop:
    """A `Transport` for the tasks of the running event loop."""

    def __init__(self) -> None:
        self._tasks = set[asyncio.Task[object]]()  # kept here, because the event loop keeps only weak references

    def open(self, url: str, settings: ConnectionSettings) -> EventLoopChannel:
        return EventLoopChannel(url, settings)

    def sleep(self, seconds: float) -> None:
        wait_for(asyncio.sleep(seconds))

    def aside(self, function: Callable[..., T], *args: object) -> T:
        return wait_for(asyncio.to_thread(function, *args))

    def at_once(
        self, functions: Sequence[Callable[[], T]], enough: Callable[[T], bool], grace: float
    ) -> list[T | None]:
        return wait_for(self._at_once(functions, enough, grace))

    async def _at_once(
        self, functions: Sequence[Callable[[], T]], enough: Callable[[T], bool], grace: float
    ) -> list[T | None]:
        tasks = [asyncio.create_task(in_greenlet(function)) for function in functions]
        self._tasks.update(tasks)
        for task in tasks:
            task.add_done_callback(self._tasks.discard)
        pending, until, now = set(tasks), float("inf"), asyncio.get_running_loop().time
        try:
            while pending and (left := until - now()) > 0:
                timeout = None if left == float("inf") else left
                done, pending = await asyncio.wait(pending, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
                if until == float("inf") and any(enough(task.result()) for task in done):
                    until = now() + grace
        except asyncio.CancelledError:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            raise
        return [None if task in pending else task.result() for task in tasks]

    async def close(self) -> None:
        """Cancel the tasks that `at_once` did not wait for."""
        for task in (tasks := list(self._tasks)):
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)


class EventLoopChannel:
    """A `Channel` that uses gRPC's asyncio API."""

    def __init__(self, url: str, settings: ConnectionSettings) -> None:
        def make(credentials: grpc.ChannelCredentials | None) -> grpc.aio.Channel:
            if credentials is None:
                return grpc.aio.insecure_channel(url, OPTIONS)
            return grpc.aio.secure_channel(url, credentials, OPTIONS)

        self._use = Use[EventLoopPending](url, settings, asyncio.get_running_loop(), make)

    def begin(self, method: str, request: bytes, timeout: float, metadata: Metadata) -> EventLoopPending:
        call = self._use.channel.unary_unary(f"/{SERVICE}/{method}")
        return self._use.note(EventLoopPending(call(request, timeout=timeout, metadata=tuple(metadata.items()))))

    def close(self) -> None:
        channel = self._use.end()
        if channel is not None:
            wait_for(channel.close())


class EventLoopPending:
    """A call that was started in the running event loop."""

    def __init__(self, call: grpc.aio.UnaryUnaryCall) -> None:
        self._task = asyncio.create_task(answer(call))

    def wait(self, seconds: float | None) -> bool:
        done, _ = wait_for(asyncio.wait([self._task], timeout=seconds))
        return bool(done)

    def result(self) -> bytes:
        result = Failure("CANCELLED", CLOSED) if self._task.cancelled() else self._task.result()
        if isinstance(result, Failure):
            raise CallFailed(result)
        return result

    def cancel(self) -> None:
        self._task.cancel()


async def answer(call: grpc.aio.UnaryUnaryCall) -> bytes | Failure:
    """Wait for a call. Returns its answer, or how it failed.

    If the task that waits here is cancelled, so is the call. If the call's channel is closed, the task is cancelled.
    """
    try:
        data: bytes = await call
    except grpc.aio.AioRpcError as error:
        return failure(error.code(), error.details())
    else:
        return data
    finally:
        # The call is part of a cycle of references, so it would exist until Python's next garbage collection. gRPC
        # would keep the connection of a closed channel open for that long.
        vars(call).clear()
