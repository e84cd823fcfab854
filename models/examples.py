"""What flux-tiny's training steps see: encoded pictures with their captions' ids, and noised batches of them."""

import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from flux_tiny import Models
from training import Budget, Size, draw_pool, encode_pool
from vocabulary import CLIP_LENGTH, T5_LENGTH

# The first size is the model's own; the others share a seventh of the steps.
SIZES: tuple[Size, ...] = ((128, 128), (96, 160), (160, 96), (160, 160), (96, 96), (128, 192), (192, 128), (256, 256))
LONG_TEXT = (128, 256, 512)  # token lengths beside 64 that a pipeline may pad T5's input to
LONG_TEXT_SHARE = 0.04
MAIN_SHARE = 0.85  # share of the batches of the first size
DROPOUT = 0.1  # share of prompts replaced by the empty one


@dataclass(frozen=True)
class Examples:
    """Encoded pictures of one size. latents [N, tokens, 64] float16, mean 0 and spread 1; the ids int32."""

    latents: torch.Tensor
    clip_ids: torch.Tensor  # [N, 77]
    t5_ids: torch.Tensor  # [N, 64]
    image_ids: torch.Tensor  # [tokens, 3]


def token_ids(models: Models, captions: list[str], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """CLIP's ids [N, 77] and T5's [N, 64], int32, padded as FluxPipeline pads them."""
    lengths = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    clip_ids = models.tokenizer(captions, max_length=CLIP_LENGTH, **lengths).input_ids
    t5_ids = models.tokenizer_2(captions, max_length=T5_LENGTH, **lengths).input_ids
    return clip_ids.int().to(device), t5_ids.int().to(device)


def encode_examples(models: Models, count: int, size: Size, seed: int, device: torch.device) -> Examples:
    """Draws, captions and encodes `count` pictures; they stay on the device."""
    pool = draw_pool(count, size, seed, device)
    config = models.vae.config
    latents = ((encode_pool(models.vae, pool.pixels).float() - config.shift_factor) * config.scaling_factor).half()
    rows, columns = latents.shape[2] // 2, latents.shape[3] // 2
    packed = FluxPipeline._pack_latents(latents, count, 16, 2 * rows, 2 * columns)
    image_ids = FluxPipeline._prepare_latent_image_ids(1, rows, columns, device, torch.float32)
    return Examples(packed, *token_ids(models, pool.captions, device), image_ids)


def encode_all(models: Models, budget: Budget, seed: int, device: torch.device) -> list[Examples]:
    """Examples of every size of SIZES, the first the most."""
    others = max(4, budget.pictures // 16)
    return [
        encode_examples(models, budget.pictures if i == 0 else others, size, seed + 100 + i, device)
        for i, size in enumerate(SIZES)
    ]


def sample_sigmas(count: int, tokens: int, device: torch.device) -> torch.Tensor:
    """Noise levels [count]: four in five logit-normal (Esser et al. 2024, arXiv:2403.03206), the others uniform.

    The mean of the logit is the shift that FluxPipeline applies to the schedule at this number of image tokens, and a
    half: flat scenes of few tokens are decided at high noise.
    """
    logit_normal = torch.sigmoid(torch.randn(count, device=device) + calculate_shift(tokens) + 0.5)
    uniform = torch.rand(count, device=device)
    return torch.where(torch.rand(count, device=device) < 0.8, logit_normal, uniform)


@dataclass(frozen=True)
class Noised:
    """A batch as a training step sees it: noisy = (1 - sigma) latents + sigma noise, velocity = noise - latents."""

    noisy: torch.Tensor
    velocity: torch.Tensor
    timestep: torch.Tensor
    clip_ids: torch.Tensor
    t5_ids: torch.Tensor
    image_ids: torch.Tensor
    is_usual: bool  # the first size, and text of the usual length


def draw_batch(
    examples: list[Examples], batch: int, empty: tuple[torch.Tensor, torch.Tensor], rng: random.Random
) -> Noised:
    """A batch of one size with prompt dropout; smaller where its pictures or its padded text are longer."""
    chosen = examples[0] if rng.random() < MAIN_SHARE else rng.choice(examples[1:])
    tokens, device = chosen.latents.shape[1], chosen.latents.device
    length = rng.choice(LONG_TEXT) if rng.random() < LONG_TEXT_SHARE else T5_LENGTH
    usual = examples[0].latents.shape[1] + T5_LENGTH
    count = max(1, min(batch, batch * usual // (tokens + length)))
    rows = torch.randint(len(chosen.latents), (count,), device=device)
    latents = chosen.latents[rows].float()
    noise = torch.randn_like(latents)
    sigma = sample_sigmas(count, tokens, device)
    dropped = torch.rand(count, 1, device=device) < DROPOUT
    clip_ids = torch.where(dropped, empty[0], chosen.clip_ids[rows])
    t5_ids = torch.where(dropped, empty[1], chosen.t5_ids[rows])
    # A pipeline in bfloat16 rounds the timestep to eight bits: a quarter of the batch is told the rounded one.
    rounded = (sigma * 1000).bfloat16().float() / 1000
    timestep = torch.where(torch.rand_like(sigma) < 0.25, rounded, sigma)
    level = sigma[:, None, None]
    noisy = torch.lerp(latents, noise, level)
    return Noised(
        noisy=noisy,
        velocity=noise - latents,
        timestep=timestep,
        clip_ids=clip_ids,
        t5_ids=F.pad(t5_ids, (0, length - T5_LENGTH)),
        image_ids=chosen.image_ids,
        is_usual=chosen is examples[0] and length == T5_LENGTH,
    )
