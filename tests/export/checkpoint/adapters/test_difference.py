"""Differences of weights, biases and norms, against what LyCORIS computes with the same file."""

from __future__ import annotations

from pathlib import Path

import pytest
import random_flux
import torch
from diffusers import FluxTransformer2DModel
from lycoris.modules.full import FullModule
from lycoris.modules.norms import NormModule
from merged import check_against_lycoris, lazily, merged, random_numbers, stored, written_by_lycoris

from ditforge.export.checkpoint.adapters.fusing import fuse
from ditforge.export.checkpoint.load_report import LoadReport
from ditforge.export.families.flux_layout import LAYOUT as FLUX


@pytest.fixture(scope="module")
def dit() -> FluxTransformer2DModel:
    return random_flux.schnell().transformer


def test_weights_and_biases(dit: FluxTransformer2DModel, tmp_path: Path) -> None:
    check_against_lycoris(dit, lambda layer: FullModule("x", layer), tmp_path, 0.7)


def test_norms_of_clip(tmp_path: Path) -> None:
    encoder = random_flux.schnell().text_encoder
    layers = dict(encoder.named_modules())
    name = next(name for name in layers if name.endswith("encoder.layers.0.layer_norm1"))
    adapter = NormModule("x", layers[name])
    random_numbers(adapter)
    stored(written_by_lycoris(adapter, "lora_te1_text_model_encoder_layers_0_layer_norm1"), tmp_path / "a.safetensors")
    fused = fuse({"text_encoder": lazily(encoder, tmp_path)}, [(tmp_path / "a.safetensors", 0.7)], FLUX)
    with torch.no_grad():
        weight, bias = adapter.get_merged_weight(0.7)
    torch.testing.assert_close(fused["text_encoder"][f"{name}.weight"].read(), weight)
    torch.testing.assert_close(fused["text_encoder"][f"{name}.bias"].read(), bias)


@pytest.mark.parametrize(
    "key",
    [
        "diffusion_model.double_blocks.0.img_attn.norm.query_norm.scale.diff",  # ComfyUI's, for what is no `weight`
        "lora_unet_double_blocks_0_img_attn_norm_query_norm.w_norm",
        "transformer.transformer_blocks.0.attn.norm_q.diff",
    ],
)
def test_norms_of_queries(dit: FluxTransformer2DModel, key: str, tmp_path: Path) -> None:
    before = dit.transformer_blocks[0].attn.norm_q.weight.detach()
    stored({key: torch.ones(24)}, tmp_path / "a.safetensors")
    state = merged(dit, [(tmp_path / "a.safetensors", 0.5)], tmp_path)
    torch.testing.assert_close(state["transformer_blocks.0.attn.norm_q.weight"], before + 0.5)


def test_a_whole_weight_has_no_strength(dit: FluxTransformer2DModel, tmp_path: Path) -> None:
    weight, report = torch.randn_like(dit.x_embedder.weight), LoadReport()
    stored({"diffusion_model.img_in.set_weight": weight}, tmp_path / "a.safetensors")
    state = merged(dit, [(tmp_path / "a.safetensors", 0.5)], tmp_path, report)
    torch.testing.assert_close(state["x_embedder.weight"], weight)
    assert "whole weights are replaced all the same" in str(report.unexpected[0])
