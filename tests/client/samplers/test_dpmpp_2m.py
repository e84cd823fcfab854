"""DPM-Solver++(2M), against diffusers and a flow whose end is known."""

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from flows import SCHEDULES, curved, diffusers_loop, error, gaussian_velocity, no_noise, run, start

from ditforge.client.schedules import flow_sigmas


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
@pytest.mark.parametrize("begin", [0, 0.4], ids=["from noise", "from the middle"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 14, 15, 28, 100])
def test_dpmpp_2m_equals_diffusers(schedule, begin, steps):
    sigmas = flow_sigmas(steps, schedule, 64, 64)[int(begin * steps) :]
    scheduler = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    assert (scheduler.config.algorithm_type, scheduler.config.solver_type) == ("dpmsolver++", "midpoint")
    scheduler.set_timesteps(len(sigmas) - 1)
    scheduler.sigmas = torch.from_numpy(sigmas)
    latents = run("dpmpp_2m", curved, start(), sigmas, noise=no_noise)
    assert latents.dtype == np.float32
    reference = diffusers_loop(scheduler, start(), lambda i, _: sigmas[i])
    np.testing.assert_allclose(latents, reference, rtol=0, atol=2e-5)


def test_dpmpp_2m_is_second_order_between_two_finite_log_snrs():
    """Its order is a statement in lambda, so the steps are even in lambda and stay clear of the infinite ends."""

    def end(steps):
        sigmas = 1 / (1 + np.exp(np.linspace(-3, 3, steps + 1)))
        scale = np.hypot(0.4 * (1 - sigmas), sigmas)
        latents = 0.7 * (1 - sigmas[0]) + scale[0] * noise
        exact = 0.7 * (1 - sigmas[-1]) + scale[-1] * noise
        return np.abs(run("dpmpp_2m", gaussian_velocity(0.7, 0.4), latents, sigmas) - exact).max()

    noise = np.linspace(-2, 2, 9)
    errors = np.array([end(steps) for steps in (256, 512, 1024)])
    np.testing.assert_allclose(np.log2(errors[:-1] / errors[1:]), 2, atol=0.1)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_it_beats_euler_at_equal_cost(shift):
    assert error("dpmpp_2m", 128, shift) < error("euler", 128, shift) / 3
