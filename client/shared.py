"""gRPC channels, which clients that were given the same settings share: each is closed with the last of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Any


class Shared:
    """Open channels, and how many clients use each. A copy has none of its own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._channels: dict[Hashable, tuple[Any, int]] = {}

    def take(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The channel of that key, made where there is none."""
        with self._lock:
            channel, users = self._channels.get(key) or (make(), 0)
            self._channels[key] = channel, users + 1
        return channel

    def give_back(self, key: Hashable) -> Any | None:
        """One client uses it no more. Returns the channel if that was the last one, who closes it."""
        with self._lock:
            channel, users = self._channels.pop(key)
            if users > 1:
                self._channels[key] = channel, users - 1
        return None if users > 1 else channel

    def __reduce__(self) -> tuple[type[Shared], tuple[()]]:
        return Shared, ()
