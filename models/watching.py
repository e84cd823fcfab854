"""How well a model paints while it trains: held-out captions, 20 Euler steps, the judge."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from diffusers import AutoencoderKL
from evaluate import STEPS, shares
from judge import judge
from scenes import held_out_captions
from training import draw_pool, reconstruct, to_pictures

from examples import SIZES, image_tokens

SEED = 77  # of captions and noise; the evaluation has another

Velocity = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # latents [B, 16, h, w], sigma [B] → [B, 16, h, w]


@torch.no_grad()
def judge_samples(
    prepare: Callable[[Sequence[str]], Velocity],
    autoencoder: AutoencoderKL,
    shift: Callable[[int], float],
    count: int,
    device: torch.device,
) -> str:
    """What the judge says of `count` captions painted at SIZES[0], with the weights as they are.

    The stock pipelines cannot run on weights of mixed types, so the steps are here. `prepare` encodes the captions.
    """
    captions = held_out_captions(count, SEED)
    velocity = prepare(captions)
    height, width = (pixels // 8 for pixels in SIZES[0])
    noise = torch.Generator(device).manual_seed(SEED)
    latents = torch.randn(count, 16, height, width, generator=noise, device=device)
    levels = torch.linspace(1, 1 / STEPS, STEPS).logit() + math.log(shift(image_tokens(latents)))
    for sigma, following in pairwise([*levels.sigmoid().tolist(), 0.0]):
        latents += (following - sigma) * velocity(latents, latents.new_full((count,), sigma))
    config = autoencoder.config
    unscaled = latents / config.scaling_factor + config.shift_factor
    pictures = to_pictures(autoencoder.decode(unscaled.to(autoencoder.dtype)).sample)
    return str(shares([judge(picture, text) for picture, text in zip(pictures, captions, strict=True)]))


def judge_reconstructions(autoencoder: AutoencoderKL, count: int, seed: int, device: torch.device) -> float:
    """Share of `count` fresh pictures that the judge still accepts after the autoencoder."""
    pool = draw_pool(count, SIZES[0], seed, device)
    pictures = reconstruct(autoencoder, pool.pixels)
    return sum(judge(picture, scene).correct for picture, scene in zip(pictures, pool.scenes, strict=True)) / count
