"""What a user asks for, checked against the model."""

from __future__ import annotations

import json
import math
import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st
from published import MODEL

from ditforge.client.options import MAX_GUIDANCE, GenerateOptions
from ditforge.client.request import Request, make_request
from ditforge.client.schedules import flow_sigmas
from ditforge.errors import DitforgeWarning, UserError
from ditforge.model import Model, SkipLayers

DEV = MODEL.model_copy(update={"default_size": 512, "max_size": 1000})  # no multiple of 16: 992 is the largest
WITH_T5 = {"with_t5": (True,)}
SCHNELL = DEV.model_copy(update={"name": "schnell", "guidance": "none", "default_guidance": 0.0, "default_steps": 4})

SD3 = DEV.model_copy(
    update={
        "name": "sd3",
        "guidance": "classifier-free",
        "default_guidance": 4.5,
        "skip_layers": SkipLayers(blocks=24, layers=(7, 8, 9), scale=2.8, start=0.01, stop=0.2),
        "max_tokens": {"clip_l": 77, "clip_g": 77, "t5": 256},
        "t5": "optional",
    }
)
CLIP_ONLY = SD3.model_copy(update={"name": "clip-only", "t5": "absent", "skip_layers": None})


def ask(model: Model = DEV, prompts: Any = ("a circle",), **options: Any) -> Request:
    return make_request(model, prompts, GenerateOptions(**options))


