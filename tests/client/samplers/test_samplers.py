"""What all samplers share, and how they are found."""

from __future__ import annotations

import warnings
from dataclasses import fields
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from flows import SCHEDULES, Recorded, curved, gaussian_velocity, run, start
from hypothesis import given, settings, strategies as st

import ditforge.client.samplers
from ditforge.client.noise import BatchNoise
from ditforge.client.options import GenerateOptions
from ditforge.client.samplers import SAMPLERS, Step, find_sampler, sampler_name, sampler_options
from ditforge.client.schedules import flow_sigmas
from ditforge.errors import UserError

STOCHASTIC = ["ddim", "dpmpp_2m_sde", "euler_ancestral", "lcm"]
KNOWN = ["euler", "heun", "dpmpp_2m", *STOCHASTIC]  # others may come, with other counts and options
MOST_NOISE = {"ddim": {"eta": 1.0}}

falling_sigmas = st.sets(st.integers(1, 63), max_size=12).map(
    lambda middle: np.array([64, *sorted(middle, reverse=True), 0], np.float32) / 64
)
samplers = pytest.mark.parametrize("name", SAMPLERS)
schedules = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())


@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m", "ddim"])
@given(sigmas=falling_sigmas, seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_a_straight_flow_is_solved_exactly(name, sigmas, seed):
    """In float64: where steps are very uneven, a multistep method multiplies rounding by their ratio."""
    noise, data = start(seed=seed).astype(np.float64), start(seed=seed + 100).astype(np.float64)
    latents = run(name, lambda latents, sigma: noise - data, noise, sigmas.astype(np.float64))
    np.testing.assert_allclose(latents, data, rtol=0, atol=1e-11)


@samplers
@given(sigmas=falling_sigmas)
@settings(max_examples=30, deadline=None)
def test_a_known_picture_is_reached_from_any_noise(name, sigmas):
    """Data that is one point: the velocity leads straight there, (x - data) / sigma."""
    data = start(seed=9)
    latents = run(name, lambda latents, sigma: (latents - data) / sigma, start(), sigmas, **MOST_NOISE.get(name, {}))
    np.testing.assert_allclose(latents, data, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", STOCHASTIC[:-1])
def test_noise_leaves_the_distribution_as_it_is(name):
    """With the model that a perfect training gives for data N(0.7, 0.4^2), pictures are N(0.7, 0.4^2)."""
    noise = BatchNoise([3], (1, 128, 128))
    latents = noise().astype(np.float64)
    sigmas = np.linspace(1, 0, 201)
    made = run(name, gaussian_velocity(0.7, 0.4), latents, sigmas, noise=noise, **MOST_NOISE.get(name, {}))
    assert made.mean() == pytest.approx(0.7, abs=0.015)
    assert made.std() == pytest.approx(0.4, abs=0.015)
    assert abs(np.corrcoef(made.ravel(), latents.ravel())[0, 1]) < 0.9  # and they are others


@samplers
@schedules
def test_no_warning_and_no_nan_from_1_to_0(name, schedule):
    for steps in (1, 2, 3, 28, 1000):
        with warnings.catch_warnings(), np.errstate(all="raise", under="ignore"):
            warnings.simplefilter("error")
            latents = run(name, curved, start(), flow_sigmas(steps, schedule, 64, 64))
        assert latents.dtype == np.float32
        assert np.isfinite(latents).all()


@samplers
def test_a_picture_of_a_batch_is_the_one_that_it_is_alone(name):
    """Whatever its place: each has its own noise."""
    sigmas, shape = flow_sigmas(9, SCHEDULES["sd3.5"], 64, 64), (4, 8, 6)
    options = MOST_NOISE.get(name, {})

    def make(*seeds):
        noise = BatchNoise(seeds, shape)
        return run(name, curved, noise(), sigmas, noise=noise, **options)

    together = make(5, 6, 7)
    for i, seed in enumerate((5, 6, 7)):
        np.testing.assert_array_equal(make(seed)[0], together[i])
    np.testing.assert_array_equal(make(7, 5)[1], together[0])


@samplers
def test_the_noise_is_left_as_it_was(name):
    latents = start()
    run(name, curved, latents, flow_sigmas(5, SCHEDULES["sd3.5"], 64, 64))
    assert np.array_equal(latents, start())


@samplers
def test_the_callback_sees_every_step_once_and_changes_nothing(name):
    sigmas = flow_sigmas(6, SCHEDULES["flux.1-dev"], 64, 64)
    seen: list[Step] = []
    inputs = {}

    def denoise(latents, sigma):
        assert latents.shape == (2, 4, 8, 6)
        # Heun's second look at a level comes before the step from that level, which overwrites it here.
        inputs[sigma] = latents
        return curved(latents, sigma)

    latents = run(name, denoise, start(), sigmas, callback=seen.append)
    np.testing.assert_array_equal(latents, run(name, curved, start(), sigmas))
    assert [step.index for step in seen] == list(range(6))
    assert [step.total for step in seen] == [6] * 6
    assert [step.sigma for step in seen] == list(sigmas[:-1])
    for step in seen:
        expected = inputs[step.sigma] - step.sigma * curved(inputs[step.sigma], step.sigma)
        np.testing.assert_allclose(step.denoised, expected, rtol=0, atol=1e-6)
    with pytest.raises(AttributeError):
        seen[0].index = 1


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_how_often_a_sampler_calls_the_model(name, steps):
    calls = []
    noise = Recorded()
    sigmas = flow_sigmas(steps, SCHEDULES["sd3.5"], 64, 64)
    run(name, lambda latents, sigma: calls.append(sigma) or curved(latents, sigma), start(), sigmas, noise=noise)
    assert len(calls) == (2 * steps - 1 if name == "heun" else steps)
    assert min(calls) > 0
    assert noise.calls == (steps - 1 if name in STOCHASTIC[1:] else 0)


# --- how they are found


def test_each_file_is_a_sampler():
    folder = Path(ditforge.client.samplers.__file__).parent
    assert set(SAMPLERS) == {path.stem for path in folder.glob("*.py")} - {"__init__"}
    assert set(KNOWN) <= set(SAMPLERS)
    for name in SAMPLERS:
        assert find_sampler(name).__name__ == f"sample_{name}"
        assert sampler_name(find_sampler(name)) == name


def test_their_options():
    for name in SAMPLERS:
        assert set(sampler_options(name)) <= {field.name for field in fields(GenerateOptions)}
    taken = {name: sampler_options(name) for name in KNOWN if sampler_options(name)}
    both = {"eta": 1.0, "s_noise": 1.0}
    assert taken == {"ddim": {"eta": 0.0}, "dpmpp_2m_sde": both, "euler_ancestral": both}


@pytest.mark.parametrize(
    ("name", "closest"),
    [
        ("eular", "euler"),
        ("Heun", "heun"),
        ("dpm++2m", "dpmpp_2m"),
        ("dpmpp-2m", "dpmpp_2m"),
        ("DPM++ 2M SDE", "dpmpp_2m_sde"),
        ("Euler ancestral", "euler_ancestral"),
        ("zzzz", "euler"),
    ],
)
def test_an_unknown_sampler_is_refused_with_the_closest_name(name, closest):
    with pytest.raises(UserError) as error:
        find_sampler(name)
    assert error.value.problem == f"unknown sampler {name!r}, known are {', '.join(SAMPLERS)}"
    assert f'sampler="{closest}"' in error.value.fix


def test_a_function_is_a_sampler():
    def mine(denoise, latents, sigmas, noise, callback=None, *, eta=0.5, power=2):
        return latents

    assert find_sampler(mine) is mine
    assert (sampler_name(mine), sampler_name(partial(mine, power=3))) == ("mine", "mine")
    assert sampler_options(mine) == {"eta": 0.5, "power": 2}

    def euler(denoise, latents, sigmas, noise, callback=None):
        return latents

    assert sampler_name(euler).endswith(".euler")  # its pictures are not ours


@pytest.mark.parametrize("function", [lambda latents: latents, lambda a, b, c, d, e, f: a, len])
def test_a_function_that_is_none(function):
    with pytest.raises(UserError, match="cannot be called as one"):
        find_sampler(function)
