"""Heun's method, against diffusers and a flow whose end is known."""

import numpy as np
import pytest
from diffusers import FlowMatchHeunDiscreteScheduler
from flows import curved, diffusers_loop, error, no_noise, run, start

from ditforge.client.schedules import flow_sigmas
from ditforge.model import Schedule


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 30])
def test_heun_equals_diffusers(shift, steps):
    scheduler = FlowMatchHeunDiscreteScheduler(shift=shift)
    schedule = Schedule(kind="fixed", shift=shift, sigma_min=scheduler.sigma_min)
    scheduler.set_timesteps(steps)
    sigmas = flow_sigmas(steps, schedule, 64, 64)
    latents = run("heun", curved, start(), sigmas, noise=no_noise)
    assert latents.dtype == np.float32
    reference = diffusers_loop(scheduler, start(), lambda _, timestep: float(timestep) / 1000)
    # diffusers takes its second velocity from (sample - denoised) / sigma_next, which magnifies rounding.
    longest = np.max(sigmas[:-2] / sigmas[1:-1], initial=1)
    np.testing.assert_allclose(latents, reference, rtol=0, atol=3e-6 + 2e-7 * longest)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_halving_the_steps_shows_second_order(shift):
    errors = np.array([error("heun", steps, shift) for steps in (256, 512, 1024)])
    np.testing.assert_allclose(np.log2(errors[:-1] / errors[1:]), 2, atol=0.05)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_it_beats_euler_at_equal_cost(shift):
    assert error("heun", 64, shift) < error("euler", 128, shift) / 3
