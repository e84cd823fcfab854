"""The sampler lcm: latent consistency sampling."""

from itertools import pairwise

from ditforge.client.samplers import Array, Callback, Denoise, Noise, Step


def sample_lcm(
    denoise: Denoise, latents: Array, sigmas: Array, noise: Noise, callback: Callback | None = None
) -> Array:
    """Multistep consistency sampling, for models distilled for it (Luo et al. 2023, arXiv:2310.04378, algorithm 3).

    Arguments and result are those of `Sampler`. Each step goes to the model's estimate of the data, and adds fresh
    noise to reach the next level. This is the form for flow-matching models, as in diffusers' FlowMatchLCMScheduler. It
    calls denoise once a step, and noise once in each step but the last.
    """
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        velocity = denoise(latents, sigma)
        if callback:
            callback(Step(i, len(sigmas) - 1, sigma, latents, velocity))
        latents = latents - sigma * velocity
        if sigma_next > 0:
            latents = (1 - sigma_next) * latents + sigma_next * noise()
    return latents
