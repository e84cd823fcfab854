"""`Client`: turns prompts into pictures. The sampler loop runs here, and a server computes the networks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from typing_extensions import Self, Unpack

from ditforge.arguments import bound
from ditforge.client.address import DEFAULT_URL
from ditforge.client.answer import Arrays
from ditforge.client.calls import Calls
from ditforge.client.connection import Connection
from ditforge.client.decoding import Pixels, decode
from ditforge.client.guidance import guided
from ditforge.client.noise import BatchNoise
from ditforge.client.options import GenerateOptions, Options, check_callback, make_options
from ditforge.client.picture_file import METADATA_KEY
from ditforge.client.request import Request, make_request
from ditforge.client.samplers import SAMPLERS, Array, Callback, Denoise, Noise, find_sampler, sampler_name
from ditforge.client.settings import ConnectionSettings, Settings, make_settings
from ditforge.client.told import warn
from ditforge.contract import DIT, TEXT_ENCODERS, TEXT_ENCODERS_CLIP, VAE_DECODER
from ditforge.errors import DitforgeError, UserError
from ditforge.model import Model


class Client:
    """A connection to the server at `url` (its gRPC port, HOST:PORT), or to several servers: a list of addresses.

    Several servers must serve the same engines. Each picture begins at the next server, and goes on at another one if
    that server fails. A server that cannot be used causes a warning, as long as another one can be used. The client is
    also a context manager that closes the connection. Settings, by name:

    timeout (1800 seconds): how long a picture may take, from its first call to its last.
    connect_timeout (10 seconds): how long to wait for a server that does not answer, or is still starting. A server
        that refuses connections is given up sooner.
    step_timeout (300 seconds): how long a server may take for one call (the text encoders, a step, the VAE).
    retry_timeout (60 seconds): how long a failed call is repeated, counted from its first failure; with 0, each server
        gets one try.
    keepalive (10 seconds): how often a server that is busy with a call is asked whether it is alive.
    keepalive_timeout (10 seconds): how long it may take to answer that question.
    token (None): a bearer token that is sent with every call; without TLS, others on the network can read it.
    tls (None): a ditforge.client.TLS with the files of an encrypted connection; TLS() trusts public authorities.
    headers (none): a mapping of lower-case names to values, sent with every call as gRPC metadata, e.g. for a proxy. A
        value is ASCII text, or bytes if the name ends in -bin.

    `url` can also be a ditforge.client.ConnectionSettings, which has addresses and settings. Settings given by name
    replace those in it. Clients that are given the same object share their connections.

    Raises UserError for invalid settings, and if no server with a model made by ditforge answers. Raises DitforgeError
    if no server becomes ready in time.
    """

    @bound
    def __init__(
        self, url: str | Sequence[str] | ConnectionSettings = DEFAULT_URL, **settings: Unpack[Settings]
    ) -> None:
        self._connection = Connection(make_settings(url, **settings)).connect()

    @classmethod
    def _over(cls, connection: Connection) -> Self:
        """Make a client of a connection that the caller has connected, as AsyncClient does."""
        client = cls.__new__(cls)
        client._connection = connection
        return client

    @property
    def model(self) -> Model:
        """The model as the server describes it: sizes, default steps, guidance, …"""
        return self._connection.model

    @overload
    def generate(
        self, prompt: str, options: GenerateOptions | None = None, **keywords: Unpack[Options]
    ) -> Image.Image: ...
    @overload
    def generate(
        self, prompt: list[str], options: GenerateOptions | None = None, **keywords: Unpack[Options]
    ) -> list[Image.Image]: ...

    @bound
    def generate(
        self, prompt: str | list[str], options: GenerateOptions | None = None, **keywords: Unpack[Options]
    ) -> Image.Image | list[Image.Image]:
        """Make a picture for a prompt, or a list of pictures, as one batch, for a list of prompts.

        Prompt number i gets the seed `seed` + i, or its own if `seed` is a list. Each picture is the same as if it were
        made alone, and has its parameters in `info`. Options are given as a GenerateOptions, as its fields by keyword,
        or as both; a keyword then counts. GenerateOptions says what each option means. There is one more keyword:

        callback: called once a step with a ditforge.client.Step, for a progress bar or a preview.

        Raises UserError for an option that the model cannot take. Raises DitforgeError if servers fail for longer than
        calls are repeated, if a server's answer does not fit the request, or if the picture is not finished in time.
        """
        images = self._generate([prompt] if isinstance(prompt, str) else prompt, options, keywords)
        return images[0] if isinstance(prompt, str) else images

    def _generate(self, prompts: list[str], options: GenerateOptions | None, keywords: Options) -> list[Image.Image]:
        made, callback = make_options(options, keywords)
        calls = self._connection.begin()
        return run(calls, make_request(calls.model, prompts, made), callback)

    def run_request(
        self, request: Request, callback: Callback | None = None, deadline: float | None = None
    ) -> list[Image.Image]:
        """The pictures of a request that ditforge.client.request.make_request has made for this client's model.

        Each carries its parameters in `info`. `callback` is called once a step with a ditforge.client.Step. `deadline`,
        of time.monotonic, is when they have to be finished, by default within the setting `timeout`; it lets several
        requests share that time. Raises as `generate` does.
        """
        check_callback(callback)
        if not isinstance(request, Request):
            problem = f"a request is a Request of ditforge.client.request, got {request!r}"
            raise UserError(problem, "make_request(client.model, prompts, options)")
        return run(self._connection.begin(deadline), request, callback)

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
    """Make the pictures of a request with the text encoders, the sampler loop and the VAE decoder.

    Each picture has its parameters in `info`. Raises DitforgeError if a network returns NaN or infinity. Warns if calls
    had to be repeated, and if a picture has a single colour.
    """
    model = calls.model
    text, negative = encode(calls, request)
    shape = model.latent_channels, request.height // model.vae_factor, request.width // model.vae_factor
    sigmas = np.array(request.sigmas, np.float32)

    def evaluate(inputs: Mapping[str, NDArray[Any]]) -> Array:
        # Heun's method also evaluates the velocity at the end of a step. It is counted as part of the next step here.
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
        if has_one_colour(pixels[index]):
            # The last node of the decoder turns NaN into a pixel value, so a single colour is the only sign of NaN.
            which = f"picture {index + 1} of {len(images)}" if len(images) > 1 else "the picture"
            warn(f"{which} is of one colour everywhere, {image.getpixel((0, 0))}: vae_decoder may have failed")
    if calls.repeated:
        warn(calls.repeated)
    return images


def has_one_colour(picture: Pixels) -> bool:
    """Whether all pixels of a picture, uint8 [H, W, 3], are equal. A few are compared first, and mostly differ."""
    return bool((picture[::16, ::16] == picture[0, 0]).all() and (picture == picture[0, 0]).all())


def sample(request: Request, denoise: Denoise, noise: Noise, callback: Callback | None) -> Array:
    """Run the request's sampler from noise. Returns latents, float32 [B, C, h, w].

    Raises UserError if a user's own sampler does not return latents of that shape, and DitforgeError if they are not
    finite.
    """
    latents = noise()
    sigmas = np.array(request.sigmas, np.float32)
    made = find_sampler(request.sampler)(denoise, latents, sigmas, noise, callback, **request.sampler_options)
    if not isinstance(made, np.ndarray) or made.shape != latents.shape or made.dtype.kind != "f":
        what = f"{made.dtype} {list(made.shape)}" if isinstance(made, np.ndarray) else type(made).__name__
        problem = f"the sampler {sampler_name(request.sampler)} returned {what}"
        raise UserError(problem, f"return latents, float32 {list(latents.shape)}")
    name = sampler_name(request.sampler)
    check_finite(made, "latents", f"the sampler {name}", "" if name in SAMPLERS else f"look into the sampler {name}")
    return made.astype(np.float32, copy=False)


def check_finite(array: Array, tensor: str, where: str, fix: str = "") -> None:
    """Raise DitforgeError if `array`, the output of a network or sampler, has a NaN or an infinity in it.

    `fix` is what to do if it is not the engines that have to be looked into.
    """
    broken = array.size - np.count_nonzero(np.isfinite(array))
    if broken:
        problem = f"{tensor} is not finite (NaN or infinity) in {broken} of {array.size} elements: {where}"
        engines = "ditforge verify ENGINE_DIR --against ONNX_DIR   or export in another --precision"
        raise DitforgeError(problem, fix or engines)


def encode(calls: Calls, request: Request) -> tuple[Arrays, Arrays | None]:
    """Encode the prompts, and the negative prompt if classifier-free guidance is on (otherwise None).

    Each of the two has `prompt_embeds` [N, T, D] and, if the model has them, `pooled_embeds` [N, P], for N prompts. A
    text that occurs more than once is encoded once.
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
    """Return `prompt_embeds` and `pooled_embeds` of the prompts. Warns once if a text encoder cuts a long prompt."""
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
