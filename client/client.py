"""`Client`: prompts in, pictures out. The sampler loop runs here, each step in a server."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from typing_extensions import Self, Unpack

from ditforge.client.address import DEFAULT_URL
from ditforge.client.answer import Arrays
from ditforge.client.calls import Calls
from ditforge.client.connection import Connection
from ditforge.client.decoding import Pixels, decode
from ditforge.client.guidance import guided
from ditforge.client.noise import BatchNoise
from ditforge.client.options import GenerateOptions, Options, make_options
from ditforge.client.picture_file import METADATA_KEY
from ditforge.client.request import Request, make_request
from ditforge.client.samplers import Array, Callback, Denoise, Noise, find_sampler, sampler_name
from ditforge.client.settings import ConnectionSettings, Settings, make_settings
from ditforge.client.told import warn
from ditforge.contract import DIT, TEXT_ENCODERS, TEXT_ENCODERS_CLIP, VAE_DECODER
from ditforge.errors import DitforgeError, UserError
from ditforge.model import Model


class Client:
    """A connection to the server at `url` (HOST:PORT of gRPC), or to several of the same engines: a list of addresses.

    Each picture begins at the next server, and goes on at another one where it fails. Servers that are of no use are
    warned of, as long as there is another. Also a context manager that closes the connection. Settings, by name:

    timeout (1800 seconds): how long a picture may take, from its first call to its last.
    connect_timeout (10 seconds): how long to wait for a server that is silent, or starts. One that refuses connections
            is given up sooner.
    step_timeout (300 seconds): how long a server may take for one call (the text encoders, a step, the VAE).
    retry_timeout (60 seconds): how long a call that failed is repeated, from its first failure on; 0: on each server
        once.
    keepalive (10 seconds): how often a server that is busy with a call is asked whether it lives.
    keepalive_timeout (10 seconds): how long it may take to answer that.
    token (None): sent with every call as a bearer token; without TLS it can be read on the way.
    tls (None): a ditforge.client.TLS with the files of an encrypted connection; TLS() trusts public authorities.
    headers (none): a mapping of lower-case names to values, sent with every call as gRPC metadata, e.g. for a proxy. A
        value is ASCII text, or bytes where the name ends in -bin.

    In place of `url`, a ditforge.client.ConnectionSettings has addresses and settings; those given by name beside it
    count in place of its own. Clients that are given the same object share connections.

    Raises UserError for settings that cannot be, and where no server with a model made by ditforge answers;
    DitforgeError where none is ready in time.
    """

    def __init__(
        self, url: str | Sequence[str] | ConnectionSettings = DEFAULT_URL, **settings: Unpack[Settings]
    ) -> None:
        self._connection = Connection(make_settings(url, **settings)).connect()

    @classmethod
    def _over(cls, connection: Connection) -> Self:
        """A client of a connection that somebody else connects, as AsyncClient does."""
        client = cls.__new__(cls)
        client._connection = connection
        return client

    @property
    def model(self) -> Model:
        """What the server says of its model: sizes, default steps, guidance, …"""
        return self._connection.model

    @overload
    def generate(
        self, prompt: str, options: GenerateOptions | None = None, **keywords: Unpack[Options]
    ) -> Image.Image: ...
    @overload
    def generate(
        self, prompt: list[str], options: GenerateOptions | None = None, **keywords: Unpack[Options]
    ) -> list[Image.Image]: ...

    def generate(
        self, prompt: str | list[str], options: GenerateOptions | None = None, **keywords: Unpack[Options]
    ) -> Image.Image | list[Image.Image]:
        """A picture for a prompt, or a list of pictures for a list of prompts, made as one batch.

        Prompt number i gets the seed `seed` + i, or the one that it is given: each picture is the one that it would be
        alone. Each carries its parameters in `info`. Options are a GenerateOptions, or its fields as keywords, or both,
        where keywords win; GenerateOptions says what each means. One more keyword:

        callback: called once a step with a ditforge.client.Step, for a progress bar or a preview.

        Raises UserError for an option that the model cannot take; DitforgeError if servers fail for longer than calls
        are repeated or answer something else than they were asked, or the picture is not done within its time.
        """
        images = self._generate([prompt] if isinstance(prompt, str) else prompt, options, keywords)
        return images[0] if isinstance(prompt, str) else images

    def _generate(self, prompts: list[str], options: GenerateOptions | None, keywords: Options) -> list[Image.Image]:
        made, callback = make_options(options, keywords)
        calls = self._connection.begin()
        return run(calls, make_request(calls.model, prompts, made), callback)

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def run(calls: Calls, request: Request, callback: Callback | None = None) -> list[Image.Image]:
    """Text encoders, sampler loop, VAE: the pictures of a request, each with its parameters in `info`.

    Raises DitforgeError where a network makes something that is not finite. Warns where calls had to be repeated, and
    of a picture of a single colour.
    """
    model = calls.model
    text, negative = encode(calls, request)
    shape = model.latent_channels, request.height // model.vae_factor, request.width // model.vae_factor
    sigmas = np.array(request.sigmas, np.float32)

    def evaluate(inputs: Mapping[str, NDArray[Any]]) -> Array:
        # Heun's method evaluates a step's end too, which is where the next one begins, and is called so here.
        begun = int((sigmas[:-1] > inputs["timestep"][0]).sum()) + 1
        step = f"step {begun} of {request.steps}"
        velocity = calls.infer(DIT, inputs, step)["velocity"]
        check_finite(velocity, "velocity", f"dit, {step}")
        return velocity

    def decoder(latents: Array) -> Pixels:
        return calls.infer(VAE_DECODER, {"latents": latents})["image"]

    denoise = guided(evaluate, model, request, sigmas, text, negative)
    latents = sample(request, denoise, BatchNoise(request.seeds, shape), callback)
    pixels = decode(decoder, latents, model.vae_factor, request.vae_tile)
    images = [Image.fromarray(image) for image in pixels]
    for index, image in enumerate(images):
        image.info[METADATA_KEY] = json.dumps(request.parameters(index, model), ensure_ascii=False)
        if (pixels[index] == pixels[index, 0, 0]).all():
            # The decoder's last node turns NaN into some pixel, so this is all that shows of it.
            which = f"picture {index + 1} of {len(images)}" if len(images) > 1 else "the picture"
            warn(f"{which} is of one colour everywhere, {image.getpixel((0, 0))}: vae_decoder may have failed")
    if calls.repeated:
        warn(calls.repeated)
    return images


def sample(request: Request, denoise: Denoise, noise: Noise, callback: Callback | None) -> Array:
    """Latents float32 [B, C, h, w] of a request's pictures, from noise.

    Raises UserError where a user's own sampler returns something else.
    """
    latents = noise()
    sigmas = np.array(request.sigmas, np.float32)
    made = find_sampler(request.sampler)(denoise, latents, sigmas, noise, callback, **request.sampler_options)
    if not isinstance(made, np.ndarray) or made.shape != latents.shape or made.dtype.kind != "f":
        what = f"{made.dtype} {list(made.shape)}" if isinstance(made, np.ndarray) else type(made).__name__
        problem = f"the sampler {sampler_name(request.sampler)} returned {what}"
        raise UserError(problem, f"return latents, float32 {list(latents.shape)}")
    check_finite(made, "latents", f"the sampler {sampler_name(request.sampler)}")
    return made.astype(np.float32, copy=False)


def check_finite(array: Array, tensor: str, where: str) -> None:
    """Raise DitforgeError if there is a NaN or an infinity in what a network made."""
    broken = np.count_nonzero(~np.isfinite(array))
    if broken:
        problem = f"{tensor} is not finite (NaN or infinity) in {broken} of {array.size} elements: {where}"
        raise DitforgeError(problem, "ditforge verify ENGINE_DIR --against ONNX_DIR   or export in another --precision")


def encode(calls: Calls, request: Request) -> tuple[Arrays, Arrays | None]:
    """`prompt_embeds` and `pooled_embeds` of the prompts, and of the negative prompts where they are needed.

    What occurs more than once is encoded once.
    """
    wanted = list(zip(request.prompts, request.with_t5, strict=True))
    if guided_by_negative := request.cfg_scale(calls.model) > 1:
        wanted += [(request.negative_prompt, with_t5) for with_t5 in request.with_t5]
    rows: dict[tuple[str, bool], Arrays] = {}
    for with_t5 in dict.fromkeys(request.with_t5):
        prompts = list(dict.fromkeys(prompt for prompt, t5 in wanted if t5 == with_t5))
        encoded = encode_prompts(calls, prompts, with_t5)
        rows |= {(p, with_t5): {key: array[[i]] for key, array in encoded.items()} for i, p in enumerate(prompts)}
    found = [rows[item] for item in wanted]
    stacked = {key: np.concatenate([row[key] for row in found]) for key in found[0]}
    count = len(request.prompts)
    text = {key: array[:count] for key, array in stacked.items()}
    return text, {key: array[count:] for key, array in stacked.items()} if guided_by_negative else None


def encode_prompts(calls: Calls, prompts: Sequence[str], with_t5: bool) -> Arrays:
    """`prompt_embeds` and `pooled_embeds` of the prompts. Warns once if a text encoder does not read all of one."""
    model = calls.model
    name = TEXT_ENCODERS if with_t5 or model.t5 == "absent" else TEXT_ENCODERS_CLIP
    encoded = calls.infer(name, {"prompt": np.array([[p.encode()] for p in prompts], np.object_)})
    longest = encoded.pop("prompt_tokens").max(axis=0)
    for tensor, array in encoded.items():
        check_finite(array, tensor, name)
    cut = [
        f"{name} reads {limit} of {n} tokens"
        for n, (name, limit) in zip(longest, model.max_tokens.items(), strict=True)
        if n > limit and (with_t5 or name != "t5")
    ]
    if cut:
        warn(f"the prompt is too long and was cut: {', '.join(cut)}")
    return encoded
