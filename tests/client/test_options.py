"""The options of a picture: their names, and what no model takes."""

from __future__ import annotations

import math
from typing import Any, get_type_hints

import pytest

import ditforge.client
from ditforge.client import SAMPLERS, SCHEDULES, GenerateOptions
from ditforge.client.options import ELSEWHERE, NAMES, Options, make_options
from ditforge.errors import UserError
from ditforge.option import as_flags


def test_keywords_are_the_fields_and_the_callback() -> None:
    hints = get_type_hints(Options)
    assert "callback" in hints
    assert {name: hint for name, hint in hints.items() if name != "callback"} == get_type_hints(GenerateOptions)
    for name in NAMES:
        assert f"    {name}" in str(GenerateOptions.__doc__) or f", {name}:" in str(GenerateOptions.__doc__)


def test_what_is_public() -> None:
    assert sorted(dir(ditforge.client)) == sorted(ditforge.client.__all__)
    assert {"Client", "AsyncClient", "TLS", "GenerateOptions", "Step", "SAMPLERS", "SCHEDULES"} <= set(
        dir(ditforge.client)
    )
    assert all(getattr(ditforge.client, name) is not None for name in dir(ditforge.client))


def test_keywords_win() -> None:
    options, callback = make_options(GenerateOptions(seed=1, steps=4), {"steps": 5, "guidance": None})
    assert (options, callback) == (GenerateOptions(seed=1, steps=5), None)
    assert make_options(None, {"callback": print}) == (GenerateOptions(), print)
    with pytest.raises(AttributeError):
        options.steps = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("stepz", "steps=…"),
        ("num_inference_steps", "steps=…"),
        ("guidance_scale", "guidance=…"),
        ("cfg_scale", "guidance=…"),
        ("scheduler", "schedule=…"),
        ("sampler_name", "sampler=…"),
        ("generator", "seed=…"),
        ("negativ_prompt", "negative_prompt=…"),
        ("num_images_per_prompt", "generate([prompt] * 4, seed=0)"),
        ("prompt", "generate(prompt, …)"),
        ("xyzzy", "leave it out; the options are seed, steps, "),
    ],
)
def test_an_option_that_nobody_knows(name: str, fix: str) -> None:
    with pytest.raises(UserError) as error:
        make_options(None, {name: 3})  # type: ignore[misc]
    assert error.value.problem == f"there is no option {name!r}"
    assert fix in error.value.fix


def test_what_other_tools_call_it_is_an_option_here() -> None:
    assert set(ELSEWHERE.values()) <= {*NAMES, "callback"}
    assert not set(ELSEWHERE) & set(NAMES)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seed": -1}, "seed must be"),
        ({"seed": [1, "2"]}, "seed must be .* got '2'"),
        ({"steps": 0}, "steps must be"),
        ({"guidance": math.nan}, "guidance must be a number from 0 to 100, got nan"),
        ({"true_cfg": "3"}, "true_cfg must be"),
        ({"negative_prompt": 3}, "negative_prompt must be a string, got 3"),
        ({"t5": "sometimes"}, "t5 must be one of"),
        ({"size": "large"}, "size must be WIDTHxHEIGHT"),
        ({"size": "16:9", "width": 64}, "both the height and the width"),
        ({"sampler": "eular"}, "unknown sampler"),
        ({"sampler": ""}, "unknown sampler"),
        ({"schedule": "karas"}, "unknown schedule"),
        ({"schedule": "karras", "sigmas": [1, 0]}, "leave out schedule"),
        ({"steps": 3, "sigmas": [1, 0]}, "2 sigmas are 1 steps, and steps is 3"),
        ({"sigmas": [0, 1]}, "sigmas must fall from 1 to 0"),
        ({"eta": 0.5}, r"(?s)the sampler euler takes no eta\n.*ddim.*dpmpp_2m_sde.*euler_ancestral"),
        ({"sampler": "ddim", "s_noise": 1}, r"(?s)the sampler ddim takes no s_noise\n.*dpmpp_2m_sde"),
        ({"sampler": "ddim", "eta": 1.5}, "eta must be a number from 0 to 1, got 1.5"),
        ({"sampler": "euler_ancestral", "s_noise": -1}, "s_noise must be a number from 0 to 10, got -1"),
    ],
)
def test_what_no_model_takes(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        GenerateOptions(**options)


@pytest.mark.parametrize(
    ("options", "problem", "fix"),
    [
        ({"size": "16:9", "width": 64}, "--size 16:9 is both the height and the width", "leave out --width"),
        ({"size": "64x64", "width": 64, "height": 64}, "--size 64x64 is both", "leave out --height and --width"),
        ({"schedule": "karras", "sigmas": [1, 0]}, "--schedule would make", "leave out --schedule, or --sigmas"),
        ({"steps": 3, "sigmas": [1, 0]}, "2 --sigmas are 1 steps, and --steps is 3", "leave out --steps"),
        ({"sigmas": [0, 1]}, "--sigmas must fall", "--sigmas 1,0.75,0.5,0.25,0"),
        ({"negative_prompt": "a" * 32_001}, "--negative-prompt has at most 32,000 characters", "write a shorter one"),
        ({"negative_prompt": "\udcff"}, "--negative-prompt '\\udcff' is not text", "give it in UTF-8"),
    ],
)
def test_the_command_line_is_told_flags(options: dict[str, Any], problem: str, fix: str) -> None:
    with as_flags(), pytest.raises(UserError) as error:
        GenerateOptions(**options)
    assert problem in error.value.problem
    assert error.value.fix == fix


def test_every_name_is_taken() -> None:
    for sampler in SAMPLERS:
        for schedule in SCHEDULES:
            GenerateOptions(sampler=sampler, schedule=schedule)


def test_options_of_a_users_sampler() -> None:
    def mine(denoise, latents, sigmas, noise, callback=None, *, s_noise=0.5):  # type: ignore[no-untyped-def]
        return latents

    assert GenerateOptions(sampler=mine).sampler_options() == {"s_noise": 0.5}
    assert GenerateOptions(sampler=mine, s_noise=1).sampler_options() == {"s_noise": 1.0}
    with pytest.raises(UserError, match="the sampler mine takes no eta"):
        GenerateOptions(sampler=mine, eta=1)
