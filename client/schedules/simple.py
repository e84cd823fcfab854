"""The schedule simple: evenly picked from a table."""

import numpy as np

from ditforge.client.schedules import LEVELS, Levels, Spacing


def schedule_simple(steps: int, spacing: Spacing) -> Levels:
    """Evenly picked from ComfyUI's table of shifted levels, from its top (comfy/samplers.py, simple_scheduler)."""
    count = LEVELS[spacing.model.kind]
    places = count - (np.arange(steps) * (count / steps)).astype(np.int64)
    return np.append(spacing.shift(places / count), 0.0)
