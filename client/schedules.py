"""Schedules: which noise levels a sampler walks down, from 1 (noise) to 0 (a picture).

A schedule is a function of the number of steps and of the model's `Spacing`; it returns levels [steps + 1]. To add one,
write it here and name it in SCHEDULES.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from numbers import Integral
from typing import Any

import numpy as np
import numpy.typing as npt

from ditforge.errors import UserError
from ditforge.model import MAX_STEPS, Schedule as ModelSchedule
from ditforge.option import option

Array = npt.NDArray[np.floating[Any]]
Levels = npt.NDArray[np.float64]
Sigmas = npt.NDArray[np.float32]

RHO = 7.0  # karras: what the paper recommends
BETA = 0.6  # beta: both parameters of the distribution, as the paper recommends
# How finely ComfyUI divides noise levels in models of each kind: ModelSamplingDiscreteFlow's and ModelSamplingFlux's.
LEVELS = {"fixed": 1000, "dynamic": 10_000}
FALLING = option("sigmas=[1.0, 0.75, 0.5, 0.25, 0.0]", "--sigmas 1,0.75,0.5,0.25,0")


@dataclass(frozen=True)
class Spacing:
    """How a model spaces its noise levels in pictures of one size: latents [B, C, height, width]."""

    model: ModelSchedule
    height: int
    width: int

    def shift(self, levels: npt.ArrayLike) -> Levels:
        """Levels from 0 to 1, moved towards noise as the model wants them in pictures of this size; 1 stays 1."""
        return shifted(np.asarray(levels), self.model, self.height, self.width).astype(np.float64)

    def sigmas(self, steps: int) -> Sigmas:
        """The model's own levels, from 1 down to 0: float32 [steps + 1]."""
        return flow_sigmas(steps, self.model, self.height, self.width)


ScheduleFunction = Callable[[int, Spacing], npt.ArrayLike]


def check_steps(steps: int) -> int:
    """`steps` as it is; raises UserError unless it is an integer from 1 to 1000."""
    if not isinstance(steps, Integral) or isinstance(steps, bool) or not 1 <= steps <= MAX_STEPS:
        raise UserError(
            f"{option('steps')} must be from 1 to {MAX_STEPS}, got {steps!r}",
            f"{option('steps=28')}, or any integer in that range",
        )
    return int(steps)


def flow_sigmas(steps: int, schedule: ModelSchedule, height: int, width: int) -> Sigmas:
    """Noise levels, float32 [steps + 1], from 1 down to 0, for latents [B, C, height, width].

    Equal, to the bit, to the sigmas that diffusers' FluxPipeline and StableDiffusion3Pipeline take from
    FlowMatchEulerDiscreteScheduler. Raises UserError unless steps is an integer from 1 to 1000.
    """
    check_steps(steps)
    sigmas = np.linspace(1.0, 1 / steps if schedule.sigma_min is None else schedule.sigma_min, steps)
    if schedule.sigma_min is None:
        # diffusers rounds sigmas that a pipeline passes in before it shifts them, its own spacing only after.
        sigmas = sigmas.astype(np.float32)
    return np.append(shifted(sigmas, schedule, height, width), 0).astype(np.float32)


def shifted(sigmas: Array, schedule: ModelSchedule, height: int, width: int) -> Array:
    """Levels from 0 to 1, shifted as ditforge.model.Schedule says, in their own dtype."""
    if schedule.kind == "fixed":
        return schedule.shift * sigmas / (1 + (schedule.shift - 1) * sigmas)
    shift = dynamic_shift(schedule, height, width)
    with np.errstate(divide="ignore"):  # level 0 stays 0
        return shift / (shift + (1 / sigmas - 1))


