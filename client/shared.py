"""The gRPC channels that clients with the same settings share. Each channel is closed with its last client."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Any


class Shared:
    """The open channels, and the number of clients that use each. A copy of this object begins without channels."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._channels: dict[Hashable, tuple[Any, int]] = {}

    def take(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """Return the channel with that key for one more client. If there is none, `make` makes it."""
        with self._lock:
            channel, users = self._channels.get(key) or (make(), 0)
            self._channels[key] = channel, users + 1
        return channel

    def give_back(self, key: Hashable) -> Any | None:
        """Note that a client stops using the channel with that key.

        Returns the channel if this was its last client, which must close it, or else None.
        """
        with self._lock:
            channel, users = self._channels.pop(key)
            if users > 1:
                self._channels[key] = channel, users - 1
        return None if users > 1 else channel

    def __reduce__(self) -> tuple[type[Shared], tuple[()]]:
        return Shared, ()
