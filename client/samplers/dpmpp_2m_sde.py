"""The sampler DPM-Solver++(2M) for the diffusion SDE, which adds noise in each step, unless eta is 0."""

import math
from itertools import pairwise

from ditforge.client.samplers import Array, Callback, Denoise, Noise, Step


def sample_dpmpp_2m_sde(
    denoise: Denoise,
    latents: Array,
    sigmas: Array,
    noise: Noise,
    callback: Callback | None = None,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> Array:
    """SDE-DPM-Solver++(2M), midpoint, with alpha = 1 - sigma (Lu et al. 2022, arXiv:2211.01095, appendix C).

    Arguments and result are those of `Sampler`. It calls denoise once a step and, if eta and s_noise are above 0,
    noise once in each step but the last. eta scales the noise as in k-diffusion's sample_dpmpp_2m_sde: 1 is the paper's
    solver, and 0 is dpmpp_2m. s_noise multiplies the noise that is added. k-diffusion draws the noise from a Brownian
    tree; here it is independent in each step, as in diffusers.
    """
    previous, h_last = latents, math.inf
    for i, (sigma, sigma_next) in enumerate(pairwise(map(float, sigmas))):
        velocity = denoise(latents, sigmas[i])
        if callback:
            callback(Step(i, len(sigmas) - 1, sigmas[i], latents, velocity))
        denoised = latents - sigma * velocity
        if sigma_next == 0:
            return denoised
        # exp(-h), where h is the length of the step in log(alpha / sigma). A step from sigma 1 is infinitely long, so
        # that this is 0.
        decay = (1 - sigma) * sigma_next / (sigma * (1 - sigma_next))
        h = -math.log(decay) if decay > 0 else math.inf
        gain = (1 - sigma_next) * (1 - decay ** (1 + eta))
        target = denoised
        if i > 0:
            target = denoised + h / (2 * h_last) * (denoised - previous)
        latents = sigma_next / sigma * decay**eta * latents + gain * target
        if eta > 0 and s_noise > 0:
            latents = latents + s_noise * sigma_next * math.sqrt(1 - decay ** (2 * eta)) * noise()
        previous, h_last = denoised, h
    return latents
