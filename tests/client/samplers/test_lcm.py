"""Latent consistency sampling, against diffusers."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchLCMScheduler
from flows import SCHEDULES, curved, diffusers_loop, run, start

from ditforge.client.noise import BatchNoise
from ditforge.client.schedules import flow_sigmas


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_it_equals_diffusers_with_the_noise_of_its_generator(schedule, steps):
    """The generator goes on after the noise that the picture starts from, in torch as here."""
    sigmas = flow_sigmas(steps, schedule, 64, 64)
    scheduler = FlowMatchLCMScheduler()
    scheduler.set_timesteps(steps)
    scheduler.sigmas = torch.from_numpy(sigmas)
    generator = torch.Generator("cpu").manual_seed(7)
    reference = diffusers_loop(
        scheduler,
        torch.randn((1, 4, 8, 6), generator=generator).numpy(),
        lambda i, _: sigmas[i],
        generator=generator,
    )
    noise = BatchNoise([7], (4, 8, 6))
    latents = run("lcm", curved, noise(), sigmas, noise=noise)
    assert latents.dtype == np.float32
    np.testing.assert_allclose(latents, reference, rtol=0, atol=1e-5)


def test_what_it_ends_with_is_the_last_estimate_of_the_data():
    sigmas = flow_sigmas(4, SCHEDULES["sd3.5"], 64, 64)
    seen = []
    latents = run("lcm", curved, start(), sigmas, callback=seen.append)
    np.testing.assert_array_equal(latents, seen[-1].denoised)
