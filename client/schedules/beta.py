"""The schedule beta: quantiles of a Beta distribution."""

import numpy as np

from ditforge.client.schedules import Levels, Spacing, ends
from ditforge.errors import UserError

BETA = 0.6  # both parameters of the distribution, as the paper recommends


def schedule_beta(steps: int, spacing: Spacing) -> Levels:
    """Quantiles of a Beta(0.6, 0.6) distribution between the model's own first and last level, dense at both ends.

    Source: Lee et al. 2024, arXiv:2407.12173, as diffusers' use_beta_sigmas. Raises UserError if scipy, which computes
    the quantiles, is not installed.
    """
    try:
        from scipy.special import betaincinv
    except ModuleNotFoundError:
        raise UserError('the schedule "beta" needs scipy, which is not installed', "pip install scipy") from None
    high, low = ends(steps, spacing)
    quantiles = betaincinv(BETA, BETA, 1 - np.linspace(0, 1, steps))
    return np.append(low + quantiles * (high - low), 0.0)
