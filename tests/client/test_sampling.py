import warnings

import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)
from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps
from hypothesis import given, settings, strategies as st

from ditforge.client.sampling import (
    SAMPLERS,
    Schedule,
    Step,
    find_sampler,
    flow_sigmas,
    sample_dpmpp_2m,
    sample_euler,
    sample_heun,
)
from ditforge.errors import UserError

STEPS = [1, 2, 3, 4, 5, 8, 20, 28, 40, 50, 77, 100, 999, 1000]
LATENT_SIZES = [(32, 32), (64, 64), (128, 128), (96, 168), (130, 74), (256, 256)]

# scheduler/scheduler_config.json of the models, less the bookkeeping keys.
DYNAMIC = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
FLUX_DEV = {"num_train_timesteps": 1000, "shift": 3.0, "use_dynamic_shifting": True, **DYNAMIC}
FLUX_SCHNELL = {"num_train_timesteps": 1000, "shift": 1.0, "use_dynamic_shifting": False, **DYNAMIC}
SD35 = {"num_train_timesteps": 1000, "shift": 3.0, "use_dynamic_shifting": False}

SD35_SIGMA_MIN = FlowMatchEulerDiscreteScheduler.from_config(SD35).sigma_min
SCHEDULES = {
    "flux.1-dev": Schedule(kind="dynamic"),
    "flux.1-schnell": Schedule(kind="fixed", shift=1.0),
    "sd3.5": Schedule(kind="fixed", shift=3.0, sigma_min=SD35_SIGMA_MIN),
}
schedules = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())


