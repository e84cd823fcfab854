"""The `Transport` of `Client`: its calls and waits block the thread that makes them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

import grpc

from ditforge.client.retry import Failure
from ditforge.client.settings import ConnectionSettings
from ditforge.client.transport import CLOSED, OPTIONS, SERVICE, CallFailed, Metadata, Use, failure

T = TypeVar("T")


class Blocking:
    """A `Transport` that any number of threads can use."""

    def open(self, url: str, settings: ConnectionSettings) -> BlockingChannel:
        return BlockingChannel(url, settings)

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def aside(self, function: Callable[..., T], *args: object) -> T:
        return function(*args)

    def at_once(
        self, functions: Sequence[Callable[[], T]], enough: Callable[[T], bool], grace: float
    ) -> list[T | None]:
        futures = [aside(function) for function in functions]
        pending, until = set(futures), float("inf")
        while pending and (left := until - time.monotonic()) > 0:
            done, pending = wait(pending, None if left == float("inf") else left, FIRST_COMPLETED)
            if until == float("inf") and any(enough(future.result()) for future in done):
                until = time.monotonic() + grace
        return [None if future in pending else future.result() for future in futures]


class BlockingChannel:
    """A `Channel` that uses gRPC's synchronous API."""

    def __init__(self, url: str, settings: ConnectionSettings) -> None:
        def make(credentials: grpc.ChannelCredentials | None) -> grpc.Channel:
            if credentials is None:
                return grpc.insecure_channel(url, OPTIONS)
            return grpc.secure_channel(url, credentials, OPTIONS)

        self._use = Use[BlockingPending](url, settings, "threads", make)

    def begin(self, method: str, request: bytes, timeout: float, metadata: Metadata) -> BlockingPending:
        call = self._use.channel.unary_unary(f"/{SERVICE}/{method}")
        return self._use.note(BlockingPending(lambda: call.future(request, timeout, tuple(metadata.items()))))

    def close(self) -> None:
        channel = self._use.end()
        if channel is not None:
            channel.close()


class BlockingPending:
    """A call that is started by the function `begin`, which runs in a thread of its own.

    Ctrl-C does not interrupt that thread. If Ctrl-C interrupted gRPC while it starts a call, gRPC would count the call
    as one that never ends, and closing the channel would wait for it for ever.
    """

    def __init__(self, begin: Callable[[], grpc.Future]) -> None:
        self._ended = SimpleQueue[object]()
        self._begun = aside(begin)
        self._begun.add_done_callback(self._note)

    def wait(self, seconds: float | None) -> bool:
        try:
            self._ended.put(self._ended.get(timeout=seconds))  # put back, so that a later wait returns at once
        except Empty:
            return False
        return True

    def result(self) -> bytes:
        try:
            answer: bytes = self._begun.result().result()
        except grpc.RpcError as error:
            raise CallFailed(failure(error.code(), error.details())) from error
        except (grpc.FutureCancelledError, ValueError) as error:  # ValueError: the channel was closed before the call
            raise CallFailed(Failure("CANCELLED", CLOSED)) from error
        return answer

    def cancel(self) -> None:
        self._begun.add_done_callback(lambda begun: begun.exception() or begun.result().cancel())

    def _note(self, begun: Future[grpc.Future]) -> None:
        if begun.exception():
            self._ended.put(begun)
        else:
            begun.result().add_done_callback(self._ended.put)


def aside(function: Callable[..., T], *args: Any) -> Future[T]:
    """Run a function in a daemon thread of its own. Returns a future of its result."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(function(*args))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future
