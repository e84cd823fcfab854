"""`Client`: prompts in, pictures out. The sampler loop runs here, each step in a server."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from types import TracebackType
from typing import TypedDict, overload

import numpy as np
from PIL import Image
from typing_extensions import Self, Unpack

from ditforge.client.address import DEFAULT_URL
from ditforge.client.answer import Arrays
from ditforge.client.calls import Calls
from ditforge.client.connection import Connection
from ditforge.client.decoding import Pixels, decode
from ditforge.client.guidance import guided
from ditforge.client.noise import noise
from ditforge.client.picture_file import METADATA_KEY
from ditforge.client.request import T5, Request, make_request
from ditforge.client.sampling import Array, Callback, find_sampler, flow_sigmas
from ditforge.client.settings import ConnectionSettings, Settings, make_settings
from ditforge.client.told import warn
from ditforge.contract import DIT, TEXT_ENCODERS, TEXT_ENCODERS_CLIP, VAE_DECODER
from ditforge.errors import DitforgeError, UserError
from ditforge.model import Model

DEFAULT_SAMPLER = "euler"


class Options(TypedDict, total=False):
    """What `generate` takes beside the prompt; Client.generate says what each means."""

    seed: int | None
    steps: int | None
    height: int | None
    width: int | None
    guidance: float | None
    sampler: str | None
    negative_prompt: str | None
    true_cfg: float | None
    skip_layer_guidance: float | None
    t5: T5 | None
    vae_tile: int | None
    callback: Callback | None


def check_names(options: Options) -> None:
    """Raise UserError, with the nearest name, if there is an option that nobody knows."""
    known = list(Options.__annotations__)
    for name in options:
        if name not in known:
            close = get_close_matches(name, known, n=1)
            fix = f"{close[0]}=…" if close else f"leave it out; there are {', '.join(known)}"
            raise UserError(f"there is no option {name!r}", fix)


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
    def generate(self, prompt: str, **options: Unpack[Options]) -> Image.Image: ...
    @overload
    def generate(self, prompt: list[str], **options: Unpack[Options]) -> list[Image.Image]: ...

    def generate(self, prompt: str | list[str], **options: Unpack[Options]) -> Image.Image | list[Image.Image]:
        """A picture for a prompt, or a list of pictures for a list of prompts, made as one batch.

        The prompt number i gets the seed `seed` + i: each picture is the one that it would be alone. Each carries its
        parameters in `info`. Options, by name; without them, or with None, the model's defaults:

        seed: an integer from 0 to 2^64 - 1; by default random.
        steps: an integer from 1 to 1000.
        height, width: in pixels.
        guidance: how strictly the prompt is followed, for models that take it.
        sampler: "euler" (the default), "heun" or "dpmpp_2m".
        negative_prompt: what the picture should not be; it needs classifier-free guidance above 1, which is `guidance`
            in Stable Diffusion 3.5, and `true_cfg` in FLUX.1.
        true_cfg: the scale of classifier-free guidance in models that have another one built in; by default 1, off.
        skip_layer_guidance: its scale, for models that have it; by default 0, off.
        t5: "always", "never", or "auto" (not for short and plain prompts), for models that can do without T5.
        vae_tile: decode in tiles of that many pixels, which saves the server memory; by default, only as it has to.
        callback: called once a step with a ditforge.client.sampling.Step, for a progress bar or a preview.

        Raises UserError for an option that the model cannot take; DitforgeError if servers fail for longer than calls
        are repeated or answer something else than they were asked, or the picture is not done within its time.
        """
        images = self._generate([prompt] if isinstance(prompt, str) else prompt, options)
        return images[0] if isinstance(prompt, str) else images

    def _generate(self, prompts: list[str], options: Options) -> list[Image.Image]:
        check_names(options)
        calls = self._connection.begin()
        request = make_request(
            calls.model,
            prompts,
            seed=options.get("seed"),
            steps=options.get("steps"),
            height=options.get("height"),
            width=options.get("width"),
            guidance=options.get("guidance"),
            sampler=options.get("sampler") or DEFAULT_SAMPLER,
            negative_prompt=options.get("negative_prompt"),
            true_cfg=options.get("true_cfg"),
            skip_layer_guidance=options.get("skip_layer_guidance"),
            t5=options.get("t5"),
            vae_tile=options.get("vae_tile"),
        )
        return run(calls, request, options.get("callback"))

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
    height, width = request.height // model.vae_factor, request.width // model.vae_factor
    shape = (1, model.latent_channels, height, width)
    latents = np.concatenate([noise(shape, seed) for seed in request.seeds])
    sigmas = flow_sigmas(request.steps, model.schedule, height, width)

    def evaluate(inputs: Mapping[str, np.ndarray]) -> Array:
        # Heun's method evaluates a step's end too, which is where the next one begins, and is called so here.
        begun = int((sigmas[:-1] > inputs["timestep"][0]).sum()) + 1
        step = f"step {begun} of {request.steps}"
        velocity = calls.infer(DIT, inputs, step)["velocity"]
        check_finite(velocity, "velocity", f"dit, {step}")
        return velocity

    def decoder(latents: Array) -> Pixels:
        return calls.infer(VAE_DECODER, {"latents": latents})["image"]

    denoise = guided(evaluate, model, request, sigmas, text, negative)
    latents = find_sampler(request.sampler)(denoise, latents, sigmas, callback)
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


def check_finite(array: np.ndarray, tensor: str, where: str) -> None:
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
