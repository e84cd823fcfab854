"""The sampler DPM-Solver++(2M)."""

from itertools import pairwise

import numpy as np

from ditforge.client.samplers import Array, Callback, Denoise, Noise, Step


def sample_dpmpp_2m(
    denoise: Denoise, latents: Array, sigmas: Array, noise: Noise, callback: Callback | None = None
) -> Array:
    """DPM-Solver++(2M) with alpha = 1 - sigma (Lu et al. 2022, arXiv:2211.01095, algorithm 2).

    Arguments and result are those of `Sampler`. It calls denoise once a step, and adds no noise. The first step, and a
    step to level 0, are of first order.
    """
    with np.errstate(divide="ignore"):
        lambdas = np.log(1 - sigmas) - np.log(sigmas)  # -inf at sigma 1, inf at 0
    previous = latents
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        velocity = denoise(latents, sigma)
        if callback:
            callback(Step(i, len(sigmas) - 1, sigma, latents, velocity))
        denoised = latents - sigma * velocity
        target = denoised
        if i > 0 and sigma_next > 0:
            h_last, h = lambdas[i] - lambdas[i - 1], lambdas[i + 1] - lambdas[i]
            target = denoised + h / (2 * h_last) * (denoised - previous)
        # The paper's alpha_next * (exp(-h) - 1) is sigma_next / sigma - 1 here, which is finite at both ends.
        ratio = sigma_next / sigma
        latents = ratio * latents + (1 - ratio) * target
        previous = denoised
    return latents
