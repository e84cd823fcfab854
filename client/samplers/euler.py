"""The sampler euler: Euler's method."""

from itertools import pairwise

from ditforge.client.samplers import Array, Callback, Denoise, Noise, Step


def sample_euler(
    denoise: Denoise, latents: Array, sigmas: Array, noise: Noise, callback: Callback | None = None
) -> Array:
    """Euler's method on the flow ODE dx/dsigma = v(x, sigma) (Lipman et al. 2023, arXiv:2210.02747).

    Arguments and result are those of `Sampler`. It calls denoise once a step, and adds no noise.
    """
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        velocity = denoise(latents, sigma)
        if callback:
            callback(Step(i, len(sigmas) - 1, sigma, latents, velocity))
        latents = latents + (sigma_next - sigma) * velocity
    return latents
