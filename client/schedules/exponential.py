"""The schedule exponential: even steps in the logarithm of the noise level."""

import math

import numpy as np

from ditforge.client.schedules import Levels, Spacing, ends


def schedule_exponential(steps: int, spacing: Spacing) -> Levels:
    """Even steps in log(sigma) between the model's own first and last level (diffusers' use_exponential_sigmas)."""
    high, low = ends(steps, spacing)
    return np.append(np.exp(np.linspace(math.log(high), math.log(low), steps)), 0.0)
