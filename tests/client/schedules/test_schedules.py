import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps
from flows import SCHEDULES
from hypothesis import given, settings, strategies as st

from ditforge.client import schedules as schedules_of_ours
from ditforge.client.schedules import (
    SCHEDULES as NAMED,
    Spacing,
    find_schedule,
    flow_sigmas,
    make_sigmas,
    schedule_name,
)
from ditforge.errors import UserError
from ditforge.model import Schedule

STEPS = [1, 2, 3, 4, 5, 8, 20, 28, 40, 50, 77, 100, 999, 1000]
LATENT_SIZES = [(32, 32), (64, 64), (128, 128), (96, 168), (130, 74), (256, 256)]

# scheduler/scheduler_config.json of the models, less the bookkeeping keys.
DYNAMIC = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
FLUX_DEV = {"num_train_timesteps": 1000, "shift": 3.0, "use_dynamic_shifting": True, **DYNAMIC}
FLUX_SCHNELL = {"num_train_timesteps": 1000, "shift": 1.0, "use_dynamic_shifting": False, **DYNAMIC}
SD35 = {"num_train_timesteps": 1000, "shift": 3.0, "use_dynamic_shifting": False}

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


# --- the models' own


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
    assert "steps=28" in error.value.fix


def test_a_numpy_integer_counts_steps():
    assert np.array_equal(
        flow_sigmas(np.int64(7), SCHEDULES["flux.1-dev"], 64, 64), flow_sigmas(7, SCHEDULES["flux.1-dev"], 64, 64)
    )


# --- by name


def spacing(schedule: Schedule, height: int = 64, width: int = 64) -> Spacing:
    return Spacing(schedule, height, width)


@pytest.mark.parametrize("steps", [1, 2, 3, 8, 28, 100])
@pytest.mark.parametrize("name", ["karras", "exponential", "beta"])
@pytest.mark.parametrize(
    ("config", "pipeline_spaces", "schedule"),
    [(FLUX_DEV, True, "flux.1-dev"), (FLUX_SCHNELL, True, "flux.1-schnell"), (SD35, False, "sd3.5")],
)
def test_converted_sigmas_equal_diffusers(config, pipeline_spaces, schedule, name, steps):
    theirs = diffusers_sigmas({**config, f"use_{name}_sigmas": True}, steps, 96, 168, pipeline_spaces)
    ours = make_sigmas(name, steps, spacing(SCHEDULES[schedule], 96, 168))
    assert ours.dtype == np.float32
    # One is computed from levels that are rounded to float32, and powers differ in their last bits between CPUs.
    np.testing.assert_allclose(ours, theirs, rtol=2e-6, atol=1e-7)


SD3_SHIFT = Schedule(kind="fixed", shift=3.0)
FLUX_SHIFT = Schedule(kind="dynamic", base_shift=1.149999, max_shift=1.15)  # 1.15, at any size