def dynamic_shift(schedule: ModelSchedule, height: int, width: int) -> float:
    """The shift of a dynamic schedule for latents [B, C, height, width]: larger pictures need more noise to lose."""
    tokens = (height // schedule.patch_size) * (width // schedule.patch_size)
    mu = schedule.mu(tokens)
    return math.exp(mu) if schedule.time_shift == "exponential" else mu


def default(steps: int, spacing: Spacing) -> Sigmas:
    """The model's own schedule."""
    return spacing.sigmas(steps)


def simple(steps: int, spacing: Spacing) -> Levels:
    """Evenly picked from ComfyUI's table of shifted levels, from the top (comfy/samplers.py, simple_scheduler)."""
    count = LEVELS[spacing.model.kind]
    places = count - (np.arange(steps) * (count / steps)).astype(np.int64)
    return np.append(spacing.shift(places / count), 0.0)


def sgm_uniform(steps: int, spacing: Spacing) -> Levels:
    """Even steps from 1 to nearly 0, shifted (comfy/samplers.py, normal_scheduler with sgm=True).

    As there, the last of the steps + 1 even levels, which is left out, is the smallest of ComfyUI's table, shifted.
    """
    end = float(spacing.shift(1 / LEVELS[spacing.model.kind]))
    return np.append(spacing.shift(np.linspace(1.0, end, steps + 1)[:-1]), 0.0)


def karras(steps: int, spacing: Spacing) -> Levels:
    """Even in sigma^(1/7), from the first to the last of the model's own levels (Karras et al. 2022, arXiv:2206.00364,
    equation 5), as diffusers' FlowMatchEulerDiscreteScheduler with use_karras_sigmas.
    """
    high, low = ends(steps, spacing)
    return np.append(np.linspace(high ** (1 / RHO), low ** (1 / RHO), steps) ** RHO, 0.0)


def exponential(steps: int, spacing: Spacing) -> Levels:
    """Even in log(sigma), from the first to the last of the model's own levels (diffusers' use_exponential_sigmas)."""
    high, low = ends(steps, spacing)
    return np.append(np.exp(np.linspace(math.log(high), math.log(low), steps)), 0.0)


def beta(steps: int, spacing: Spacing) -> Levels:
    """Dense at both ends: the quantiles of a Beta(0.6, 0.6) distribution, from the first to the last of the model's own
    levels (Lee et al. 2024, arXiv:2407.12173), as diffusers' use_beta_sigmas.

    Raises UserError where scipy, which has these quantiles, is not installed.
    """
    try:
        from scipy.special import betaincinv
    except ModuleNotFoundError:
        raise UserError('the schedule "beta" needs scipy, which is not installed', "pip install scipy") from None
    high, low = ends(steps, spacing)
    quantiles = betaincinv(BETA, BETA, 1 - np.linspace(0, 1, steps))
    return np.append(low + quantiles * (high - low), 0.0)


def ends(steps: int, spacing: Spacing) -> tuple[float, float]:
    """The first of the model's own levels, and the last one above 0."""
    sigmas = spacing.sigmas(steps)
    return float(sigmas[0]), float(sigmas[-2])


SCHEDULES: dict[str, ScheduleFunction] = {
    function.__name__: function for function in (default, simple, sgm_uniform, karras, exponential, beta)
}


def find_schedule(schedule: str | ScheduleFunction) -> ScheduleFunction:
    """The schedule of that name, or a function as it is. Raises UserError, with the closest name, for another name."""
    if callable(schedule):
        return schedule
    if schedule in SCHEDULES:
        return SCHEDULES[schedule]
    close = get_close_matches(str(schedule).lower(), SCHEDULES, n=1) or ["default"]
    problem = f"unknown schedule {schedule!r}, known are {', '.join(SCHEDULES)}"
    raise UserError(problem, option(f'schedule="{close[0]}"', f"--schedule {close[0]}"))


def schedule_name(schedule: str | ScheduleFunction) -> str:
    """What a schedule is called in a picture's parameters. A user's function has its own name."""
    if isinstance(schedule, str):
        return schedule
    name = str(getattr(schedule, "__name__", type(schedule).__name__))
    return name if SCHEDULES.get(name, schedule) is schedule else f"{schedule.__module__}.{name}"


def make_sigmas(schedule: str | ScheduleFunction, steps: int, spacing: Spacing) -> Sigmas:
    """The noise levels of a schedule: float32 [steps + 1]. Raises UserError for levels that cannot be sampled along."""
    levels = find_schedule(schedule)(check_steps(steps), spacing)
    sigmas = check_sigmas(levels, f"the schedule {schedule_name(schedule)}")
    if len(sigmas) != steps + 1:
        problem = f"the schedule {schedule_name(schedule)} gave {len(sigmas)} levels for {steps} steps"
        raise UserError(problem, f"return {steps + 1} levels, the last of which is 0")
    return sigmas


def check_sigmas(levels: npt.ArrayLike | Sequence[float], what: str) -> Sigmas:
    """`levels` as float32 [N + 1]. Raises UserError unless they fall from 1 to 0, in 1 to 1000 steps."""
    try:
        sigmas = np.asarray(levels, np.float64).astype(np.float32)
    except (TypeError, ValueError):
        raise UserError(f"{what} must be numbers, got {levels!r}", FALLING) from None
    if sigmas.ndim != 1 or not 2 <= len(sigmas) <= MAX_STEPS + 1:
        raise UserError(
            f"{what} must be a list of 2 to {MAX_STEPS + 1} levels, got shape {list(sigmas.shape)}", FALLING
        )
    if not (np.diff(sigmas) < 0).all() or sigmas[-1] != 0 or abs(sigmas[0] - 1) > 1e-6:
        shown = ", ".join(f"{sigma:g}" for sigma in sigmas[:8]) + (", …" if len(sigmas) > 8 else "")
        raise UserError(f"{what} must fall from 1 to 0, each level below the one before, got {shown}", FALLING)
    return sigmas
