"""`AsyncClient`: the client for asyncio, which uses gRPC's asyncio API."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, overload

from PIL import Image
from typing_extensions import Self, Unpack

from ditforge.arguments import bound
from ditforge.client.address import DEFAULT_URL
from ditforge.client.client import Client
from ditforge.client.connection import Connection
from ditforge.client.event_loop import EventLoop
from ditforge.client.greenlets import in_greenlet
from ditforge.client.options import GenerateOptions, Options
from ditforge.client.settings import ConnectionSettings, Settings, make_settings
from ditforge.client.told import CALLER, Line, caller
from ditforge.errors import DitforgeError, UserError
from ditforge.model import Model


class AsyncClient:
    """`Client` for asyncio: `async with AsyncClient(url) as client: await client.generate(…)`.

    It takes the settings and options of `Client`, and reacts to failing servers in the same way. It connects when it is
    first used, or when `connect` is called. Any number of tasks of one event loop can use it at the same time.

    No threads are used to make pictures. The calls are gRPC's asyncio calls, and the work between two calls runs in the
    event loop, so other tasks wait during that time. This work is NumPy on latents (noise, sampler, guidance), a copy
    of the tensors of each call, and the blending of tiles if pictures are decoded in tiles; it takes milliseconds.
    `callback` and your own sampler are plain functions that run in the event loop too, so they must not block. A thread
    is used only to find out why an encrypted connection failed, and for a few seconds at most.

    If the task that makes a picture is cancelled, its call at the server is cancelled at once.
    """

    @bound
    def __init__(
        self, url: str | Sequence[str] | ConnectionSettings = DEFAULT_URL, **settings: Unpack[Settings]
    ) -> None:
        self._settings = make_settings(url, **settings)
        self._connecting = asyncio.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._opened: tuple[Connection, EventLoop] | None = None
        self._client: Client | None = None  # None until it is connected
        self._closed = False

    @property
    def model(self) -> Model:
        """The model as the server describes it. Raises DitforgeError if the client is not connected yet."""
        if self._client is None:
            raise DitforgeError("this AsyncClient is not connected", "await client.connect()   before client.model")
        return self._client.model

    def connect(self) -> Coroutine[Any, Any, Self]:
        """Connect, unless the client is connected already. Raises the same errors as `Client(…)`."""
        return self._connect(caller())

    @overload
    def generate(
        self, prompt: str, options: GenerateOptions | None = None, **keywords: Unpack[Options]
    ) -> Coroutine[Any, Any, Image.Image]: ...
    @overload
    def generate(
        self, prompt: list[str], options: GenerateOptions | None = None, **keywords: Unpack[Options]
    ) -> Coroutine[Any, Any, list[Image.Image]]: ...

    @bound
    def generate(
        self, prompt: str | list[str], options: GenerateOptions | None = None, **keywords: Unpack[Options]
    ) -> Coroutine[Any, Any, Image.Image | list[Image.Image]]:
        """Return a coroutine with the result of `Client.generate`. Warnings name the line that called this method."""
        return self._generate(prompt, options, keywords, caller())

    async def close(self) -> None:
        """Close the connection. Unfinished pictures fail, and the client cannot be used again."""
        self._closed = True
        if self._loop is not None and self._loop.is_closed():
            return  # the connections were closed with the event loop
        self._check_loop()
        if self._opened is not None:
            connection, transport = self._opened
            await in_greenlet(connection.close)
            await transport.close()

    async def __aenter__(self) -> Self:
        return await self._connect(caller())

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def _connect(self, line: Line) -> Self:
        """Connect. Warnings name `line` as the line of the caller."""
        self._check_loop()
        token = CALLER.set(line)
        try:
            async with self._connecting:
                if self._closed:
                    raise DitforgeError("this AsyncClient is closed", "make a new one")
                if self._client is None:
                    transport = EventLoop()
                    connection = Connection(self._settings, transport)
                    self._opened = connection, transport
                    try:
                        await in_greenlet(connection.connect)
                    except (Exception, asyncio.CancelledError):
                        await transport.close()
                        raise
                    self._client = Client._over(connection)
        finally:
            CALLER.reset(token)
        return self

    async def _generate(
        self, prompt: str | list[str], options: GenerateOptions | None, keywords: Options, line: Line
    ) -> Image.Image | list[Image.Image]:
        client = (await self._connect(line))._client
        assert client is not None
        token = CALLER.set(line)
        try:
            return await in_greenlet(lambda: client.generate(prompt, options, **keywords))
        finally:
            CALLER.reset(token)

    def _check_loop(self) -> None:
        """Raise UserError if the running event loop is not the one in which this client was first used."""
        running = asyncio.get_running_loop()
        self._loop = self._loop or running
        if self._loop is not running:
            problem = "this AsyncClient belongs to another event loop than the one that runs"
            raise UserError(problem, "make an AsyncClient in each event loop, e.g. in what asyncio.run is given")