def diffusers_sigmas(config, steps, height, width, pipeline_spaces):
    """The sigmas as FluxPipeline (which spaces them itself) or StableDiffusion3Pipeline has them set."""
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    options = {"sigmas": np.linspace(1.0, 1 / steps, steps)} if pipeline_spaces else {}
    if scheduler.config.use_dynamic_shifting:
        config = scheduler.config
        sizes = config.base_image_seq_len, config.max_image_seq_len
        options["mu"] = calculate_shift((height // 2) * (width // 2), *sizes, config.base_shift, config.max_shift)
    retrieve_timesteps(scheduler, steps, "cpu", **options)
    return scheduler.sigmas.numpy()


# --- schedules


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize(
    ("config", "pipeline_spaces", "schedule"),
    [
        (FLUX_DEV, True, SCHEDULES["flux.1-dev"]),
        (FLUX_SCHNELL, True, SCHEDULES["flux.1-schnell"]),
        (SD35, False, SCHEDULES["sd3.5"]),
        ({**FLUX_DEV, "time_shift_type": "linear"}, True, Schedule(kind="dynamic", time_shift="linear")),
        ({**FLUX_DEV, "max_shift": 0.9}, True, Schedule(kind="dynamic", max_shift=0.9)),
        ({**SD35, "use_dynamic_shifting": True}, False, Schedule(kind="dynamic", sigma_min=float(np.float32(0.001)))),
        ({**SD35, "shift": 7.0}, True, Schedule(kind="fixed", shift=7.0)),
    ],
    ids=["flux.1-dev", "flux.1-schnell", "sd3.5", "linear", "lower max_shift", "dynamic, own spacing", "shift 7"],
)
def test_sigmas_equal_diffusers(config, pipeline_spaces, schedule, steps):
    for height, width in LATENT_SIZES:
        ours = flow_sigmas(steps, schedule, height, width)
        assert ours.dtype == np.float32
        np.testing.assert_array_equal(ours, diffusers_sigmas(config, steps, height, width, pipeline_spaces))


@given(st.integers(1, 1000), st.integers(2, 256), st.integers(2, 256), st.sampled_from([*SCHEDULES.values()]))
@settings(max_examples=200, deadline=None)
def test_sigmas_fall_from_1_to_0(steps, height, width, schedule):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sigmas = flow_sigmas(steps, schedule, height, width)
    assert sigmas.shape == (steps + 1,)
    assert sigmas[0] == 1
    assert sigmas[-1] == 0
    assert (np.diff(sigmas) < 0).all()


def test_a_larger_picture_gets_more_noise_and_a_fixed_shift_does_not_look():
    dev, sd35 = SCHEDULES["flux.1-dev"], SCHEDULES["sd3.5"]
    assert (flow_sigmas(20, dev, 128, 128) > flow_sigmas(20, dev, 64, 64))[1:-1].all()
    assert np.array_equal(flow_sigmas(20, sd35, 128, 128), flow_sigmas(20, sd35, 64, 64))


def test_patch_size_says_how_many_cells_a_token_has():
    assert np.array_equal(
        flow_sigmas(20, Schedule(kind="dynamic", patch_size=1), 32, 48),
        flow_sigmas(20, Schedule(kind="dynamic"), 64, 96),
    )


@schedules
def test_a_schedule_survives_json(schedule):
    assert Schedule.model_validate_json(schedule.model_dump_json()) == schedule


@pytest.mark.parametrize("steps", [0, -1, 1001, 10**9, 2.0, "20", None, True])
def test_steps_outside_1_to_1000_are_refused(steps):
    with pytest.raises(UserError) as error:
        flow_sigmas(steps, Schedule(kind="fixed"), 64, 64)
    assert error.value.problem == f"steps must be from 1 to 1000, got {steps!r}"
    assert "--steps" in error.value.fix


def test_a_numpy_integer_counts_steps():
    assert np.array_equal(
        flow_sigmas(np.int64(7), SCHEDULES["flux.1-dev"], 64, 64), flow_sigmas(7, SCHEDULES["flux.1-dev"], 64, 64)
    )


# --- samplers, against diffusers


def curved(latents, sigma):
    """A velocity with curvature in both arguments, float32 like its arguments."""
    return (np.sin(2 * latents) - latents * sigma + np.float32(0.3)).astype(np.float32)


def start(shape=(2, 4, 8, 6), seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def diffusers_loop(scheduler, latents, sigma_of_timestep):
    """latents through a diffusers scheduler, with `curved` as the model."""
    scheduler.set_begin_index(0)
    sample = torch.from_numpy(latents)
    for i, timestep in enumerate(scheduler.timesteps):
        velocity = curved(sample.numpy(), np.float32(sigma_of_timestep(i, timestep)))
        sample = scheduler.step(torch.from_numpy(velocity), timestep, sample).prev_sample
    return sample.numpy()


@schedules
@pytest.mark.parametrize("steps", [1, 2, 4, 28, 100])
def test_euler_is_bit_equal_to_diffusers(schedule, steps):
    sigmas = flow_sigmas(steps, schedule, 64, 64)
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(steps)
    scheduler.sigmas = torch.from_numpy(sigmas)
    latents = sample_euler(curved, start(), sigmas)
    assert latents.dtype == np.float32
    np.testing.assert_array_equal(latents, diffusers_loop(scheduler, start(), lambda i, _: sigmas[i]))


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 30])
def test_heun_equals_diffusers(shift, steps):
    scheduler = FlowMatchHeunDiscreteScheduler(shift=shift)
    schedule = Schedule(kind="fixed", shift=shift, sigma_min=scheduler.sigma_min)
    scheduler.set_timesteps(steps)
    sigmas = flow_sigmas(steps, schedule, 64, 64)
    latents = sample_heun(curved, start(), sigmas)
    assert latents.dtype == np.float32
    reference = diffusers_loop(scheduler, start(), lambda _, timestep: float(timestep) / 1000)
    # diffusers takes its second velocity from (sample - denoised) / sigma_next, which magnifies rounding.
    longest = np.max(sigmas[:-2] / sigmas[1:-1], initial=1)
    np.testing.assert_allclose(latents, reference, rtol=0, atol=3e-6 + 2e-7 * longest)


@schedules
@pytest.mark.parametrize("begin", [0, 0.4], ids=["from noise", "from the middle"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 14, 15, 28, 100])
def test_dpmpp_2m_equals_diffusers(schedule, begin, steps):
    sigmas = flow_sigmas(steps, schedule, 64, 64)[int(begin * steps) :]
    scheduler = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    assert (scheduler.config.algorithm_type, scheduler.config.solver_type) == ("dpmsolver++", "midpoint")
    scheduler.set_timesteps(len(sigmas) - 1)
    scheduler.sigmas = torch.from_numpy(sigmas)
    latents = sample_dpmpp_2m(curved, start(), sigmas)
    assert latents.dtype == np.float32
    reference = diffusers_loop(scheduler, start(), lambda i, _: sigmas[i])
    np.testing.assert_allclose(latents, reference, rtol=0, atol=2e-5)


# --- samplers, against closed forms


def gaussian_velocity(mean, deviation):
    """The exact velocity where data is N(mean, deviation^2): the model that a perfect training would give."""

    def velocity(latents, sigma):
        alpha = 1 - sigma
        gain = alpha * deviation**2 / ((alpha * deviation) ** 2 + sigma**2)
        return (latents - mean - gain * (latents - alpha * mean)) / sigma

    return velocity


def error(sampler, steps, shift, mean=0.7, deviation=0.4):
    """How far a sampler ends from the flow's exact end, mean + deviation * noise, in float64."""
    sigmas = np.linspace(1, 0, steps + 1)
    sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
    noise = np.linspace(-2, 2, 9)
    return np.abs(sampler(gaussian_velocity(mean, deviation), noise, sigmas) - (mean + deviation * noise)).max()


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2)])
def test_halving_the_steps_shows_the_order(name, order, shift):
    errors = np.array([error(SAMPLERS[name], steps, shift) for steps in (256, 512, 1024)])
    np.testing.assert_allclose(np.log2(errors[:-1] / errors[1:]), order, atol=0.05)


