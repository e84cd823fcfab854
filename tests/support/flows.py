"""Models that are functions, for samplers: a velocity with curvature, and flows whose end is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from ditforge.client.samplers import Array, find_sampler
from ditforge.model import Schedule

SD35_SIGMA_MIN = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0).sigma_min
SCHEDULES = {
    "flux.1-dev": Schedule(kind="dynamic"),
    "flux.1-schnell": Schedule(kind="fixed", shift=1.0),
    "sd3.5": Schedule(kind="fixed", shift=3.0, sigma_min=SD35_SIGMA_MIN),
}


def curved(latents: Array, sigma: float) -> Array:
    """A velocity with curvature in both arguments, float32 like its arguments."""
    return (np.sin(2 * latents) - latents * sigma + np.float32(0.3)).astype(np.float32)


def curved_exactly(latents: Array, sigma: float) -> Array:
    """The same in the latents' own precision."""
    return np.sin(2 * latents) - latents * float(sigma) + 0.3


def start(shape: tuple[int, ...] = (2, 4, 8, 6), seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


class Recorded:
    """Noise that a reference can be given too: call number i is the standard normal of seed i."""

    def __init__(self, shape: tuple[int, ...] = (2, 4, 8, 6)) -> None:
        self.shape, self.calls = shape, 0

    def __call__(self) -> Array:
        self.calls += 1
        return self.at(self.calls - 1)

    def at(self, index: int) -> Array:
        return start(self.shape, 1000 + index)


def no_noise() -> Array:
    raise AssertionError("a sampler that adds no noise has asked for some")


def run(name: str, denoise: Callable[..., Array], latents: Array, sigmas: Array, **options: Any) -> Array:
    """A sampler by its name, with recorded noise."""
    noise = options.pop("noise", None) or Recorded(latents.shape)
    callback = options.pop("callback", None)
    return find_sampler(name)(denoise, latents, sigmas, noise, callback, **options)


def diffusers_loop(
    scheduler: Any, latents: Array, sigma_of_timestep: Callable[[int, Any], float], **options: Any
) -> Array:
    """latents through a diffusers scheduler, with `curved` as the model. Options that are functions take the step."""
    scheduler.set_begin_index(0)
    sample = torch.from_numpy(latents)
    for i, timestep in enumerate(scheduler.timesteps):
        velocity = curved(sample.numpy(), np.float32(sigma_of_timestep(i, timestep)))
        given = {key: value(i) if callable(value) else value for key, value in options.items()}
        sample = scheduler.step(torch.from_numpy(velocity), timestep, sample, **given).prev_sample
    return sample.numpy()


def gaussian_velocity(mean: float, deviation: float) -> Callable[[Array, float], Array]:
    """The exact velocity where data is N(mean, deviation^2): the model that a perfect training would give."""

    def velocity(latents: Array, sigma: float) -> Array:
        alpha = 1 - sigma
        gain = alpha * deviation**2 / ((alpha * deviation) ** 2 + sigma**2)
        return (latents - mean - gain * (latents - alpha * mean)) / sigma

    return velocity


def error(name: str, steps: int, shift: float, mean: float = 0.7, deviation: float = 0.4) -> float:
    """How far a sampler ends from the flow's exact end, mean + deviation * noise, in float64."""
    sigmas = np.linspace(1, 0, steps + 1)
    sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
    noise = np.linspace(-2, 2, 9)
    made = run(name, gaussian_velocity(mean, deviation), noise, sigmas, noise=no_noise)
    return float(np.abs(made - (mean + deviation * noise)).max())


# Where samplers and those of ComfyUI were compared: six numbers, a step's noise, and levels, all in float64.
COMFY_START = np.linspace(-2, 2, 6)


class ComfyNoise:
    """The noise of each step in that comparison."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> Array:
        self.calls += 1
        return np.cos(np.arange(6) * 1.7 + self.calls)
