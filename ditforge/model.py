"""What a client must know of a model: it rides in the manifests and in the parameters of the `dit` model's config."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

LEAST_TILE = 16  # latents: of a smaller tile, most would be overlap
TILED = ("vae_decoder", "vae_encoder")


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Schedule(_Record):
    """How a model spaces its noise levels.

    N levels fall evenly from 1 to sigma_min (None: 1 / N). Each s is then shifted towards noise, to
    a s / (1 + (a - 1) s) (Esser et al. 2024, arXiv:2403.03206, section 5.3.2). kind "fixed": a is `shift`. kind
    "dynamic": mu goes linearly from base_shift at base_tokens image tokens to max_shift at max_tokens, and on beyond;
    a is exp(mu) (time_shift "exponential") or mu ("linear"). A token is patch_size x patch_size latent cells.

    sigma_min is for models whose pipeline leaves the spacing to diffusers' FlowMatchEulerDiscreteScheduler: it is that
    scheduler's own `sigma_min`, which with a fixed shift is already shifted once.
    """

    kind: Literal["fixed", "dynamic"]
    shift: float = 1.0
    sigma_min: float | None = None
    time_shift: Literal["exponential", "linear"] = "exponential"
    base_tokens: int = 256
    max_tokens: int = 4096
    base_shift: float = 0.5
    max_shift: float = 1.15
    patch_size: int = 2


class SkipLayers(_Record):
    """Skip-layer guidance as a model's authors recommend it: what `scale` does is in ditforge.client.guidance.

    The DiT runs once more without the blocks `layers` (of `blocks`, which is the width of its input `skip_layers`), in
    the steps i of N with start * N < i < stop * N.
    """

    blocks: int
    layers: tuple[int, ...]
    scale: float
    start: float
    stop: float


class Model(_Record):
    """A text-to-image model, as far as the sampler loop is concerned.

    Sizes are in pixels; where `sizes` has any, these (height, width) are the only ones. `guidance` says what the number
    that users call guidance does: `embedded` is an input of the DiT (guidance-distilled models), `classifier-free` the
    scale of classifier-free guidance, and `none` means that the model takes none. `skip_layers` is there where the DiT
    has an input of that name. `max_tokens` is how much of a prompt each text encoder reads, special tokens included, in
    the order of the tokenizer's counts. `t5` says whether T5 can be left out of a request (`optional`: then zeros take
    its place), cannot (`required`), or is not there (`absent`). `vae_tile` is the side, in pixels, of
    the largest piece of a picture that the autoencoder's networks take at once; None: they take whole pictures.
    """

    name: str
    latent_channels: int
    vae_factor: int
    size_multiple: int
    default_size: int
    max_size: int
    min_size: int = 1
    sizes: tuple[tuple[int, int], ...] = ()
    default_steps: int
    guidance: Literal["embedded", "classifier-free", "none"]
    default_guidance: float
    skip_layers: SkipLayers | None = None
    schedule: Schedule
    max_tokens: dict[str, int]
    t5: Literal["required", "optional", "absent"] = "required"
    vae_tile: int | None = None

    def piece(self, network: str, height: int, width: int) -> tuple[int, int]:
        """How much of a picture of that height and width the network called `network` takes at once, in pixels."""
        if self.vae_tile is None or network not in TILED:
            return height, width
        return min(height, self.vae_tile), min(width, self.vae_tile)