def sigmas(steps: int, model: Model = DEV, height: int = 512, width: int = 512) -> tuple[float, ...]:
    return tuple(map(float, flow_sigmas(steps, model.schedule, height // 8, width // 8)))


def test_defaults_are_the_models() -> None:
    asked = ask(seed=7)
    assert asked == Request(("a circle",), (7,), 512, 512, 3.5, sigmas(28), "euler", **WITH_T5)
    assert ask(SCHNELL, seed=7) == Request(("a circle",), (7,), 512, 512, 0.0, sigmas(4), "euler", **WITH_T5)


def test_default_seed_is_random() -> None:
    assert len({ask().seeds for _ in range(8)}) > 1


@given(first=st.integers(0, 2**64 - 9), count=st.integers(1, 8))
def test_each_prompt_has_the_next_seed(first: int, count: int) -> None:
    assert ask(prompts=["a"] * count, seed=first).seeds == tuple(range(first, first + count))


@pytest.mark.parametrize("seed", [-1, 2**64, 0.0, 1.5, "0", True, math.nan])
def test_seed(seed: object) -> None:
    with pytest.raises(UserError, match=r"(?s)seed must be .*got .*seed=0"):
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
        with pytest.raises(UserError, match=rf"(?s)1 to 1000, got {steps}\nfix: +steps="):
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
    option, suggested = refused.value.fix.split("=")
    assert option == name
    assert getattr(ask(**{name: int(suggested)}), name) == int(suggested)  # what the error proposes is accepted
    if 16 <= size <= 992:
        assert abs(int(suggested) - size) <= 8


@pytest.mark.parametrize("size", [512.0, "512", True, math.nan])
def test_size_that_is_no_integer(size: object) -> None:
    with pytest.raises(UserError, match=r"height=512"):
        ask(height=size)


@given(st.floats() | st.integers(-5, 500))
def test_guidance(guidance: float) -> None:
    if 0 <= guidance <= MAX_GUIDANCE:
        asked = ask(guidance=guidance).guidance
        assert asked == guidance
        assert isinstance(asked, float)
    else:
        with pytest.raises(UserError, match=r"(?s)guidance must be .* 0 to 100, got .*guidance=3\.5"):
            ask(guidance=guidance)


@pytest.mark.parametrize("guidance", ["3", [3.0], True])
def test_guidance_that_is_no_number(guidance: object) -> None:
    with pytest.raises(UserError, match="guidance"):
        ask(guidance=guidance)


def test_numbers_of_numpy() -> None:
    asked = ask(seed=np.uint64(7), steps=np.int64(4), height=np.int32(64), guidance=np.float32(2.5))
    assert asked == Request(("a circle",), (7,), 64, 512, 2.5, sigmas(4, height=64), "euler", **WITH_T5)
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
    with pytest.raises(
        UserError,
        match=rf"(?s)unknown sampler '.*ddim, dpmpp_2m, .*\nfix: +sampler=.{close}.",
    ):
        ask(sampler=name)


def test_parameters_of_each_picture() -> None:
    asked = ask(prompts=["a", "b"], seed=5, steps=3, height=64, guidance=2, sampler="heun")
    expected = {"seed": 6, "steps": 3, "height": 64, "width": 512, "guidance": 2.0, "sampler": "heun", "model": "dev"}
    assert asked.parameters(1, DEV) == {"prompt": "b", **expected}


# Negative prompts


def test_what_guidance_is_classifier_free() -> None:
    assert ask(SD3).cfg_scale(SD3) == 4.5
    assert ask(SD3, guidance=1).cfg_scale(SD3) == 1.0
    assert ask(DEV, guidance=5).cfg_scale(DEV) == 1.0  # embedded guidance is another thing
    assert ask(DEV, guidance=5, true_cfg=2).cfg_scale(DEV) == 2.0
    assert ask(SCHNELL, true_cfg=2, negative_prompt="blue").negative_prompt == "blue"
    with pytest.raises(UserError, match=r"(?s)guidance of sd3 is classifier-free.*guidance=3"):
        ask(SD3, true_cfg=3)


@pytest.mark.parametrize(
    ("model", "options", "fix"),
    [
        (DEV, {}, "true_cfg=4"),
        (SCHNELL, {"true_cfg": 1}, "true_cfg=4"),
        (SD3, {"guidance": 1}, "guidance=4.5"),
        (SD3.model_copy(update={"default_guidance": 0.0}), {}, "guidance=4"),
    ],
)
def test_negative_prompt_without_effect(model: Model, options: dict[str, Any], fix: str) -> None:
    with pytest.warns(DitforgeWarning, match=f"the negative prompt is ignored without {fix}"):
        asked = ask(model, negative_prompt="blue", **options)
    assert "negative_prompt" not in asked.parameters(0, model)


@pytest.mark.parametrize("prompt", [3, b"blue", ["blue"], "\udcff"])
def test_negative_prompt_that_is_no_text(prompt: object) -> None:
    with pytest.raises(UserError, match="negative_prompt"):
        ask(SD3, negative_prompt=prompt)


@pytest.mark.parametrize("option", ["true_cfg", "skip_layer_guidance"])
@given(scale=st.floats() | st.integers(-5, 500))
def test_other_scales(option: str, scale: float) -> None:
    model = DEV if option == "true_cfg" else SD3
    if 0 <= scale <= MAX_GUIDANCE:
        assert getattr(ask(model, **{option: scale}), option) == scale
    else:
        with pytest.raises(UserError, match=rf"{option} must be .* 0 to 100, got .*\nfix: +{option}="):
            ask(model, **{option: scale})


def test_skip_layer_guidance() -> None:
    assert ask(SD3).skip_layer_guidance == 0.0  # as in diffusers, it must be asked for
    assert ask(CLIP_ONLY, skip_layer_guidance=0).skip_layer_guidance == 0.0
    with pytest.raises(UserError, match="clip-only has no skip-layer guidance"):
        ask(CLIP_ONLY, skip_layer_guidance=2.8)
    with pytest.raises(UserError, match=r"(?s)on top of classifier-free guidance, which is off.*guidance=4\.5"):
        ask(SD3, guidance=1.0, skip_layer_guidance=2.8)


def test_parameters_that_had_an_effect() -> None:
    plain = ask(SD3, negative_prompt="blue", skip_layer_guidance=2.5, t5="auto").parameters(0, SD3)
    assert {key: plain[key] for key in ("negative_prompt", "skip_layer_guidance", "t5", "guidance")} == {
        "negative_prompt": "blue",
        "skip_layer_guidance": 2.5,
        "t5": "never",
        "guidance": 4.5,
    }
    assert "true_cfg" not in plain
    flux = ask(DEV, true_cfg=2).parameters(0, DEV)
    assert (flux["true_cfg"], flux["negative_prompt"]) == (2.0, "")
    assert not {"skip_layer_guidance", "t5"} & set(flux)


# T5


def test_t5_is_left_out_where_it_can_be() -> None:
    prompts = ["a red circle", "three red circles", "a blue square"]
    assert ask(SD3, prompts).with_t5 == ask(SD3, prompts, t5="always").with_t5 == (True, True, True)
    assert ask(SD3, prompts, t5="never").with_t5 == (False, False, False)
    assert ask(SD3, prompts, t5="auto").with_t5 == (False, True, False)
    assert ask(SD3, prompts, t5="auto", negative_prompt="7 legs, text").with_t5 == (False, True, False)
    assert ask(DEV, prompts, t5="auto").with_t5 == ask(DEV, prompts, t5="always").with_t5 == (True, True, True)
    assert ask(CLIP_ONLY, prompts, t5="auto").with_t5 == ask(CLIP_ONLY, prompts).with_t5 == (False, False, False)


@pytest.mark.parametrize(
    ("model", "t5", "problem"),
    [
        (DEV, "never", "dev cannot do without T5"),
        (CLIP_ONLY, "always", r"(?s)clip-only was exported without T5.*--text-encoders all"),
        (SD3, "sometimes", r"t5 must be one of auto, always, never, got 'sometimes'"),
    ],
)
def test_t5_that_cannot_be(model: Model, t5: str, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        ask(model, t5=t5)
