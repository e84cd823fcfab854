"""What a user asks for, checked against the model."""

from __future__ import annotations

import json
import math
import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st

from ditforge.client.request import MAX_GUIDANCE, Request, make_request
from ditforge.errors import DitforgeWarning, UserError
from ditforge.model import Model, Schedule

DEV = Model(
    name="dev",
    latent_channels=16,
    vae_factor=8,
    size_multiple=16,
    default_size=512,
    max_size=1000,  # not a multiple of 16: 992 is the largest
    default_steps=28,
    guidance="embedded",
    default_guidance=3.5,
    schedule=Schedule(kind="fixed"),
    max_tokens={"clip": 77, "t5": 512},
)
SCHNELL = DEV.model_copy(update={"name": "schnell", "guidance": "none", "default_guidance": 0.0, "default_steps": 4})


def ask(model: Model = DEV, prompts: Any = ("a circle",), **options: Any) -> Request:
    defaults = dict.fromkeys(("seed", "steps", "height", "width", "guidance")) | {"sampler": "euler"}
    return make_request(model, prompts, **(defaults | options))


def test_defaults_are_the_models() -> None:
    asked = ask(seed=7)
    assert asked == Request(("a circle",), (7,), 28, 512, 512, 3.5, "euler")
    assert ask(SCHNELL, seed=7) == Request(("a circle",), (7,), 4, 512, 512, 0.0, "euler")


def test_default_seed_is_random() -> None:
    assert len({ask().seeds for _ in range(8)}) > 1


@given(first=st.integers(0, 2**64 - 9), count=st.integers(1, 8))
def test_each_prompt_has_the_next_seed(first: int, count: int) -> None:
    assert ask(prompts=["a"] * count, seed=first).seeds == tuple(range(first, first + count))


@pytest.mark.parametrize("seed", [-1, 2**64, 0.0, 1.5, "0", True, math.nan])
def test_seed(seed: object) -> None:
    with pytest.raises(UserError, match=r"(?s)seed must be .*got .*--seed"):
        ask(seed=seed)


def test_last_seed() -> None:
    assert ask(seed=2**64 - 1).seeds == (2**64 - 1,)
    with pytest.raises(UserError, match=str(2**64)):
        ask(prompts=["a", "b"], seed=2**64 - 1)


@pytest.mark.parametrize("prompts", [(), [None], ["a", b"b"], [3], ["a", "\udcff"]])
def test_prompts(prompts: object) -> None:
    with pytest.raises(UserError, match="prompt"):
        ask(prompts=prompts)


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=4))
def test_any_text_is_a_prompt(prompts: list[str]) -> None:
    assert ask(prompts=prompts).prompts == tuple(prompts)


@given(st.integers())
def test_steps(steps: int) -> None:
    if 1 <= steps <= 1000:
        assert ask(steps=steps).steps == steps
    else:
        with pytest.raises(UserError, match=rf"(?s)1 to 1000, got {steps}\nfix: +--steps"):
            ask(steps=steps)


@pytest.mark.parametrize("steps", [2.0, "4", True, math.nan])
def test_steps_that_are_no_integer(steps: object) -> None:
    with pytest.raises(UserError, match="steps"):
        ask(steps=steps)


@pytest.mark.parametrize("name", ["height", "width"])
@given(size=st.integers(-64, 1100))
def test_size(name: str, size: int) -> None:
    if size % 16 == 0 and 16 <= size <= 1000:
        asked = ask(**{name: size})
        assert {"height": asked.height, "width": asked.width} == {"height": 512, "width": 512} | {name: size}
        return
    with pytest.raises(UserError) as refused:
        ask(**{name: size})
    assert refused.value.problem.startswith(name)
    assert str(size) in refused.value.problem
    option, suggested = refused.value.fix.split()
    assert option == f"--{name}"
    assert getattr(ask(**{name: int(suggested)}), name) == int(suggested)  # what the error proposes is accepted
    if 16 <= size <= 992:
        assert abs(int(suggested) - size) <= 8


@pytest.mark.parametrize("size", [512.0, "512", True, math.nan])
def test_size_that_is_no_integer(size: object) -> None:
    with pytest.raises(UserError, match=r"--height 512"):
        ask(height=size)


@given(st.floats() | st.integers(-5, 500))
def test_guidance(guidance: float) -> None:
    if 0 <= guidance <= MAX_GUIDANCE:
        asked = ask(guidance=guidance).guidance
        assert asked == guidance
        assert isinstance(asked, float)
    else:
        with pytest.raises(UserError, match=r"(?s)guidance must be .* 0 to 100, got .*--guidance 3\.5"):
            ask(guidance=guidance)


@pytest.mark.parametrize("guidance", ["3", [3.0], True])
def test_guidance_that_is_no_number(guidance: object) -> None:
    with pytest.raises(UserError, match="guidance"):
        ask(guidance=guidance)


def test_numbers_of_numpy() -> None:
    asked = ask(seed=np.uint64(7), steps=np.int64(4), height=np.int32(64), guidance=np.float32(2.5))
    assert asked == Request(("a circle",), (7,), 4, 64, 512, 2.5, "euler")
    json.dumps(asked.parameters(0, DEV))


def test_guidance_of_a_model_without() -> None:
    with pytest.warns(DitforgeWarning, match=r"schnell takes no guidance: 4 is ignored"):
        assert ask(SCHNELL, guidance=4).guidance == 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ask(SCHNELL).guidance == 0.0
    with pytest.raises(UserError, match="nan"):
        ask(SCHNELL, guidance=math.nan)


@pytest.mark.parametrize(("name", "close"), [("dpm++2m", "dpmpp_2m"), ("Heun", "heun"), ("", "euler")])
def test_sampler(name: str, close: str) -> None:
    with pytest.raises(UserError, match=rf"(?s)unknown sampler '.*euler, heun, dpmpp_2m\nfix: +--sampler {close}$"):
        ask(sampler=name)


def test_parameters_of_each_picture() -> None:
    asked = ask(prompts=["a", "b"], seed=5, steps=3, height=64, guidance=2, sampler="heun")
    expected = {"seed": 6, "steps": 3, "height": 64, "width": 512, "guidance": 2.0, "sampler": "heun", "model": "dev"}
    assert asked.parameters(1, DEV) == {"prompt": "b", **expected}
