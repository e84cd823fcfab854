"""The whole chain against stock diffusers: the same prompt, seed and steps give the same picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline

from ditforge.client import Client

PROMPTS = [
    "a large red circle above a small blue square on a white background",
    "a small green triangle to the left of a large yellow square on a black background",
    "",
]
LARGEST_DIFFERENCE = 2  # of 255, at every pixel


def diffusers_picture(checkpoint: Path, client: Client, prompt: str, seed: int, **options: int) -> np.ndarray:
    """Stock diffusers on the CPU in fp32, with the number of T5 tokens that the model was exported for."""
    pipeline = FluxPipeline.from_pretrained(checkpoint, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(
        prompt,
        height=options["height"],
        width=options["width"],
        num_inference_steps=options["steps"],
        guidance_scale=options.get("guidance", 0.0),
        max_sequence_length=client.model.max_tokens["t5"],
        generator=torch.Generator("cpu").manual_seed(seed),
    ).images[0]
    return np.asarray(image, np.int16)


def assert_same_picture(checkpoint: Path, client: Client, prompt: str, seed: int, **options: int) -> None:
    ours = np.asarray(client.generate(prompt, seed=seed, **options), np.int16)
    theirs = diffusers_picture(checkpoint, client, prompt, seed, **options)
    assert ours.shape == theirs.shape == (options["height"], options["width"], 3)
    assert theirs.std() > 5, "a picture of one colour would prove nothing"
    assert np.abs(ours - theirs).max() <= LARGEST_DIFFERENCE


@pytest.mark.parametrize(("height", "width"), [(128, 128), (96, 160)])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_flux_tiny(tiny, tiny_server, prompt: str, height: int, width: int) -> None:
    with Client(tiny_server.url) as client:
        for seed, guidance in ((0, 3.5), (2**40 + 7, 1.5)):
            options = {"steps": 12, "guidance": guidance}
            assert_same_picture(tiny.checkpoint, client, prompt, seed, height=height, width=width, **options)


@pytest.mark.parametrize(("height", "width"), [(96, 96), (64, 160), (16, 16)])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_checkpoint_of_other_sizes(schnell, schnell_server, prompt: str, height: int, width: int) -> None:
    """Another width, depth, text length and schedule, and no guidance embedding: through the same code."""
    with Client(schnell_server.url) as client:
        assert_same_picture(schnell.checkpoint, client, prompt, 3, height=height, width=width, steps=4)


def test_guidance_does_something(tiny_server) -> None:
    with Client(tiny_server.url) as client:
        low, high = (np.asarray(client.generate(PROMPTS[0], seed=1, guidance=g), np.int16) for g in (1.0, 5.0))
    assert np.abs(low - high).mean() > 0.5