def test_dpmpp_2m_is_second_order_between_two_finite_log_snrs():
    """Its order is a statement in lambda, so the steps are even in lambda and stay clear of the infinite ends."""

    def end(steps):
        sigmas = 1 / (1 + np.exp(np.linspace(-3, 3, steps + 1)))
        scale = np.hypot(0.4 * (1 - sigmas), sigmas)
        latents = 0.7 * (1 - sigmas[0]) + scale[0] * noise
        exact = 0.7 * (1 - sigmas[-1]) + scale[-1] * noise
        return np.abs(sample_dpmpp_2m(gaussian_velocity(0.7, 0.4), latents, sigmas) - exact).max()

    noise = np.linspace(-2, 2, 9)
    errors = np.array([end(steps) for steps in (256, 512, 1024)])
    np.testing.assert_allclose(np.log2(errors[:-1] / errors[1:]), 2, atol=0.1)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize(("name", "steps"), [("heun", 64), ("dpmpp_2m", 128)])
def test_second_order_beats_euler_at_equal_cost(name, steps, shift):
    assert error(SAMPLERS[name], steps, shift) < error(sample_euler, 128, shift) / 3


falling_sigmas = st.sets(st.integers(1, 63), max_size=12).map(
    lambda middle: np.array([64, *sorted(middle, reverse=True), 0], np.float32) / 64
)
samplers = pytest.mark.parametrize("sample", SAMPLERS.values(), ids=SAMPLERS.keys())


