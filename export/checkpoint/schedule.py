"""Read the noise schedule of a checkpoint from its scheduler's configuration."""

from __future__ import annotations

from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler

from ditforge.errors import UserError
from ditforge.model import Schedule

SCHEDULER = FlowMatchEulerDiscreteScheduler.__name__
UNKNOWN_OPTIONS = (
    "shift_terminal",
    "invert_sigmas",
    "stochastic_sampling",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
)
TIMESTEPS = 1000  # the pipelines divide timesteps by it, whatever the scheduler's number is


def flow_schedule(config: dict[str, Any], class_name: str, patch_size: int, pipeline_spaces: bool = True) -> Schedule:
    """Return the schedule that diffusers' FlowMatchEulerDiscreteScheduler has with the configuration `config`.

    `pipeline_spaces` says who spaces the sigmas: the pipeline, which passes them to the scheduler (True), or the
    scheduler itself (False). Raises UserError for another scheduler, and for an option that places the sigmas in a way
    that is not known here.
    """
    fix = "use the scheduler folder that the model's authors ship"
    if class_name != SCHEDULER:
        raise UserError(f"the checkpoint's scheduler is {class_name or 'unnamed'}; only {SCHEDULER} is known", fix)
    for option in UNKNOWN_OPTIONS:
        if config.get(option):
            raise UserError(f"the checkpoint's scheduler has {option} {config[option]!r}, which is not known", fix)
    if (timesteps := config.get("num_train_timesteps", TIMESTEPS)) != TIMESTEPS:
        raise UserError(f"the checkpoint's scheduler has num_train_timesteps {timesteps!r}, only 1000 is known", fix)
    sigma_min = None if pipeline_spaces else FlowMatchEulerDiscreteScheduler.from_config(config).sigma_min
    if not config.get("use_dynamic_shifting", False):
        return Schedule(kind="fixed", shift=config.get("shift", 1.0), sigma_min=sigma_min, patch_size=patch_size)
    return Schedule(
        kind="dynamic",
        sigma_min=sigma_min,
        time_shift=config.get("time_shift_type", "exponential"),
        base_tokens=config.get("base_image_seq_len", 256),
        max_tokens=config.get("max_image_seq_len", 4096),
        base_shift=config.get("base_shift", 0.5),
        max_shift=config.get("max_shift", 1.15),
        patch_size=patch_size,
    )
