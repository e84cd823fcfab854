"""DDIM in its flow form, against diffusers' SDE solver of first order, which it is at eta 1, and Euler, at eta 0."""

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from flows import SCHEDULES, Recorded, curved, diffusers_loop, run, start

from ditforge.client.schedules import flow_sigmas

schedules = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())


@schedules
@pytest.mark.parametrize("steps", [1, 2, 5, 28])
def test_at_eta_1_it_is_diffusers_first_order_sde_solver(schedule, steps):
    sigmas = flow_sigmas(steps, schedule, 64, 64)
    options = {"algorithm_type": "sde-dpmsolver++", "use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    scheduler = DPMSolverMultistepScheduler(solver_order=1, **options)
    scheduler.set_timesteps(steps)
    scheduler.sigmas = torch.from_numpy(sigmas)
    noise = Recorded()
    latents = run("ddim", curved, start(), sigmas, eta=1.0, noise=noise)
    assert latents.dtype == np.float32
    reference = diffusers_loop(
        scheduler, start(), lambda i, _: sigmas[i], variance_noise=lambda i: torch.from_numpy(noise.at(i))
    )
    np.testing.assert_allclose(latents, reference, rtol=0, atol=2e-5)


@schedules
@pytest.mark.parametrize("steps", [1, 2, 5, 28])
def test_by_default_it_is_euler(schedule, steps):
    sigmas = flow_sigmas(steps, schedule, 64, 64)
    noise = Recorded()
    made = run("ddim", curved, start(), sigmas, noise=noise)
    np.testing.assert_allclose(made, run("euler", curved, start(), sigmas), rtol=0, atol=2e-6)
    assert noise.calls == 0


def test_eta_keeps_the_noise_at_its_level():
    """Where data is one known point, a step leaves the right amount of noise, of which eta says how much is fresh."""
    data, noise = np.full((64, 1, 64, 64), 0.5), start((64, 1, 64, 64)).astype(np.float64)

    def step(eta):
        sigmas = np.array([1, 0.6])
        return run("ddim", lambda latents, sigma: (latents - data) / sigma, noise, sigmas, eta=eta)

    for eta in (0.0, 0.3, 1.0):
        rest = (step(eta) - 0.4 * data) / 0.6
        assert rest.std() == pytest.approx(1, abs=0.01)
        kept = np.corrcoef(rest.ravel(), noise.ravel())[0, 1]
        assert kept == pytest.approx(np.sqrt(1 - eta**2), abs=0.01)
