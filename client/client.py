"""`Client` and `AsyncClient`: prompts in, pictures out. The sampler loop runs here, each step in a server."""

from __future__ import annotations

import asyncio
import json
import threading
import warnings
from collections.abc import Sequence
from types import TracebackType
from typing import TypedDict, overload

import numpy as np
from PIL import Image
from typing_extensions import Self, Unpack

from ditforge.client.connection import Arrays, Connection
from ditforge.client.noise import noise
from ditforge.client.picture import METADATA_KEY
from ditforge.client.request import Request, make_request
from ditforge.client.sampling import Array, Callback, Step, find_sampler, flow_sigmas
from ditforge.errors import DitforgeWarning
from ditforge.model import Model

DEFAULT_URL = "localhost:8001"
DEFAULT_SAMPLER = "euler"


class Options(TypedDict, total=False):
    """What `generate` takes beside the prompt; None means the model's default.

    seed: 0 … 2^64 - 1, default random. steps: 1 … 1000. height, width: pixels. guidance: what the model makes of it.
    sampler: a name in ditforge.client.sampling.SAMPLERS. callback: called once a step with a sampling.Step.
    """

    seed: int | None
    steps: int | None
    height: int | None
    width: int | None
    guidance: float | None
    sampler: str
    callback: Callback | None


class Client:
    """A connection to a server at `url` (HOST:PORT of gRPC). Also a context manager that closes it.

    Raises UserError where no server with a model made by ditforge answers, DitforgeError where it is not ready.
    """

    def __init__(self, url: str = DEFAULT_URL) -> None:
        self._connection = Connection(url)

    @property
    def model(self) -> Model:
        """What the server says of its model: sizes, default steps, guidance, …"""
        return self._connection.model

    @overload
    def generate(self, prompt: str, **options: Unpack[Options]) -> Image.Image: ...
    @overload
    def generate(self, prompt: list[str], **options: Unpack[Options]) -> list[Image.Image]: ...

    def generate(self, prompt: str | list[str], **options: Unpack[Options]) -> Image.Image | list[Image.Image]:
        """A picture for a prompt, or a list of pictures for a list of prompts, made as one batch.

        The prompt number i gets the seed `seed` + i: each picture is the one that it would be alone. Each carries its
        parameters in `info`. Raises UserError for an option that the model cannot take, and DitforgeError if the server
        fails on the way.
        """
        request = make_request(
            self.model,
            [prompt] if isinstance(prompt, str) else prompt,
            seed=options.get("seed"),
            steps=options.get("steps"),
            height=options.get("height"),
            width=options.get("width"),
            guidance=options.get("guidance"),
            sampler=options.get("sampler", DEFAULT_SAMPLER),
        )
        images = run(self._connection, request, options.get("callback"))
        return images[0] if isinstance(prompt, str) else images

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncClient:
    """`Client` for asyncio: `async with AsyncClient(url) as client: await client.generate(…)`.

    Each picture is made in a thread of its own. Cancelling the task ends the wait at once, and the loop in the thread
    before its next step.
    """

    def __init__(self, url: str = DEFAULT_URL) -> None:
        self._url = url
        self._client: Client | None = None
        self._lock = asyncio.Lock()

    async def connect(self) -> Client:
        """The connection, made when it is first needed."""
        async with self._lock:
            if self._client is None:
                self._client = await asyncio.to_thread(Client, self._url)
            return self._client

    @overload
    async def generate(self, prompt: str, **options: Unpack[Options]) -> Image.Image: ...
    @overload
    async def generate(self, prompt: list[str], **options: Unpack[Options]) -> list[Image.Image]: ...

    async def generate(self, prompt: str | list[str], **options: Unpack[Options]) -> Image.Image | list[Image.Image]:
        """As Client.generate. `callback` is called in the thread that makes the picture."""
        client = await self.connect()
        cancelled = threading.Event()
        callback = options.get("callback")

        def step_or_stop(step: Step) -> None:
            if cancelled.is_set():
                raise asyncio.CancelledError
            if callback:
                callback(step)

        options["callback"] = step_or_stop
        try:
            return await asyncio.to_thread(lambda: client.generate(prompt, **options))
        finally:
            cancelled.set()

    async def close(self) -> None:
        """Close the connection."""
        if self._client is not None:
            await asyncio.to_thread(self._client.close)

    async def __aenter__(self) -> Self:
        await self.connect()
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()


def run(connection: Connection, request: Request, callback: Callback | None = None) -> list[Image.Image]:
    """Text encoders, sampler loop, VAE: the pictures of a request, each with its parameters in `info`."""
    model = connection.model
    text = encode_prompts(connection, request.prompts)
    height, width = request.height // model.vae_factor, request.width // model.vae_factor
    shape = (1, model.latent_channels, height, width)
    latents = np.concatenate([noise(shape, seed) for seed in request.seeds])
    if model.guidance == "embedded":
        text["guidance"] = np.full(len(latents), request.guidance, np.float32)

    def denoise(latents: Array, sigma: float) -> Array:
        timestep = np.full(len(latents), sigma, np.float32)
        return connection.infer("dit", {"latents": latents, "timestep": timestep, **text})["velocity"]

    sigmas = flow_sigmas(request.steps, model.schedule, height, width)
    latents = find_sampler(request.sampler)(denoise, latents, sigmas, callback)
    images = [Image.fromarray(image) for image in connection.infer("vae_decoder", {"latents": latents})["image"]]
    for index, image in enumerate(images):
        image.info[METADATA_KEY] = json.dumps(request.parameters(index, model), ensure_ascii=False)
    return images


def encode_prompts(connection: Connection, prompts: Sequence[str]) -> Arrays:
    """`prompt_embeds` and `pooled_embeds` of the prompts. Warns once if a text encoder does not read all of one."""
    encoded = connection.infer("text_encoders", {"prompt": np.array([[p.encode()] for p in prompts], np.object_)})
    longest = encoded.pop("prompt_tokens").max(axis=0)
    limits = connection.model.max_tokens
    cut = [
        f"{name} reads {limit} of {n} tokens"
        for n, (name, limit) in zip(longest, limits.items(), strict=True)
        if n > limit
    ]
    if cut:
        warnings.warn(f"the prompt is too long and was cut: {', '.join(cut)}", DitforgeWarning, stacklevel=4)
    return encoded
