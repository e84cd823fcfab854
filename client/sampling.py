"""From noise to latents: the noise levels of a flow-matching model, and the samplers that walk down them.

A sample at noise level sigma is (1 - sigma) * data + sigma * noise; the model predicts its velocity, noise - data.
A sampler is one function per paper, all of one signature; to add one, write it and name it in SAMPLERS.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import pairwise
from numbers import Integral
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ditforge.client.option import option
from ditforge.errors import UserError
from ditforge.model import MAX_STEPS, Schedule

Array = npt.NDArray[np.floating[Any]]
Denoise = Callable[[Array, float], Array]  # (latents [B, C, h, w], sigma) -> velocity [B, C, h, w]


def check_steps(steps: int) -> int:
    """`steps` as it is; raises UserError unless it is an integer from 1 to 1000."""
    if not isinstance(steps, Integral) or isinstance(steps, bool) or not 1 <= steps <= MAX_STEPS:
        raise UserError(
            f"steps must be from 1 to {MAX_STEPS}, got {steps!r}", f"{option('steps=28')}, or any integer in that range"
        )
    return int(steps)


def flow_sigmas(steps: int, schedule: Schedule, height: int, width: int) -> npt.NDArray[np.float32]:
    """Noise levels, float32 [steps + 1], from 1 down to 0, for latents [B, C, height, width].

    Equal, to the bit, to the sigmas that diffusers' FluxPipeline and StableDiffusion3Pipeline take from
    FlowMatchEulerDiscreteScheduler. Raises UserError unless steps is an integer from 1 to 1000.
    """
    check_steps(steps)
    sigmas = np.linspace(1.0, 1 / steps if schedule.sigma_min is None else schedule.sigma_min, steps)
    if schedule.sigma_min is None:
        # diffusers rounds sigmas that a pipeline passes in before it shifts them, its own spacing only after.
        sigmas = sigmas.astype(np.float32)
    if schedule.kind == "fixed":
        sigmas = schedule.shift * sigmas / (1 + (schedule.shift - 1) * sigmas)
    else:
        shift = dynamic_shift(schedule, height, width)
        sigmas = shift / (shift + (1 / sigmas - 1))
    return np.append(sigmas, 0).astype(np.float32)


def dynamic_shift(schedule: Schedule, height: int, width: int) -> float:
    """The shift of a dynamic schedule for latents [B, C, height, width]: larger pictures need more noise to lose."""
    tokens = (height // schedule.patch_size) * (width // schedule.patch_size)
    mu = schedule.mu(tokens)
    return math.exp(mu) if schedule.time_shift == "exponential" else mu


@dataclass(frozen=True)
class Step:
    """What a sampler knows in step `index` of `total` (from 0), for a progress bar or a preview.

    denoised [B, C, h, w]: the model's estimate, at noise level sigma, of the finished latents.
    """

    index: int
    total: int
    sigma: float
    denoised: Array


Callback = Callable[[Step], object]


class Sampler(Protocol):
    """The signature that every sampler shares; see sample_euler."""

    def __call__(self, denoise: Denoise, latents: Array, sigmas: Array, callback: Callback | None = None) -> Array: ...


def sample_euler(denoise: Denoise, latents: Array, sigmas: Array, callback: Callback | None = None) -> Array:
    """Euler's method on the flow ODE dx/dsigma = v(x, sigma) (Lipman et al. 2023, arXiv:2210.02747).

    latents [B, C, h, w] at noise level sigmas[0]; sigmas [N + 1], falling to 0; both of one dtype. Returns latents at
    sigmas[-1]. Calls denoise once a step, and callback once a step.
    """
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        velocity = denoise(latents, sigma)
        if callback:
            callback(Step(i, len(sigmas) - 1, sigma, denoised=latents - sigma * velocity))
        latents = latents + (sigma_next - sigma) * velocity
    return latents


def sample_heun(denoise: Denoise, latents: Array, sigmas: Array, callback: Callback | None = None) -> Array:
    """Heun's second-order method on the flow ODE (Karras et al. 2022, arXiv:2206.00364, algorithm 1, no churn).

    Arguments and result as sample_euler. Calls denoise twice a step, and once in a step to 0: 2 N - 1 times.
    """
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        velocity = denoise(latents, sigma)
        if callback:
            callback(Step(i, len(sigmas) - 1, sigma, denoised=latents - sigma * velocity))
        dt = sigma_next - sigma
        if sigma_next > 0:
            velocity = (velocity + denoise(latents + dt * velocity, sigma_next)) / 2
        latents = latents + dt * velocity
    return latents


def sample_dpmpp_2m(denoise: Denoise, latents: Array, sigmas: Array, callback: Callback | None = None) -> Array:
    """DPM-Solver++(2M) with alpha = 1 - sigma (Lu et al. 2022, arXiv:2211.01095, algorithm 2).

    Arguments and result as sample_euler. Calls denoise once a step. The first step and a step to 0 are first-order.
    """
    with np.errstate(divide="ignore"):
        lambdas = np.log(1 - sigmas) - np.log(sigmas)  # -inf at sigma 1, inf at 0
    previous = latents
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = latents - sigma * denoise(latents, sigma)
        if callback:
            callback(Step(i, len(sigmas) - 1, sigma, denoised))
        target = denoised
        if i > 0 and sigma_next > 0:
            h_last, h = lambdas[i] - lambdas[i - 1], lambdas[i + 1] - lambdas[i]
            target = denoised + h / (2 * h_last) * (denoised - previous)
        # The paper's alpha_next * (exp(-h) - 1) is sigma_next / sigma - 1 here, which has no infinity at either end.
        ratio = sigma_next / sigma
        latents = ratio * latents + (1 - ratio) * target
        previous = denoised
    return latents


SAMPLERS: dict[str, Sampler] = {"euler": sample_euler, "heun": sample_heun, "dpmpp_2m": sample_dpmpp_2m}


def find_sampler(name: str) -> Sampler:
    """The sampler called `name` in SAMPLERS; raises UserError, with the closest name, where there is none."""
    if name in SAMPLERS:
        return SAMPLERS[name]
    close = get_close_matches(str(name).lower(), SAMPLERS, n=1) or ["euler"]
    raise UserError(
        f"unknown sampler {name!r}, known are {', '.join(SAMPLERS)}",
        option(f'sampler="{close[0]}"', f"--sampler {close[0]}"),
    )
