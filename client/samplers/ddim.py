"""The sampler DDIM, which is deterministic with eta 0 and ancestral with eta 1."""

import math
from itertools import pairwise

from ditforge.client.samplers import Array, Callback, Denoise, Noise, Step


def sample_ddim(
    denoise: Denoise,
    latents: Array,
    sigmas: Array,
    noise: Noise,
    callback: Callback | None = None,
    *,
    eta: float = 0.0,
) -> Array:
    """DDIM (Song et al. 2021, arXiv:2010.02502, equation 12) with alpha = 1 - sigma.

    Arguments and result are those of `Sampler`. It calls denoise once a step. If eta is above 0, it calls noise once in
    each step but the last. The estimates of data and noise are x0 = x - sigma v and eps = x + (1 - sigma) v, and a step
    from sigma to s is

        x_s = (1 - s) x0 + sqrt(s^2 - d^2) eps + d z,   d = eta s sqrt(1 - (s (1 - sigma) / (sigma (1 - s)))^2)

    where z is fresh noise. With eta 1, d is the deviation of the ancestral step of a diffusion with this alpha and
    sigma, as in the paper, and the sampler is SDE-DPM-Solver++ of first order. With eta 0, it is euler.
    """
    for i, (sigma, sigma_next) in enumerate(pairwise(map(float, sigmas))):
        velocity = denoise(latents, sigmas[i])
        if callback:
            callback(Step(i, len(sigmas) - 1, sigmas[i], latents, velocity))
        fresh = 0.0
        if eta > 0 and sigma_next > 0:
            decay = (1 - sigma) * sigma_next / (sigma * (1 - sigma_next))
            fresh = eta * sigma_next * math.sqrt(1 - decay**2)
        kept = math.sqrt(sigma_next**2 - fresh**2) - sigma_next
        eps = latents + (1 - sigma) * velocity
        latents = latents + (sigma_next - sigma) * velocity
        if fresh > 0:
            latents = latents + kept * eps + fresh * noise()
    return latents