@samplers
@given(sigmas=falling_sigmas, seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_a_straight_flow_is_solved_exactly(sample, sigmas, seed):
    """In float64: where steps are very uneven, a multistep method multiplies rounding by their ratio."""
    noise, data = start(seed=seed).astype(np.float64), start(seed=seed + 100).astype(np.float64)
    latents = sample(lambda latents, sigma: noise - data, noise, sigmas.astype(np.float64))
    np.testing.assert_allclose(latents, data, rtol=0, atol=1e-11)


@samplers
@given(sigmas=falling_sigmas)
@settings(max_examples=30, deadline=None)
def test_a_known_picture_is_reached_from_any_noise(sample, sigmas):
    """Data that is one point: the velocity leads straight there, (x - data) / sigma."""
    data = start(seed=9)
    latents = sample(lambda latents, sigma: (latents - data) / sigma, start(), sigmas)
    np.testing.assert_allclose(latents, data, rtol=0, atol=1e-5)


# --- what all samplers share


@samplers
@schedules
def test_no_warning_and_no_nan_from_1_to_0(sample, schedule):
    for steps in (1, 2, 3, 28, 1000):
        with warnings.catch_warnings(), np.errstate(all="raise", under="ignore"):
            warnings.simplefilter("error")
            latents = sample(curved, start(), flow_sigmas(steps, schedule, 64, 64))
        assert latents.dtype == np.float32
        assert np.isfinite(latents).all()


@samplers
def test_samples_of_a_batch_do_not_mix(sample):
    sigmas = flow_sigmas(9, SCHEDULES["sd3.5"], 64, 64)
    batch = start((3, 4, 8, 6))
    alone = [sample(curved, batch[i : i + 1], sigmas) for i in range(3)]
    np.testing.assert_array_equal(sample(curved, batch, sigmas), np.concatenate(alone))


@samplers
def test_the_noise_is_left_as_it_was(sample):
    latents = start()
    sample(curved, latents, flow_sigmas(5, SCHEDULES["sd3.5"], 64, 64))
    assert np.array_equal(latents, start())


@samplers
def test_the_callback_sees_every_step_once_and_changes_nothing(sample):
    sigmas = flow_sigmas(6, SCHEDULES["flux.1-dev"], 64, 64)
    seen: list[Step] = []
    inputs = {}

    def denoise(latents, sigma):
        assert latents.shape == (2, 4, 8, 6)
        # Heun's second look at a level comes before the step from that level, which overwrites it here.
        inputs[sigma] = latents
        return curved(latents, sigma)

    latents = sample(denoise, start(), sigmas, seen.append)
    np.testing.assert_array_equal(latents, sample(curved, start(), sigmas))
    assert [step.index for step in seen] == list(range(6))
    assert [step.total for step in seen] == [6] * 6
    assert [step.sigma for step in seen] == list(sigmas[:-1])
    for step in seen:
        expected = inputs[step.sigma] - step.sigma * curved(inputs[step.sigma], step.sigma)
        np.testing.assert_allclose(step.denoised, expected, rtol=0, atol=1e-6)
    with pytest.raises(AttributeError):
        seen[0].index = 1


@pytest.mark.parametrize("steps", [1, 2, 7, 50])
@pytest.mark.parametrize(
    ("name", "expected"),
    [("euler", lambda n: n), ("heun", lambda n: 2 * n - 1), ("dpmpp_2m", lambda n: n)],
    ids=["euler", "heun", "dpmpp_2m"],
)
def test_how_often_a_sampler_calls_the_model(name, expected, steps):
    calls = []
    sigmas = flow_sigmas(steps, SCHEDULES["sd3.5"], 64, 64)
    find_sampler(name)(lambda latents, sigma: calls.append(sigma) or curved(latents, sigma), start(), sigmas)
    assert len(calls) == expected(steps)
    assert min(calls) > 0


def test_the_names():
    assert {"euler": sample_euler, "heun": sample_heun, "dpmpp_2m": sample_dpmpp_2m} == SAMPLERS
    assert all(find_sampler(name) is sampler for name, sampler in SAMPLERS.items())


@pytest.mark.parametrize(
    ("name", "closest"), [("eular", "euler"), ("Heun", "heun"), ("dpm++2m", "dpmpp_2m"), ("dpmpp-2m", "dpmpp_2m")]
)
def test_an_unknown_sampler_is_refused_with_the_closest_name(name, closest):
    with pytest.raises(UserError) as error:
        find_sampler(name)
    assert error.value.problem == f"unknown sampler {name!r}, known are euler, heun, dpmpp_2m"
    assert error.value.fix == f'--sampler {closest} (in Python: sampler="{closest}")'


def test_an_unknown_sampler_with_no_close_name_still_gets_a_fix():
    with pytest.raises(UserError) as error:
        find_sampler("zzzz")
    assert error.value.fix.startswith("--sampler euler ")
