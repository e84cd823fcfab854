"""Latent consistency sampling."""

from itertools import pairwise

from ditforge.client.samplers import Array, Callback, Denoise, Noise, Step


def sample_lcm(
    denoise: Denoise, latents: Array, sigmas: Array, noise: Noise, callback: Callback | None = None
) -> Array:
    """Multistep consistency sampling, for models distilled for it (Luo et al. 2023, arXiv:2310.04378, algorithm 3).

    Arguments and result as `Sampler`. Each step goes to the model's estimate of the data, and from there up to the next
    level with fresh noise: the flow form, as diffusers' FlowMatchLCMScheduler. Calls denoise once a step, and noise
    once a step but the last.
    """
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        latents = latents - sigma * denoise(latents, sigma)
        if callback:
            callback(Step(i, len(sigmas) - 1, sigma, denoised=latents))
        if sigma_next > 0:
            latents = (1 - sigma_next) * latents + sigma_next * noise()
    return latents
