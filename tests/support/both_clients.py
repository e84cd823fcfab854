"""Client and AsyncClient in one form, for tests that hold for both."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

import psutil
import pytest
from typing_extensions import Self

from ditforge.client import AsyncClient, Client
from ditforge.model import Model

T = TypeVar("T")


class InLoop:
    """AsyncClient with Client's methods, each of which runs in an event loop of its own until it returns."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        self._loop = asyncio.new_event_loop()
        self._client = AsyncClient(*arguments, **settings)
        try:
            self._run(self._client.connect())
        except BaseException:
            self._loop.close()
            raise

    @property
    def model(self) -> Model:
        return self._client.model

    def generate(self, *arguments: Any, **options: Any) -> Any:
        return self._run(self._client.generate(*arguments, **options))

    def close(self) -> None:
        if not self._loop.is_closed():
            self._run(self._client.close())
            self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _run(self, what: Coroutine[Any, Any, T]) -> T:
        return self._loop.run_until_complete(what)


BOTH = [pytest.param(Client, id="Client"), pytest.param(InLoop, id="AsyncClient")]
FILES = [__file__]  # where AsyncClient is called here, which its warnings name


def connections(url: str) -> int:
    """How many this process has to the server at `url`."""
    port = int(url.rpartition(":")[2])
    return sum(bool(each.raddr) and each.raddr.port == port for each in psutil.Process().net_connections("tcp"))
