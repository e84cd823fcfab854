"""The sampler euler_ancestral: Euler's method with fresh noise in each step, unless eta is 0."""

import math
from itertools import pairwise

from ditforge.client.samplers import Array, Callback, Denoise, Noise, Step


def sample_euler_ancestral(
    denoise: Denoise,
    latents: Array,
    sigmas: Array,
    noise: Noise,
    callback: Callback | None = None,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> Array:
    """Euler's method to a level below the next one, and noise back up to it (ComfyUI's sample_euler_ancestral_RF).

    Arguments and result are those of `Sampler`. It calls denoise once a step and, if eta is above 0, noise once in
    each step but the last. A step from sigma to s first goes down to s * (1 + eta * (s / sigma - 1)). Then the latents
    are scaled, and noise is added, so that their shares of data and noise are those of level s. With eta 0, it is
    euler. s_noise multiplies the noise that is added.
    """
    for i, (sigma, sigma_next) in enumerate(pairwise(map(float, sigmas))):
        velocity = denoise(latents, sigmas[i])
        if callback:
            callback(Step(i, len(sigmas) - 1, sigmas[i], latents, velocity))
        down = sigma_next * (1 + eta * (sigma_next / sigma - 1))
        latents = latents + (down - sigma) * velocity
        if down < sigma_next:
            scale = (1 - sigma_next) / (1 - down)
            latents = scale * latents + s_noise * math.sqrt(sigma_next**2 - (scale * down) ** 2) * noise()
    return latents
