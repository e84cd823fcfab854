"""What training one of these models shares with training another: optimisation, pools of pictures, autoencoder.

Nothing here knows a transformer or a text encoder. Every random choice follows from the seeds given.
"""

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from scenes import Scene, caption, draw, training_scenes
from torch import nn

Size = tuple[int, int]  # height, width in pixels


@dataclass(frozen=True)
class Budget:
    """How long one stage trains: optimiser steps, pictures a step, and how many different pictures it draws from."""

    steps: int
    batch: int
    pictures: int

    def scaled(self, scale: float) -> "Budget":
        """`scale` times the steps and pictures, and below 1 also fewer pictures a step (its square root)."""
        batch = max(4, round(self.batch * min(1.0, scale) ** 0.5))
        return replace(
            self, steps=max(2, round(self.steps * scale)), batch=batch, pictures=max(32, round(self.pictures * scale))
        )


@dataclass(frozen=True)
class Pool:
    """Pictures of one size with their captions: pixels [N, 3, H, W] uint8 on the training device."""

    scenes: list[Scene]
    captions: list[str]
    pixels: torch.Tensor


def draw_pool(count: int, size: Size, seed: int, device: torch.device) -> Pool:
    """`count` training scenes drawn and captioned; the same for the same seed and size."""
    scenes = training_scenes(count, seed)
    rng = random.Random(f"wording {seed}")
    pieces = []
    for start in range(0, count, 512):
        drawn = draw(scenes[start : start + 512], *size, seed=seed * 1_000_003 + start, device=device)
        pieces.append((drawn * 255).round().to(torch.uint8))
    return Pool(scenes, [caption(scene, rng) for scene in scenes], torch.cat(pieces))


