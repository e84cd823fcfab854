"""Several servers that tests end and start again."""

from __future__ import annotations

import os
import random
import signal
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from ditforge.client import Step
from ditforge.triton_repo.server import start


def lasting_port() -> int:
    """A free port that the system gives nobody who asks for any: it is free again after a server on it has ended."""
    while True:
        with suppress(OSError), socket.create_server(("127.0.0.1", random.randrange(20_000, 30_000))) as listener:
            return listener.getsockname()[1]


class Servers:
    """Servers of one repository, each on a port of its own, which it has again when it is started again."""

    def __init__(self, repository: Path, count: int) -> None:
        self.repository = repository
        with ThreadPoolExecutor() as pool:
            ports = [lasting_port() for _ in range(count)]
            self.running = list(pool.map(lambda port: start(repository, port=port), ports))
        self.urls = [server.url for server in self.running]
        self._ended: set[str] = set()

    def kill(self, url: str, number: int = signal.SIGKILL) -> None:
        """Send a signal to the server at `url`."""
        os.kill(self.running[self.urls.index(url)].pid, number)
        if number in (signal.SIGKILL, signal.SIGTERM):
            self._ended.add(url)

    def start_again(self, url: str, repository: Path | None = None) -> None:
        """Wait for the end of the server at `url`, and start one there."""
        index = self.urls.index(url)
        self.running[index].wait()
        self.running[index] = start(repository or self.repository, port=int(url.rpartition(":")[2]))
        self._ended.discard(url)

    def all_again(self) -> None:
        """Start every server that was ended."""
        with ThreadPoolExecutor() as pool:
            list(pool.map(self.start_again, tuple(self._ended)))

    def stop(self) -> None:
        for server in self.running:
            server.stop(grace=0)


def at_step(number: int, action: Callable[[], object]) -> Callable[[Step], None]:
    """A callback that acts once, between two steps."""
    return lambda step: action() if step.index == number else None
