"""Every exported graph computes what the PyTorch module computes, at several batch sizes and resolutions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from diffusers import FluxPipeline

from ditforge import manifest

SIZES = [(1, 4, 4), (3, 6, 10)]  # batch, latent height and width over 2


@pytest.fixture(scope="module", params=["schnell", "tiny"])
def exported(request: pytest.FixtureRequest) -> tuple[FluxPipeline, Path]:
    """A checkpoint as diffusers runs it, and its fp32 export."""
    stages = request.getfixturevalue(request.param)
    return FluxPipeline.from_pretrained(stages.checkpoint, dtype=torch.float32), stages.onnx


def run(folder: Path, component: str, **inputs: torch.Tensor) -> np.ndarray:
    session = ort.InferenceSession(folder / f"{component}.onnx", providers=["CPUExecutionProvider"])
    return session.run(None, {name: value.numpy() for name, value in inputs.items()})[0]


def assert_equal(actual: np.ndarray, expected: torch.Tensor) -> None:
    assert actual.shape == tuple(expected.shape)
    np.testing.assert_allclose(actual, expected.numpy(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("batch", [1, 3])
@torch.no_grad()
def test_text_encoders(exported, batch: int) -> None:
    pipeline, folder = exported
    prompts = ["a large red circle", "", "small green square above a blue one"][:batch]
    tokens = manifest.read(folder, "onnx").model.max_tokens
    embeds, pooled, _ = pipeline.encode_prompt(prompts, max_sequence_length=tokens["t5"])
    ids = {
        name: tokenizer(prompts, padding="max_length", truncation=True, max_length=tokens[name], return_tensors="pt")
        for name, tokenizer in (("clip", pipeline.tokenizer), ("t5", pipeline.tokenizer_2))
    }
    assert_equal(run(folder, "clip", clip_ids=ids["clip"].input_ids.int()), pooled)
    assert_equal(run(folder, "t5", t5_ids=ids["t5"].input_ids.int()), embeds)


@pytest.mark.parametrize(("batch", "rows", "columns"), SIZES)
@torch.no_grad()
def test_dit(exported, batch: int, rows: int, columns: int) -> None:
    pipeline, folder = exported
    described = manifest.read(folder, "onnx").components["dit"].inputs
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "latents": torch.randn(batch, 16, 2 * rows, 2 * columns, generator=generator),
        "timestep": torch.rand(batch, generator=generator),
        "prompt_embeds": torch.randn(batch, *described["prompt_embeds"].shape[1:], generator=generator),
        "pooled_embeds": torch.randn(batch, *described["pooled_embeds"].shape[1:], generator=generator),
    }
    if "guidance" in described:
        inputs["guidance"] = 1 + 4 * torch.rand(batch, generator=generator)
    velocity = pipeline.transformer(
        hidden_states=FluxPipeline._pack_latents(inputs["latents"], batch, 16, 2 * rows, 2 * columns),
        timestep=inputs["timestep"],
        guidance=inputs.get("guidance"),
        pooled_projections=inputs["pooled_embeds"],
        encoder_hidden_states=inputs["prompt_embeds"],
        txt_ids=torch.zeros(inputs["prompt_embeds"].shape[1], 3),
        img_ids=FluxPipeline._prepare_latent_image_ids(batch, rows, columns, "cpu", torch.float32),
        return_dict=False,
    )[0]
    expected = FluxPipeline._unpack_latents(velocity, 16 * rows, 16 * columns, 8)
    assert_equal(run(folder, "dit", **inputs), expected)


@pytest.mark.parametrize(("batch", "rows", "columns"), SIZES)
@torch.no_grad()
def test_vae_decoder(exported, batch: int, rows: int, columns: int) -> None:
    pipeline, folder = exported
    latents = torch.randn(batch, 16, 2 * rows, 2 * columns, generator=torch.Generator().manual_seed(1))
    vae = pipeline.vae
    decoded = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample
    expected = pipeline.image_processor.postprocess(decoded, output_type="np")
    image = run(folder, "vae_decoder", latents=latents)
    assert image.dtype == np.uint8
    # Where a value lies within 1e-4 of the middle between two 8-bit levels, either of them is right.
    assert np.abs(image - expected * 255).max() <= 0.5 + 255 * 1e-4


@pytest.mark.parametrize(("batch", "rows", "columns"), SIZES)
@torch.no_grad()
def test_vae_encoder(exported, batch: int, rows: int, columns: int) -> None:
    pipeline, folder = exported
    size = (batch, 16 * rows, 16 * columns, 3)
    image = torch.randint(0, 256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    vae = pipeline.vae
    pixels = pipeline.image_processor.normalize(image.permute(0, 3, 1, 2).float() / 255)
    expected = (vae.encode(pixels).latent_dist.mode() - vae.config.shift_factor) * vae.config.scaling_factor
    assert_equal(run(folder, "vae_encoder", image=image), expected)
