"""Schedules: the noise levels that a sampler goes through, from 1 (noise) down to 0 (a picture). A file for each.

A schedule is a function that takes the number of steps and the model's `Spacing`, and returns levels [steps + 1]. To
add one, write the function `schedule_NAME` in a new file NAME.py in this folder, where it is found.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from numbers import Integral
from pkgutil import iter_modules
from typing import Any

import numpy as np
import numpy.typing as npt

from ditforge.arguments import check_takes
from ditforge.errors import UserError
from ditforge.model import MAX_STEPS, Schedule as ModelSchedule
from ditforge.option import option, setting

Array = npt.NDArray[np.floating[Any]]
Levels = npt.NDArray[np.float64]
Sigmas = npt.NDArray[np.float32]

DEFAULT = "default"
# The number of levels in ComfyUI's table for each kind of schedule (ModelSamplingDiscreteFlow, ModelSamplingFlux).
LEVELS = {"fixed": 1000, "dynamic": 10_000}
FALLING = option("sigmas=[1.0, 0.75, 0.5, 0.25, 0.0]", "--sigmas 1,0.75,0.5,0.25,0")


@dataclass(frozen=True)
class Spacing:
    """How a model spaces its noise levels for pictures of one size, given by their latents [B, C, height, width]."""

    model: ModelSchedule
    height: int
    width: int

    def shift(self, levels: npt.ArrayLike) -> Levels:
        """Shift levels, from 0 to 1, towards noise, as the model does for this size. 0 and 1 stay the same."""
        return shifted(np.asarray(levels), self.model, self.height, self.width).astype(np.float64)

    def sigmas(self, steps: int) -> Sigmas:
        """The model's own levels, from 1 down to 0: float32 [steps + 1]."""
        return flow_sigmas(steps, self.model, self.height, self.width)


ScheduleFunction = Callable[[int, Spacing], npt.ArrayLike]


def check_steps(steps: int) -> int:
    """Return `steps` unchanged. Raises UserError unless it is an integer from 1 to 1000."""
    if not isinstance(steps, Integral) or isinstance(steps, bool) or not 1 <= steps <= MAX_STEPS:
        raise UserError(
            f"{option('steps')} must be from 1 to {MAX_STEPS}, got {steps!r}",
            f"{option('steps=28')}, or any integer in that range",
        )
    return int(steps)


def flow_sigmas(steps: int, schedule: ModelSchedule, height: int, width: int) -> Sigmas:
    """The noise levels of a model's own schedule, float32 [steps + 1], for latents [B, C, height, width].

    They fall from 1 to 0, and are equal, to the bit, to the sigmas that diffusers' FluxPipeline and
    StableDiffusion3Pipeline take from FlowMatchEulerDiscreteScheduler. Raises UserError unless steps is an integer from
    1 to 1000.
    """
    check_steps(steps)
    sigmas = np.linspace(1.0, 1 / steps if schedule.sigma_min is None else schedule.sigma_min, steps)
    if schedule.sigma_min is None:
        # diffusers rounds sigmas that a pipeline passes in before the shift, but those of its own spacing only after.
        sigmas = sigmas.astype(np.float32)
    return np.append(shifted(sigmas, schedule, height, width), 0).astype(np.float32)


def shifted(sigmas: Array, schedule: ModelSchedule, height: int, width: int) -> Array:
    """Shift levels from 0 to 1 by the formula in ditforge.model.Schedule. The dtype stays the same."""
    if schedule.kind == "fixed":
        return schedule.shift * sigmas / (1 + (schedule.shift - 1) * sigmas)
    shift = dynamic_shift(schedule, height, width)
    with np.errstate(divide="ignore"):  # level 0 stays 0
        return shift / (shift + (1 / sigmas - 1))


