"""Guidance in NumPy, against a DiT and a server that are functions: what is asked of them, and what is made of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import published
import pytest

from ditforge.client.client import encode
from ditforge.client.guidance import guided, is_in_window
from ditforge.client.request import Request
from ditforge.client.samplers import SAMPLERS, find_sampler
from ditforge.client.schedules import flow_sigmas
from ditforge.model import Model, Schedule, SkipLayers

SKIP = SkipLayers(blocks=6, layers=(2, 4), scale=2.8, start=0.01, stop=0.2)
FLUX = published.MODEL.model_copy(update={"latent_channels": 4, "schedule": Schedule(kind="fixed", shift=3.0)})
SD3 = FLUX.model_copy(update={"guidance": "classifier-free", "skip_layers": SKIP, "t5": "optional"})
SIGMAS = flow_sigmas(28, SD3.schedule, 8, 8)


def request(count: int = 2, **options: Any) -> Request:
    defaults = {"sigmas": tuple(SIGMAS), "height": 64, "width": 64, "guidance": 4.5}
    defaults |= {"prompts": ("a",) * count, "seeds": tuple(range(count)), "with_t5": (True,) * count}
    return Request(**(defaults | options))


def text(value: float, prompts: int = 2) -> dict[str, np.ndarray]:
    """Embeddings that are one number a prompt: value, value + 1, …"""
    numbers = np.arange(prompts, dtype=np.float32) + value
    return {"prompt_embeds": numbers[:, None, None] * np.ones((1, 3, 5), np.float32), "pooled_embeds": numbers[:, None]}


class Dit:
    """Its velocity is the latents times sigma, plus the prompt's number, plus 100 for each block that is skipped."""

    def __init__(self) -> None:
        self.calls: list[dict[str, np.ndarray]] = []

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        self.calls.append(dict(inputs))
        assert len({len(array) for array in inputs.values()}) == 1
        assert {array.dtype for array in inputs.values()} == {np.dtype(np.float32)}
        shift = inputs["prompt_embeds"][:, 0, 0] + inputs["pooled_embeds"][:, 0]
        if "skip_layers" in inputs:
            shift = shift + 100 * inputs["skip_layers"].sum(axis=1)
        return inputs["latents"] * inputs["timestep"][:, None, None, None] + shift[:, None, None, None]


LATENTS = np.random.default_rng(0).standard_normal((2, 4, 8, 8)).astype(np.float32)
NUMBERS = np.array([0, 2], np.float32)[:, None, None, None]  # what the two prompts differ by


def test_without_guidance_the_prompt_alone_is_asked() -> None:
    dit = Dit()
    velocity = guided(dit, SD3, request(guidance=1.0), SIGMAS, text(5), None)(LATENTS, SIGMAS[3])
    np.testing.assert_allclose(velocity, LATENTS * SIGMAS[3] + 10 + NUMBERS, rtol=1e-6)
    (call,) = dit.calls
    assert {key: len(array) for key, array in call.items()} == dict.fromkeys(call, 2)
    assert not call["skip_layers"].any() and "guidance" not in call


def test_classifier_free_guidance_is_one_batch_of_two() -> None:
    dit = Dit()
    velocity = guided(dit, SD3, request(guidance=4.0), SIGMAS, text(5), text(1))(LATENTS, SIGMAS[3])
    expected = LATENTS * SIGMAS[3] + (2 + NUMBERS) + 4.0 * (10 - 2)
    np.testing.assert_allclose(velocity, expected, rtol=1e-5)
    (call,) = dit.calls
    np.testing.assert_array_equal(call["latents"], np.concatenate([LATENTS, LATENTS]))
    np.testing.assert_array_equal(call["prompt_embeds"][:, 0, 0], [1, 2, 5, 6])
    assert velocity.dtype == np.float32


def test_true_classifier_free_guidance_beside_embedded_guidance() -> None:
    dit = Dit()
    asked = request(guidance=3.5, true_cfg=2.0)
    velocity = guided(dit, FLUX, asked, SIGMAS, text(5), text(1))(LATENTS, SIGMAS[3])
    np.testing.assert_allclose(velocity, LATENTS * SIGMAS[3] + (2 + NUMBERS) + 2.0 * (10 - 2), rtol=1e-5)
    np.testing.assert_array_equal(dit.calls[0]["guidance"], np.full(4, 3.5, np.float32))
    assert "skip_layers" not in dit.calls[0]