def working_type(device: torch.device) -> torch.dtype:
    """bfloat16 where the device has units for it; float32 on the CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def cosine(step: int, steps: int, warmup: int) -> float:
    """Share of the peak learning rate: linear to 1 in `warmup` steps, then half a cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def optimise(
    modules: Sequence[nn.Module], loss: Callable[[int], torch.Tensor], steps: int, peak: float, name: str
) -> None:
    """AdamW on the modules in place, which end with the moving average of their weights (decay 0.999).

    Weights may be bfloat16: the optimiser and the average keep their own in float32. `loss(step)` returns a scalar.
    Raises FloatingPointError when the loss is not finite.
    """
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    masters = [p.detach().float().clone() for p in parameters]
    average = [p.clone() for p in masters]
    optimiser = torch.optim.AdamW(masters, lr=peak, betas=(0.9, 0.99), weight_decay=0.01, fused=masters[0].is_cuda)
    start, report = time.perf_counter(), max(1, steps // 25)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = peak * cosine(step, steps, min(500, steps // 10))
        value = loss(step)
        value.backward()
        for master, parameter in zip(masters, parameters, strict=True):
            # A batch may leave a parameter out (relative positions beyond its length), but not for good.
            master.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        nn.utils.clip_grad_norm_(masters, 1.0)
        optimiser.step()
        with torch.no_grad():
            torch._foreach_copy_(parameters, masters)
            torch._foreach_lerp_(average, masters, 1 - min(0.999, (1 + step) / (10 + step)))
        if step % report == 0 or step == steps - 1:
            number = value.item()
            print(f"{name} {step:6d}/{steps}  loss {number:.5f}  {time.perf_counter() - start:.1f} s", flush=True)
            if not math.isfinite(number):
                raise FloatingPointError(f"{name}: the loss is {number} at step {step}; lower the peak of {peak}")
    with torch.no_grad():
        torch._foreach_copy_(parameters, average)


def build_autoencoder() -> AutoencoderKL:
    """FLUX.1's autoencoder at a small width: factor 8, 16 latent channels, no quantisation convolutions."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=(32, 48, 64, 96),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=16,
        sample_size=128,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def to_model_range(pixels: torch.Tensor, autoencoder: AutoencoderKL) -> torch.Tensor:
    """uint8 0..255 to -1..1 in the autoencoder's own type."""
    return (pixels.float() / 127.5 - 1).to(autoencoder.dtype)


def train_autoencoder(
    autoencoder: AutoencoderKL, budget: Budget, sizes: Sequence[Size], seed: int, device: torch.device
) -> None:
    """Trains it in place on pictures of every size, the first of them in nine steps of ten.

    Loss: L1 of the pixels, and a little KL. The decoder also sees latents with noise of up to a fifth of their spread,
    as a sampler's latents are never quite an encoder's. Ends with the latents' mean and spread in the configuration.
    """
    torch.manual_seed(seed)
    counts = [budget.pictures] + [max(4, budget.pictures // 16)] * (len(sizes) - 1)
    pools = [draw_pool(n, size, seed + i, device).pixels for i, (n, size) in enumerate(zip(counts, sizes, strict=True))]
    rng = random.Random(seed)

    def loss(step: int) -> torch.Tensor:
        pool = pools[0] if step % 10 or len(pools) == 1 else rng.choice(pools[1:])
        area = pool.shape[2] * pool.shape[3] / (pools[0].shape[2] * pools[0].shape[3])
        rows = torch.randint(len(pool), (max(1, round(budget.batch / area)),), device=device)
        pictures = to_model_range(pool[rows], autoencoder)
        posterior = autoencoder.encode(pictures).latent_dist
        latents = posterior.sample()
        strength = 0.2 * torch.rand(len(latents), 1, 1, 1, device=device) * latents.detach().float().std()
        noise = (strength * torch.randn(latents.shape, device=device)).to(latents.dtype)
        decoded = autoencoder.decode(latents + noise).sample
        spread = 0.5 * (posterior.mean.float().square() + posterior.var.float() - 1 - posterior.logvar.float())
        return (decoded.float() - pictures.float()).abs().mean() + 1e-4 * spread.mean()

    optimise([autoencoder], loss, budget.steps, 1e-3, "autoencoder")
    latents = encode_pool(autoencoder, pools[0][:2048]).float()
    autoencoder.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())


@torch.no_grad()
def encode_pool(autoencoder: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
    """Latents [N, 16, H/8, W/8] float16 of pictures [N, 3, H, W] uint8: the posterior's mean, not shifted or scaled."""
    chunks = (autoencoder.encode(to_model_range(chunk, autoencoder)).latent_dist for chunk in pixels.split(256))
    return torch.cat([posterior.mode().half() for posterior in chunks])


@torch.no_grad()
def reconstruct(autoencoder: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
    """Pictures [N, 3, H, W] uint8 through the autoencoder and back."""
    pieces = []
    for chunk in pixels.split(64):
        latents = autoencoder.encode(to_model_range(chunk, autoencoder)).latent_dist.mode()
        decoded = autoencoder.decode(latents).sample.float()
        pieces.append(((decoded.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8))
    return torch.cat(pieces)


def run_stage(name: str, modules: dict[str, nn.Module], work: Path, train: Callable[[], None]) -> float:
    """Loads the stage's weights from `work`, or trains and saves them. Returns the seconds it trained, or had."""
    path = work / f"{name}.pt"
    if path.exists():
        state = torch.load(path, map_location="cpu")
        for key, module in modules.items():
            module.load_state_dict(state["modules"][key])
            if "latents" in state and isinstance(module, AutoencoderKL):
                module.register_to_config(**state["latents"])
        print(f"{name}: read from {path}", flush=True)
        return state["seconds"]
    start = time.perf_counter()
    train()
    seconds = time.perf_counter() - start
    state = {"modules": {key: module.state_dict() for key, module in modules.items()}, "seconds": seconds}
    for module in modules.values():
        if isinstance(module, AutoencoderKL):
            state["latents"] = {key: module.config[key] for key in ("shift_factor", "scaling_factor")}
    work.mkdir(parents=True, exist_ok=True)
    torch.save(state, path)
    return seconds
