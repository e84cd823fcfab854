"""What a transformer's training steps see: encoded pictures with their captions' ids, and noised batches of them.

Nothing here knows a family: the text encoders are a function from captions to ids, the latents are as the autoencoder
makes them.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from training import Budget, Size, draw_pool, encode_pool
from transformers import PreTrainedTokenizerBase
from vocabulary import T5_LENGTH

# The first size is the model's own; the others share a tenth of the steps.
SIZES: tuple[Size, ...] = ((128, 128), (96, 160), (160, 96), (160, 160), (96, 96), (128, 192), (192, 128), (256, 256))
LONG_TEXT = (128, 256, 512)  # token lengths beside 64 that a pipeline may pad T5's input to
LONG_TEXT_SHARE = 0.03
MAIN_SHARE = 0.9  # share of the batches of the first size
DROPOUT = 0.1  # share of prompts replaced by the empty one

Ids = tuple[torch.Tensor, ...]  # int32 [N, length] of every text encoder, T5's last
Tokenize = Callable[[Sequence[str]], Ids]


@dataclass(frozen=True)
class Examples:
    """Encoded pictures of one size: latents [N, 16, h, w] float16, mean 0 and spread 1, and their captions' ids."""

    latents: torch.Tensor
    ids: Ids


@dataclass(frozen=True)
class Kind:
    """What shapes a batch has: the index of its size in SIZES, and the tokens that T5's input is padded to."""

    size: int
    length: int


USUAL = Kind(0, T5_LENGTH)


@dataclass(frozen=True)
class Noised:
    """A batch as a training step sees it: noisy = (1 - sigma) latents + sigma noise, velocity = noise - latents."""

    noisy: torch.Tensor
    velocity: torch.Tensor
    timestep: torch.Tensor  # sigma [B], as the transformer is told
    ids: Ids


def padded_ids(tokenizer: PreTrainedTokenizerBase, captions: Sequence[str], length: int) -> torch.Tensor:
    """Ids [N, length] int32, padded as the pipelines pad them. Raises ValueError for a caption of more tokens."""
    ids = tokenizer(list(captions), max_length=length, padding="max_length", return_tensors="pt").input_ids
    if ids.shape[1] > length:
        raise ValueError(f"a caption has {ids.shape[1]} tokens, more than {length}")
    return ids.int()


def encode_examples(
    autoencoder: AutoencoderKL, tokenize: Tokenize, count: int, size: Size, seed: int, device: torch.device
) -> Examples:
    """Draws, captions and encodes `count` pictures; they stay on the device."""
    pool = draw_pool(count, size, seed, device)
    config = autoencoder.config
    latents = (encode_pool(autoencoder, pool.pixels).float() - config.shift_factor) * config.scaling_factor
    return Examples(latents.half(), tokenize(pool.captions))


def encode_all(
    autoencoder: AutoencoderKL, tokenize: Tokenize, budget: Budget, seed: int, device: torch.device
) -> list[Examples]:
    """Examples of every size of SIZES, the first the most."""
    others = max(4, budget.pictures // 32)
    return [
        encode_examples(autoencoder, tokenize, others if i else budget.pictures, size, seed + 100 + i, device)
        for i, size in enumerate(SIZES)
    ]


def sample_sigmas(count: int, shift: float, device: torch.device) -> torch.Tensor:
    """Noise levels [count]: three in four logit-normal (Esser et al. 2024, arXiv:2403.03206), the rest uniform.

    The mean of the logit is log(shift), where the sampler's schedule is densest, and 0.9: what flat scenes of few
    tokens show is decided at high noise, and only there does the prompt matter.
    """
    logit_normal = torch.sigmoid(torch.randn(count, device=device) + math.log(shift) + 0.9)
    uniform = torch.rand(count, device=device)
    return torch.where(torch.rand(count, device=device) < 0.75, logit_normal, uniform)


def draw_kind(rng: random.Random) -> Kind:
    """The first size and the usual length of text in most cases; never both unusual."""
    if rng.random() >= MAIN_SHARE:
        return Kind(rng.randrange(1, len(SIZES)), T5_LENGTH)
    return Kind(0, rng.choice(LONG_TEXT)) if rng.random() < LONG_TEXT_SHARE else USUAL


def image_tokens(latents: torch.Tensor) -> int:
    """Tokens of a picture: patches of 2 by 2 latents [.., h, w]."""
    return latents.shape[-2] * latents.shape[-1] // 4


def pad_text(ids: Ids, length: int) -> Ids:
    """T5's ids padded to `length`; the others as they are."""
    return (*ids[:-1], F.pad(ids[-1], (0, length - T5_LENGTH)))


def draw_batch(
    examples: Sequence[Examples], kind: Kind, batch: int, empty: Ids, shift: Callable[[int], float]
) -> Noised:
    """A batch of this kind with prompt dropout; smaller where its pictures or its padded text are longer.

    `empty` holds the ids [1, length] of the empty prompt; `shift` is the schedule's at a number of image tokens.
    """
    chosen, device = examples[kind.size], examples[0].latents.device
    tokens, usual = image_tokens(chosen.latents), image_tokens(examples[0].latents) + T5_LENGTH
    count = max(1, min(batch, batch * usual // (tokens + kind.length)))
    rows = torch.randint(len(chosen.latents), (count,), device=device)
    latents = chosen.latents[rows].float()
    noise = torch.randn_like(latents)
    sigma = sample_sigmas(count, shift(tokens), device)
    dropped = torch.rand(count, 1, device=device) < DROPOUT
    ids = tuple(torch.where(dropped, nothing, some[rows]) for nothing, some in zip(empty, chosen.ids, strict=True))
    # A pipeline in bfloat16 rounds the timestep to eight bits: a quarter of the batch is told the rounded one.
    rounded = (sigma * 1000).bfloat16().float() / 1000
    return Noised(
        noisy=torch.lerp(latents, noise, sigma[:, None, None, None]),
        velocity=noise - latents,
        timestep=torch.where(torch.rand_like(sigma) < 0.25, rounded, sigma),
        ids=pad_text(ids, kind.length),
    )