@pytest.mark.parametrize(
    ("name", "schedule", "expected"),
    [
        ("simple", SD3_SHIFT, [1.0, 0.9477171, 0.8827161, 0.8003731, 0.6926802, 0.5458015, 0.3335925, 0.0]),
        ("simple", SCHEDULES["flux.1-schnell"], [1.0, 0.858, 0.715, 0.572, 0.429, 0.286, 0.143, 0.0]),
        ("simple", FLUX_SHIFT, [1.0, 0.9498948, 0.8875903, 0.8081407, 0.703169, 0.5582663, 0.344928, 0.0]),
        ("simple", FLUX_SHIFT, [1.0, 0.9045308, 0.7595109, 0.5128441, 0.0]),
        ("simple", FLUX_SHIFT, [1.0, 0.0]),
        ("sgm_uniform", SD3_SHIFT, [1.0, 0.9475425, 0.8827878, 0.8008373, 0.6937931, 0.5480456, 0.3379722, 0.0]),
        ("sgm_uniform", SD3_SHIFT, [1.0, 0.900359, 0.7511211, 0.5029851, 0.0]),
        ("sgm_uniform", SCHEDULES["flux.1-schnell"], [1.0, 0.75025, 0.5005, 0.25075, 0.0]),
        ("sgm_uniform", FLUX_SHIFT, [1.0, 0.9498901, 0.8876275, 0.808181, 0.7032984, 0.5584353, 0.3453481, 0.0]),
        ("sgm_uniform", FLUX_SHIFT, [1.0, 0.0]),
    ],
)
def test_sigmas_equal_comfyui(name, schedule, expected):
    """What simple_scheduler and normal_scheduler(sgm=True) of comfyanonymous/ComfyUI, comfy/samplers.py, return for
    ModelSamplingDiscreteFlow(shift=3 and 1) and ModelSamplingFlux(shift=1.15), to seven places.
    """
    ours = make_sigmas(name, len(expected) - 1, spacing(schedule))
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", NAMED)
@schedules
@given(st.integers(1, 1000), st.integers(2, 256), st.integers(2, 256))
@settings(max_examples=20, deadline=None)
def test_every_schedule_falls_from_1_to_0(name, schedule, steps, height, width):
    sigmas = make_sigmas(name, steps, spacing(schedule, height, width))
    assert (sigmas.shape, sigmas.dtype) == ((steps + 1,), np.float32)
    assert sigmas[0] == pytest.approx(1, abs=1e-6)
    assert sigmas[-1] == 0
    assert (np.diff(sigmas) < 0).all()


def test_a_schedule_is_a_file_of_its_name():
    folder = Path(schedules_of_ours.__file__).parent
    assert sorted(NAMED) == sorted(file.stem for file in folder.glob("[!_]*.py")) and next(iter(NAMED)) == "default"
    for name, function in NAMED.items():
        assert find_schedule(name) is function and function.__module__ == f"{schedules_of_ours.__name__}.{name}"
        assert schedule_name(function) == name


def test_default_is_the_models_own():
    for schedule in SCHEDULES.values():
        ours = make_sigmas("default", 28, spacing(schedule))
        np.testing.assert_array_equal(ours, flow_sigmas(28, schedule, 64, 64))


@pytest.mark.parametrize(("name", "close"), [("karas", "karras"), ("Beta", "beta"), ("sgm-uniform", "sgm_uniform")])
def test_an_unknown_schedule_is_refused_with_the_closest_name(name, close):
    with pytest.raises(UserError, match=rf"(?s)unknown schedule '{name}', known are default, .*schedule=.{close}."):
        find_schedule(name)


def test_a_function_is_a_schedule():
    def even(steps, spacing):
        return spacing.shift(np.linspace(1, 0, steps + 1))

    ours = make_sigmas(even, 4, spacing(SCHEDULES["flux.1-schnell"]))
    np.testing.assert_allclose(ours, [1, 0.75, 0.5, 0.25, 0])
    assert make_sigmas(even, 4, spacing(SD3_SHIFT))[2] == pytest.approx(0.75)
    assert make_sigmas(even, 4, spacing(SCHEDULES["flux.1-dev"]))[-1] == 0


@pytest.mark.parametrize(
    ("levels", "words"),
    [
        ([1, 0.5, 0.2, 0.1], "fall from 1 to 0"),
        ([0.9, 0.5, 0.2, 0], "fall from 1 to 0"),
        ([1, 0.5, 0.5, 0], "each level below the one before, got 1, 0.5, 0.5, 0"),
        ([1, float("nan"), 0.5, 0], "fall from 1 to 0"),
        ([1, 0.5, 0], "gave 3 levels for 3 steps"),
        ([[1, 0.5, 0.2, 0]], r"got shape \[1, 4\]"),
        ("none", "must be numbers"),
        (None, "must be a list"),
    ],
)
def test_levels_that_cannot_be(levels, words):
    def mine(steps, spacing):
        return levels

    with pytest.raises(UserError, match=words) as error:
        make_sigmas(mine, 3, spacing(SD3_SHIFT))
    assert "the schedule mine" in error.value.problem
    assert error.value.fix == "return 4 levels, which fall from 1 to 0"


def test_beta_without_scipy(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.special", None)
    with pytest.raises(UserError, match=r"needs scipy.*\nfix: +pip install scipy"):
        make_sigmas("beta", 4, spacing(SD3_SHIFT))
