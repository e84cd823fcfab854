"""What the client needs of the network: to call servers, and to wait.

There are two implementations: `ditforge.client.blocking` for `Client`, and `ditforge.client.event_loop` for
`AsyncClient`. Everything above them (retries, failover, the sampler loop) is written once, as plain functions that call
these methods and wait for them.
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

T = TypeVar("T")
Metadata = Mapping[str, str | bytes]

SERVICE = "inference.GRPCInferenceService"
DESCRIBING = ("RepositoryIndex", "ModelReady", "ModelConfig", "ServerLive")
LARGEST_DESCRIPTION = 4 << 20  # bytes: the configurations of our models have some thousands
LONGEST_MESSAGE = 500  # characters of what a server says, which is shown
CLOSED = "channel closed"

# A server that was started again is seen within a second, and channels share no connection beneath. What is not here:
# gRPC's own keepalive. Triton allows a ping in 5 minutes, and closes a connection with a call that takes 50 s while it
# is pinged every 10 s ("too_many_pings"); so a busy server is asked whether it is live instead.
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
    """A try of a call failed, or a question what a server serves."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure)
        self.failure = failure


class Pending(Protocol):
    """A call that was begun."""

    def wait(self, seconds: float | None) -> bool:
        """Wait until the call has ended, for at most so many seconds (None: for ever). Returns whether it has."""

    def result(self) -> bytes:
        """The answer of a call that has ended, as the server sent it. Raises CallFailed if the call failed."""

    def cancel(self) -> None:
        """End the call, which the server is told. Does not wait, and does no harm to a call that has ended."""


P = TypeVar("P", bound=Pending)


class Channel(Protocol):
    """A channel to one server, as one client uses it."""

    def begin(self, method: str, request: bytes, timeout: float, metadata: Metadata) -> Pending:
        """Begin a call of a method of Triton's service, which ends after `timeout` seconds at the latest."""

    def close(self) -> None:
        """Close the channel for good. Calls of this client that have not ended fail."""


class Transport(Protocol):
    """How one client calls servers, and how it waits."""

    def open(self, url: str, settings: ConnectionSettings) -> Channel:
        """A channel to the server at `url`, which connects when it is first used."""

    def sleep(self, seconds: float) -> None:
        """Wait so many seconds."""

    def aside(self, function: Callable[..., T], *args: object) -> T:
        """What a function returns that blocks its thread."""

    def at_once(
        self, functions: Sequence[Callable[[], T]], enough: Callable[[T], bool], grace: float
    ) -> list[T | None]:
        """What the functions return, which all run at once, in their order.

        It is waited until they have ended, or for `grace` seconds more once one has returned what is `enough`. There is
        None for those that have not ended by then; they go on, until they end or the client is closed.
        """


class Use(Generic[P]):
    """One client's use of a gRPC channel to the server at `url`, which clients of the same settings share.

    `owner` is what can use it. `make` makes it, given what it is encrypted with, or None.
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
        """Note a call of this client."""
        with self._lock:
            self._calls.add(pending)
            closed = self._closed
        if closed:
            pending.cancel()
        return pending

    def end(self) -> Any | None:
        """End the calls of this client. Returns the channel where nobody uses it any more: it is to be closed."""
        with self._lock:
            if self._closed:
                return None
            self._closed, calls = True, list(self._calls)
        for pending in calls:
            pending.cancel()
        return self._shared.give_back(self._key)


def failure(code: grpc.StatusCode, details: str | None) -> Failure:
    """gRPC's status code, e.g. UNAVAILABLE, and the first line of the message."""
    lines = (details or "").strip().splitlines()
    return Failure(code.name, shown(lines[0]) if lines else "no reason given")


def shown(text: str) -> str:
    """What a server said, with nothing in it that a terminal would obey, and no more than people read."""
    text = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)
    return text if len(text) <= LONGEST_MESSAGE else f"{text[:LONGEST_MESSAGE]}…"
