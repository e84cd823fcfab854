"""The schedule sgm_uniform: even steps, shifted."""

import numpy as np

from ditforge.client.schedules import LEVELS, Levels, Spacing


def schedule_sgm_uniform(steps: int, spacing: Spacing) -> Levels:
    """Even steps from 1 to nearly 0, then shifted (comfy/samplers.py, normal_scheduler with sgm=True).

    As in ComfyUI, the steps + 1 even levels end at the smallest level of its table, shifted. This last level is left
    out, and 0 takes its place.
    """
    end = float(spacing.shift(1 / LEVELS[spacing.model.kind]))
    return np.append(spacing.shift(np.linspace(1.0, end, steps + 1)[:-1]), 0.0)
