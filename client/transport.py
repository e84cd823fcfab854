"""The interface through which the client calls servers and waits.

It has two implementations: `ditforge.client.blocking` for `Client`, and `ditforge.client.event_loop` for `AsyncClient`.
Everything above it (retries, failover, the sampler loop) is written once, as plain functions that call its methods and
wait for them.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar
from weakref import WeakSet

import grpc

from ditforge.client.retry import Failure
from ditforge.client.settings import ConnectionSettings
from ditforge.plain_text import plain

T = TypeVar("T")
Metadata = Mapping[str, str | bytes]

SERVICE = "inference.GRPCInferenceService"
DESCRIBING = ("RepositoryIndex", "ModelReady", "ModelConfig", "ServerLive")
LARGEST_DESCRIPTION = 4 << 20  # bytes of an answer to DESCRIBING; configurations of our models have a few thousand
LONGEST_MESSAGE = 500  # characters of a server's message that are shown
CLOSED = "channel closed"

# With these options, a restarted server is found within a second, and two channels never share a connection. gRPC's own
# keepalive is not used. Triton allows one ping in 5 minutes, and with a ping every 10 s it closes a connection whose
# call takes 50 s ("too_many_pings"). Instead, a busy server is asked with a call whether it is live.
OPTIONS: list[tuple[str, int | str]] = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
    (
        "grpc.service_config",
        json.dumps(
            {
                "methodConfig": [
                    {
                        "name": [{"service": SERVICE, "method": method} for method in DESCRIBING],
                        "maxResponseMessageBytes": LARGEST_DESCRIPTION,
                    }
                ]
            }
        ),
    ),
]


class CallFailed(Exception):
    """A single try of a call failed, either of a model or of a question about the server. `failure` says how."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure)
        self.failure = failure


class Pending(Protocol):
    """A call that was begun and may not have ended."""

    def wait(self, seconds: float | None) -> bool:
        """Wait until the call has ended, but at most `seconds` (None: no limit). Returns whether it has ended."""

    def result(self) -> bytes:
        """The answer of a call that has ended, as the server sent it. Raises CallFailed if the call failed."""

    def cancel(self) -> None:
        """Cancel the call, here and at the server, without waiting. A call that has ended is not affected."""


P = TypeVar("P", bound=Pending)


class Channel(Protocol):
    """A channel to one server, as one client uses it."""

    def begin(self, method: str, request: bytes, timeout: float, metadata: Metadata) -> Pending:
        """Begin a call of a method of Triton's gRPC service. The call ends after at most `timeout` seconds."""

    def close(self) -> None:
        """Close the channel, which cannot be used again. Unfinished calls of this client fail."""


class Transport(Protocol):
    """How one client calls servers, and how it waits."""

    def open(self, url: str, settings: ConnectionSettings) -> Channel:
        """Return a channel to the server at `url`. It connects when it is first used."""

    def sleep(self, seconds: float) -> None:
        """Wait for so many seconds."""

    def aside(self, function: Callable[..., T], *args: object) -> T:
        """Run a function that blocks its thread, and return its result."""

    def at_once(
        self, functions: Sequence[Callable[[], T]], enough: Callable[[T], bool], grace: float
    ) -> list[T | None]:
        """Run all functions at the same time. Returns their results in the order of the functions.

        Waits until all have ended. When one has returned a result for which `enough` is true, it waits at most `grace`
        seconds more. The result of a function that has not ended by then is None. Such a function goes on until it ends
        or the client is closed.
        """


class Use(Generic[P]):
    """One client's use of a gRPC channel to the server at `url`, which all clients with the same settings share.

    `owner` names who can share it: all threads, or one event loop. `make` makes the channel from its TLS credentials,
    or from None without TLS.
    """

    def __init__(
        self,
        url: str,
        settings: ConnectionSettings,
        owner: Hashable,
        make: Callable[[grpc.ChannelCredentials | None], Any],
    ) -> None:
        tls, self._shared = settings.tls, settings.shared
        files = None if tls is None else (tls.read("ca"), tls.read("key"), tls.read("certificate"))
        self._key = owner, url, files
        self._lock, self._closed, self._calls = threading.Lock(), False, WeakSet[P]()
        self.channel = self._shared.take(self._key, lambda: make(files and grpc.ssl_channel_credentials(*files)))

    def note(self, pending: P) -> P:
        """Note a call of this client, and return it. It is cancelled at once if the client has been closed."""
        with self._lock:
            self._calls.add(pending)
            closed = self._closed
        if closed:
            pending.cancel()
        return pending

    def end(self) -> Any | None:
        """Cancel this client's calls, and stop using the channel.

        Returns the channel if no other client uses it, so that the caller can close it, or else None.
        """
        with self._lock:
            if self._closed:
                return None
            self._closed, calls = True, list(self._calls)
        for pending in calls:
            pending.cancel()
        return self._shared.give_back(self._key)


def failure(code: grpc.StatusCode, details: str | None) -> Failure:
    """Make a Failure of gRPC's status code, e.g. UNAVAILABLE, and the first line of its message."""
    lines = (details or "").strip().removeprefix("UNKNOWN:").strip().splitlines()  # gRPC begins causes so
    return Failure(code.name, shown(lines[0]) if lines else "no reason given")


def shown(text: str) -> str:
    """A server's text on one line, shortened, and with nothing in it that could steer a terminal."""
    text = plain(" ".join(text.split()))
    return text if len(text) <= LONGEST_MESSAGE else f"{text[:LONGEST_MESSAGE]}…"