def test_skip_layer_guidance_in_its_window() -> None:
    dit = Dit()
    asked = request(guidance=4.0, skip_layer_guidance=2.5)
    denoise = guided(dit, SD3, asked, SIGMAS, text(5), text(1))
    for step, sigma in enumerate(SIGMAS[:-1]):
        inside = step in range(1, 6)  # 0.28 < step < 5.6
        velocity = denoise(LATENTS, sigma)
        expected = LATENTS * sigma + (2 + NUMBERS) + 4.0 * (10 - 2) + inside * 2.5 * (0 - 200)
        np.testing.assert_allclose(velocity, expected, rtol=1e-5, atol=1e-3)
        assert len(dit.calls[-1]["latents"]) == (6 if inside else 4)
    assert len(dit.calls) == 28
    mask = dit.calls[1]["skip_layers"]
    assert mask.shape == (6, 6) and not mask[:4].any()
    np.testing.assert_array_equal(mask[4:], [[0, 0, 1, 0, 1, 0]] * 2)


@pytest.mark.parametrize("steps", [1, 4, 5, 28, 40, 100])
def test_the_window_is_diffusers(steps: int) -> None:
    sigmas = flow_sigmas(steps, SD3.schedule, 8, 8)
    for i, sigma in enumerate(sigmas[:-1]):
        assert is_in_window(sigma, sigmas, SKIP) == (steps * SKIP.start < i < steps * SKIP.stop)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_runs_with_it(sampler: str) -> None:
    asked = request(guidance=4.0, skip_layer_guidance=2.5)
    denoise = guided(Dit(), SD3, asked, SIGMAS, text(5), text(1))
    made = find_sampler(sampler)(denoise, LATENTS, SIGMAS, lambda: LATENTS)
    assert np.isfinite(made).all()


class Server:
    """In the place of a connection: an embedding is the prompt's length, negative without T5."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.calls: list[tuple[str, list[str]]] = []

    def infer(self, name: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        prompts = [prompt.decode() for prompt in inputs["prompt"][:, 0]]
        self.calls.append((name, prompts))
        sign = -1 if name == "text_encoders_clip" else 1
        numbers = sign * np.array([len(prompt) for prompt in prompts], np.float32)
        embeds = np.broadcast_to(numbers[:, None, None], (len(prompts), 3, 5))
        counts = np.ones((len(prompts), len(self.model.max_tokens)), np.int32)
        return {"prompt_embeds": embeds, "pooled_embeds": numbers[:, None], "prompt_tokens": counts}


def test_each_text_is_encoded_once_the_way_it_wants() -> None:
    server: Any = Server(SD3)
    prompts = ("red", "three cats", "red", "blue")
    asked = request(4, prompts=prompts, negative_prompt="no", with_t5=(False, True, False, False))
    embeds, negative = encode(server, asked)
    assert server.calls == [("text_encoders_clip", ["red", "blue", "no"]), ("text_encoders", ["three cats", "no"])]
    np.testing.assert_array_equal(embeds["pooled_embeds"][:, 0], [-3, 10, -3, -4])
    assert negative is not None
    np.testing.assert_array_equal(negative["pooled_embeds"][:, 0], [-2, 2, -2, -2])
    assert embeds["prompt_embeds"].shape == negative["prompt_embeds"].shape == (4, 3, 5)


def test_no_negative_prompt_is_encoded_in_vain() -> None:
    server: Any = Server(FLUX)
    _, negative = encode(server, request(2, prompts=("a", "b"), negative_prompt="no"))
    assert negative is None
    assert server.calls == [("text_encoders", ["a", "b"])]


def test_a_model_without_t5_has_one_way() -> None:
    server: Any = Server(SD3.model_copy(update={"t5": "absent", "max_tokens": {"clip": 77}}))
    encode(server, request(1, with_t5=(False,)))
    assert [name for name, _ in server.calls] == ["text_encoders"]
