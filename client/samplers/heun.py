"""The sampler heun: Heun's method."""

from itertools import pairwise

from ditforge.client.samplers import Array, Callback, Denoise, Noise, Step


def sample_heun(
    denoise: Denoise, latents: Array, sigmas: Array, noise: Noise, callback: Callback | None = None
) -> Array:
    """Heun's second-order method on the flow ODE (Karras et al. 2022, arXiv:2206.00364, algorithm 1, no churn).

    Arguments and result are those of `Sampler`. It calls denoise twice a step, but once in the last step, to level 0:
    2 N - 1 times in N steps. It adds no noise.
    """
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        velocity = denoise(latents, sigma)
        if callback:
            callback(Step(i, len(sigmas) - 1, sigma, latents, velocity))
        dt = sigma_next - sigma
        if sigma_next > 0:
            velocity = (velocity + denoise(latents + dt * velocity, sigma_next)) / 2
        latents = latents + dt * velocity
    return latents
