"""diffusers' own pipelines, as calibration and the measuring of linears run them."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiffusionPipeline

from ditforge.export.checkpoint import Checkpoint
from ditforge.model import Model


def load(cls: type[DiffusionPipeline], checkpoint: Checkpoint, **components: Any) -> Any:
    """The checkpoint's pipeline, of the class `cls`: bf16 on a GPU, fp32 without one.

    `components` take the place of the checkpoint's; None leaves one out.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    pipeline = cls.from_pretrained(checkpoint.folder, dtype=dtype, **components).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def run(pipeline: DiffusionPipeline, model: Model, prompt: str, steps: int, seed: int, t5_tokens: int) -> None:
    """All steps of a picture of the model's own size and guidance, without decoding it."""
    pipeline(
        prompt,
        height=model.default_size,
        width=model.default_size,
        num_inference_steps=steps,
        guidance_scale=model.default_guidance,
        max_sequence_length=t5_tokens,
        generator=torch.Generator("cpu").manual_seed(seed),
        output_type="latent",
    )
