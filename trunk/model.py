"""What a client must know about a model. It is in the manifests, and in the configuration of Triton's model `dit`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from typing_extensions import Self

from ditforge.contract import VAE_DECODER, VAE_ENCODER

LEAST_TILE = 16  # the smallest side of a tile in latents; a smaller tile would be mostly overlap
TILED = (VAE_DECODER, VAE_ENCODER)
MOST_PIXELS = 1 << 17  # the largest side of a picture
MAX_BATCH = 128  # samples in one call
MAX_STEPS = 1000
# Characters of a prompt. Tokenizers take seconds for longer ones, and no text encoder reads a tenth of them.
MAX_CHARACTERS = 32_000
# Bounds that hold for every model. A file or a server may claim anything, and the program computes with these numbers
# and allocates memory by them.
Count = Annotated[int, Field(gt=0, le=1 << 20)]
Pixels = Annotated[int, Field(gt=0, le=MOST_PIXELS)]
Factor = Annotated[int, Field(gt=0, le=1024)]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, le=1000)]
Scale = Annotated[float, Field(ge=0, le=1000)]
Shift = Annotated[float, Field(ge=-100, le=100)]
MOST_MU = 100.0  # this means e^100 times as much noise as data


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Schedule(_Record):
    """How a model spaces its noise levels.

    N levels fall evenly from 1 to sigma_min, or to 1 / N if that is None. Each level s is then shifted towards noise,
    to a s / (1 + (a - 1) s) (Esser et al. 2024, arXiv:2403.03206, section 5.3.2).

    If kind is "fixed", a is `shift`. If kind is "dynamic", a depends on the number of image tokens. mu is linear in
    this number: base_shift at base_tokens, max_shift at max_tokens, and on the same line beyond. a is exp(mu) if
    time_shift is "exponential", and mu if it is "linear". A token stands for patch_size x patch_size latents.

    sigma_min is for models whose pipeline leaves the spacing to diffusers' FlowMatchEulerDiscreteScheduler. It is that
    scheduler's own `sigma_min`, which with a fixed shift has been shifted once already.
    """

    kind: Literal["fixed", "dynamic"]
    shift: Positive = 1.0
    sigma_min: Annotated[float, Field(gt=0, lt=1)] | None = None
    time_shift: Literal["exponential", "linear"] = "exponential"
    base_tokens: Count = 256
    max_tokens: Count = 4096
    base_shift: Shift = 0.5
    max_shift: Shift = 1.15
    patch_size: Factor = 2

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.base_tokens >= self.max_tokens:
            raise ValueError(f"base_tokens must be below max_tokens, got {self.base_tokens} and {self.max_tokens}")
        return self

    def mu(self, tokens: int) -> float:
        """The mu of a dynamic schedule for a picture of that many image tokens."""
        slope = (self.max_shift - self.base_shift) / (self.max_tokens - self.base_tokens)
        return tokens * slope + (self.base_shift - slope * self.base_tokens)


class SkipLayers(_Record):
    """Skip-layer guidance as a model's authors recommend it. ditforge.client.guidance says what `scale` does.

    In the steps i of N with start * N < i < stop * N, the DiT also runs without the blocks whose numbers are in
    `layers`. `blocks` is the number of all blocks, which is the width of the DiT's input `skip_layers`.
    """

    blocks: Annotated[int, Field(gt=0, le=10_000)]
    layers: tuple[Annotated[int, Field(ge=0)], ...]
    scale: Scale
    start: Share
    stop: Share

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.layers and max(self.layers) >= self.blocks:
            raise ValueError(f"there are {self.blocks} blocks, and no layer {max(self.layers)}")
        return self


class Model(_Record):
    """What the sampler loop needs to know about a text-to-image model. Sizes are in pixels.

    vae_factor: the pixels, in height and in width, for which one latent stands.
    size_multiple: heights and widths must be multiples of it.
    sizes: if not empty, these (height, width) are the only sizes.
    guidance: what the number does that users call guidance: `embedded`, it is an input of the DiT (guidance-distilled
        models); `classifier-free`, it is the scale of classifier-free guidance; `none`, the model takes none.
    skip_layers: given if the DiT has an input of that name.
    max_tokens: the most tokens of a prompt that each text encoder reads, special tokens included, in the order in which
        the tokenizer counts them.
    t5: `optional`, T5 can be left out of a request, and zeros take its place; `required`, it cannot; `absent`, there is
        no T5.
    vae_tile: the side of the largest piece of a picture that the autoencoder's networks take at once, or None if they
        take whole pictures.
    """

    name: Annotated[str, Field(max_length=1000)]
    latent_channels: Factor
    vae_factor: Factor
    size_multiple: Pixels
    default_size: Pixels
    max_size: Pixels
    min_size: Pixels = 1
    sizes: tuple[tuple[Pixels, Pixels], ...] = ()
    default_steps: Annotated[int, Field(gt=0, le=MAX_STEPS)]
    guidance: Literal["embedded", "classifier-free", "none"]
    default_guidance: Scale
    skip_layers: SkipLayers | None = None
    schedule: Schedule
    max_tokens: dict[str, Count]
    t5: Literal["required", "optional", "absent"] = "required"
    vae_tile: Pixels | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.size_multiple % self.vae_factor:
            problem = f"size_multiple must be divisible by vae_factor, got {self.size_multiple} and {self.vae_factor}"
            raise ValueError(problem)
        for side in (side for size in self.sizes for side in size if side % self.vae_factor):
            raise ValueError(f"sizes must be divisible by vae_factor, {self.vae_factor}, got {side}")
        sides = max(self.min_size, self.size_multiple), max(self.max_size, self.default_size)
        for side in sides if self.schedule.kind == "dynamic" else ():
            mu = self.schedule.mu((side // self.vae_factor // self.schedule.patch_size) ** 2)
            if abs(mu) > MOST_MU or (self.schedule.time_shift == "linear" and mu <= 0):
                raise ValueError(f"a picture of {side} pixels has no noise levels: mu is {mu:g}")
        return self

    def piece(self, network: str, height: int, width: int) -> tuple[int, int]:
        """The (height, width), in pixels, of the piece of a picture of that size that a network takes at once.

        `network` is the name of the network, such as vae_decoder.
        """
        if self.vae_tile is None or network not in TILED:
            return height, width
        return min(height, self.vae_tile), min(width, self.vae_tile)
