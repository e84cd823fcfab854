"""Ancestral Euler in its flow form, against ComfyUI and a flow whose distribution is known."""

import numpy as np
import pytest
from flows import COMFY_START, SCHEDULES, ComfyNoise, Recorded, curved, curved_exactly, run, start

from ditforge.client.schedules import flow_sigmas


@pytest.mark.parametrize(
    ("eta", "s_noise", "expected"),
    [
        (1, 1, [-0.914779131, -2.602210305, 0.020192326, -0.070925323, -0.324571041, -0.002003235]),
        (0.4, 1, [-3.066185704, -3.189278245, -0.025422267, 0.070321574, -0.192269135, 0.159734636]),
        (0.7, 0.5, [-1.840013268, -1.014481378, -0.079694783, -0.134402018, -0.176934084, 0.062510914]),
    ],
)
def test_it_equals_comfyui(eta, s_noise, expected):
    """What sample_euler_ancestral_RF of comfyanonymous/ComfyUI, comfy/k_diffusion/sampling.py, returns (02159d8)."""
    sigmas = np.array([1, 0.9, 0.7, 0.4, 0.15, 0])
    options = {"noise": ComfyNoise(), "eta": eta, "s_noise": s_noise}
    made = run("euler_ancestral", curved_exactly, COMFY_START, sigmas, **options)
    np.testing.assert_allclose(made, expected, rtol=0, atol=2e-9)


@pytest.mark.parametrize("steps", [1, 2, 5, 28])
def test_without_eta_it_is_euler(steps):
    sigmas = flow_sigmas(steps, SCHEDULES["flux.1-dev"], 64, 64)
    noise = Recorded()
    made = run("euler_ancestral", curved, start(), sigmas, eta=0.0, noise=noise)
    np.testing.assert_allclose(made, run("euler", curved, start(), sigmas), rtol=0, atol=2e-6)
    assert noise.calls == 0
