"""The schedule karras: even steps in a power of the noise level."""

import numpy as np

from ditforge.client.schedules import Levels, Spacing, ends

RHO = 7.0  # the paper's recommendation


def schedule_karras(steps: int, spacing: Spacing) -> Levels:
    """Even steps in sigma^(1/7) between the model's own first and last level (Karras et al. 2022, arXiv:2206.00364).

    It is equation 5 there, and diffusers' FlowMatchEulerDiscreteScheduler with use_karras_sigmas.
    """
    high, low = ends(steps, spacing)
    return np.append(np.linspace(high ** (1 / RHO), low ** (1 / RHO), steps) ** RHO, 0.0)
