"""SDE-DPM-Solver++(2M), against diffusers and ComfyUI."""

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from flows import COMFY_START, SCHEDULES, ComfyNoise, Recorded, curved, curved_exactly, diffusers_loop, run, start

from ditforge.client.schedules import flow_sigmas


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
@pytest.mark.parametrize("begin", [0, 0.4], ids=["from noise", "from the middle"])
@pytest.mark.parametrize("steps", [1, 2, 3, 14, 28])
def test_it_equals_diffusers(schedule, begin, steps):
    sigmas = flow_sigmas(steps, schedule, 64, 64)[int(begin * steps) :]
    options = {"algorithm_type": "sde-dpmsolver++", "use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    scheduler = DPMSolverMultistepScheduler(**options)
    scheduler.set_timesteps(len(sigmas) - 1)
    scheduler.sigmas = torch.from_numpy(sigmas)
    noise = Recorded()
    latents = run("dpmpp_2m_sde", curved, start(), sigmas, noise=noise)
    assert latents.dtype == np.float32
    reference = diffusers_loop(
        scheduler, start(), lambda i, _: sigmas[i], variance_noise=lambda i: torch.from_numpy(noise.at(i))
    )
    np.testing.assert_allclose(latents, reference, rtol=0, atol=3e-5)
    assert noise.calls == len(sigmas) - 2


@pytest.mark.parametrize(
    ("eta", "s_noise", "expected"),
    [
        (1, 1, [-0.257099131, -1.465650408, 0.139029608, -0.182754718, -0.584912594, -0.302338892]),
        (0.4, 1, [-1.151505311, -2.999505372, 0.080968615, -0.002799626, -0.387774293, -0.118496805]),
        (0.7, 0.5, [-0.14449552, -0.219903573, -0.005668991, -0.128694694, -0.296534825, -0.202573839]),
    ],
)
def test_options_are_comfyuis(eta, s_noise, expected):
    """What sample_dpmpp_2m_sde (midpoint) of comfyanonymous/ComfyUI, comfy/k_diffusion/sampling.py, returns for CONST
    model sampling (02159d8), which is k-diffusion's with alpha = 1 - sigma.
    """
    sigmas = np.array([0.95, 0.8, 0.55, 0.3, 0.1, 0])
    options = {"noise": ComfyNoise(), "eta": eta, "s_noise": s_noise}
    made = run("dpmpp_2m_sde", curved_exactly, COMFY_START, sigmas, **options)
    np.testing.assert_allclose(made, expected, rtol=0, atol=2e-9)


@pytest.mark.parametrize("steps", [1, 2, 5, 28])
def test_without_eta_it_is_dpmpp_2m(steps):
    sigmas = flow_sigmas(steps, SCHEDULES["sd3.5"], 64, 64)
    noise = Recorded()
    made = run("dpmpp_2m_sde", curved, start(), sigmas, eta=0.0, noise=noise)
    np.testing.assert_allclose(made, run("dpmpp_2m", curved, start(), sigmas), rtol=0, atol=5e-6)
    assert noise.calls == 0
