"""Which published models adapters fit."""

from __future__ import annotations

from pathlib import Path

import torch
from merged import stored

from ditforge.export.checkpoint.adapters.fitting import fits


def lora(name: str, inputs: int, outputs: int) -> dict[str, torch.Tensor]:
    return {f"{name}.lora_down.weight": torch.zeros(1, inputs), f"{name}.lora_up.weight": torch.zeros(outputs, 1)}


def test_published_models(tmp_path: Path) -> None:
    """FLUX.1-dev's LoRAs fit schnell but for the guidance; shapes tell the sizes of Stable Diffusion 3.5 apart."""
    flux = lora("lora_unet_double_blocks_18_img_attn_qkv", 3072, 9216)
    flux |= lora("lora_unet_guidance_in_in_layer", 256, 3072)
    flux |= lora("lora_te3_encoder_block_0_layer_0_SelfAttention_q", 4096, 4096)
    stored(flux, tmp_path / "flux.safetensors")
    dev, schnell, *others = fits(tmp_path / "flux.safetensors")
    assert (dev.model, dev.matched, dev.lacking, dev.whole) == ("flux.1-dev", 3, (), True)
    assert (schnell.model, schnell.matched, schnell.whole) == ("flux.1-schnell", 2, True)
    assert schnell.lacking == ("lora_unet_guidance_in_in_layer",)
    assert [(fit.matched, fit.whole) for fit in others] == [(1, False)] * 3  # all have this T5
    stored(lora("transformer.transformer_blocks.0.attn.to_q", 2432, 2432), tmp_path / "sd3.safetensors")
    found = {fit.model: fit for fit in fits(tmp_path / "sd3.safetensors")}
    assert {name for name, fit in found.items() if fit.whole} == {"sd3.5-large", "sd3.5-large-turbo"}
    assert found["sd3.5-medium"].misfits == ("transformer.transformer_blocks.0.attn.to_q",)