def dynamic_shift(schedule: ModelSchedule, height: int, width: int) -> float:
    """The shift of a dynamic schedule for latents [B, C, height, width].

    It grows with the size, because in a larger picture more noise is needed to destroy as much of the data.
    """
    tokens = (height // schedule.patch_size) * (width // schedule.patch_size)
    mu = schedule.mu(tokens)
    return math.exp(mu) if schedule.time_shift == "exponential" else mu


def ends(steps: int, spacing: Spacing) -> tuple[float, float]:
    """The first of the model's own levels, and the last one above 0."""
    sigmas = spacing.sigmas(steps)
    return float(sigmas[0]), float(sigmas[-2])


def find_schedule(schedule: str | ScheduleFunction) -> ScheduleFunction:
    """Return the schedule of that name; a function is returned unchanged.

    Raises UserError for an unknown name, with the closest one, and for a function that cannot be called as a schedule.
    """
    if callable(schedule):
        fix = "def schedule(steps, spacing): …"
        check_takes(schedule, 2, f"the schedule {schedule_name(schedule)}", fix)
        return schedule
    if isinstance(schedule, str) and schedule in SCHEDULES:
        return SCHEDULES[schedule]
    close = get_close_matches(str(schedule).lower(), SCHEDULES, n=1) or [DEFAULT]
    problem = f"unknown schedule {schedule!r}, known are {', '.join(SCHEDULES)}"
    raise UserError(problem, setting("schedule", close[0]))


def schedule_name(schedule: str | ScheduleFunction) -> str:
    """The name of a schedule in a picture's parameters. For a user's function, it is the function's name."""
    if isinstance(schedule, str):
        return schedule
    if ours := [name for name, function in SCHEDULES.items() if function is schedule]:
        return ours[0]
    name = str(getattr(schedule, "__name__", type(schedule).__name__))
    return f"{schedule.__module__}.{name}" if name in SCHEDULES else name


def make_sigmas(schedule: str | ScheduleFunction, steps: int, spacing: Spacing) -> Sigmas:
    """The noise levels of a schedule, float32 [steps + 1].

    Raises UserError if the schedule is unknown, or does not return steps + 1 levels that fall from 1 to 0.
    """
    levels = find_schedule(schedule)(check_steps(steps), spacing)
    fix = f"return {steps + 1} levels, which fall from 1 to 0"
    sigmas = check_sigmas(levels, f"what the schedule {schedule_name(schedule)} returns", fix)
    if len(sigmas) != steps + 1:
        raise UserError(f"the schedule {schedule_name(schedule)} gave {len(sigmas)} levels for {steps} steps", fix)
    return sigmas


def check_sigmas(levels: npt.ArrayLike | Sequence[float], what: str, fix: str = FALLING) -> Sigmas:
    """Return `levels` as float32 [N + 1]. Raises UserError unless they fall from 1 to 0 in 1 to 1000 steps.

    `what` is what errors call them, and `fix` what they advise.
    """
    try:
        sigmas = np.asarray(levels, np.float64).astype(np.float32)
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{what} must be numbers, got {levels!r}", fix) from None
    if sigmas.ndim != 1 or not 2 <= len(sigmas) <= MAX_STEPS + 1:
        raise UserError(f"{what} must be a list of 2 to {MAX_STEPS + 1} levels, got shape {list(sigmas.shape)}", fix)
    if not (np.diff(sigmas) < 0).all() or sigmas[-1] != 0 or abs(sigmas[0] - 1) > 1e-6:
        shown = ", ".join(f"{sigma:g}" for sigma in sigmas[:8]) + (", …" if len(sigmas) > 8 else "")
        raise UserError(f"{what} must fall from 1 to 0, each level below the one before, got {shown}", fix)
    return sigmas


def _found(name: str) -> ScheduleFunction:
    """The function in the file of a schedule. Raises UserError if it has none."""
    module = import_module(f"{__name__}.{name}")
    function: ScheduleFunction | None = getattr(module, f"schedule_{name}", None)
    if function is None:
        problem = f"{module.__file__} has no function schedule_{name}"
        raise UserError(problem, "see CONTRIBUTING.md, Add a schedule")
    return function


# The model's own is the first. They are imported here, after everything that they import from this file.
SCHEDULES: dict[str, ScheduleFunction] = {
    name: _found(name)
    for name in sorted((module.name for module in iter_modules(__path__)), key=lambda name: (name != DEFAULT, name))
}
