"""Euler's method, against diffusers and a flow whose end is known."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from flows import SCHEDULES, curved, diffusers_loop, error, no_noise, run, start

from ditforge.client.schedules import flow_sigmas


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
@pytest.mark.parametrize("steps", [1, 2, 4, 28, 100])
def test_euler_is_bit_equal_to_diffusers(schedule, steps):
    sigmas = flow_sigmas(steps, schedule, 64, 64)
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(steps)
    scheduler.sigmas = torch.from_numpy(sigmas)
    latents = run("euler", curved, start(), sigmas, noise=no_noise)
    assert latents.dtype == np.float32
    np.testing.assert_array_equal(latents, diffusers_loop(scheduler, start(), lambda i, _: sigmas[i]))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_halving_the_steps_shows_first_order(shift):
    errors = np.array([error("euler", steps, shift) for steps in (256, 512, 1024)])
    np.testing.assert_allclose(np.log2(errors[:-1] / errors[1:]), 1, atol=0.05)
