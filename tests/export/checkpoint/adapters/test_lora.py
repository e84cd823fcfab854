"""LoRAs, against what LyCORIS and PEFT compute with the same file."""

from __future__ import annotations

from pathlib import Path

import pytest
import random_flux
import random_sd3
import torch
from diffusers import FluxTransformer2DModel
from lycoris.modules.locon import LoConModule
from merged import check_against_lycoris, check_against_peft, lazily, random_numbers, stored, written_by_lycoris
from peft import LoraConfig

from ditforge.export.checkpoint.adapters.fusing import fuse
from ditforge.export.families.sd3_layout import LAYOUT as SD3


@pytest.fixture(scope="module")
def dit() -> FluxTransformer2DModel:
    return random_flux.schnell().transformer


@pytest.mark.parametrize("options", [{}, {"rs_lora": True}])
def test_of_lycoris(dit: FluxTransformer2DModel, options: dict[str, bool], tmp_path: Path) -> None:
    check_against_lycoris(dit, lambda layer: LoConModule("x", layer, lora_dim=4, alpha=3, **options), tmp_path, 0.7)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"lora_bias": True},
        {"bias": "all"},
        {"modules_to_save": ["proj_out"]},
        {"alpha_pattern": {"attn.to_q": 9, "to_q": 1, r"^single_transformer_blocks\.1\.attn.to_k": 5}},
        {"alpha_pattern": {"to_q": 1, "attn.to_q": 9}, "rank_pattern": {"to_[qk]": 2, "to_q": 3}},
    ],
)
def test_of_peft(options: dict[str, object], tmp_path: Path) -> None:
    """Alpha is in adapter_config.json; the first pattern that matches a module wins."""
    targets = ["to_q", "to_k", "net.2"]
    config = LoraConfig(r=4, lora_alpha=16, target_modules=targets, init_lora_weights=False, **options)
    check_against_peft(config, tmp_path, lambda: random_flux.schnell().transformer)


@pytest.mark.parametrize("tucker", [False, True])
def test_convolutions(tucker: bool, tmp_path: Path) -> None:
    dit = random_sd3.medium().transformer
    adapter = LoConModule("x", dit.pos_embed.proj, lora_dim=2, alpha=3, use_tucker=tucker)
    random_numbers(adapter)
    stored(written_by_lycoris(adapter, "lora_unet_x_embedder_proj"), tmp_path / "a.safetensors")
    fused = fuse({"transformer": lazily(dit, tmp_path)}, [(tmp_path / "a.safetensors", 0.7)], SD3)["transformer"]
    with torch.no_grad():
        theirs = adapter.get_merged_weight(0.7, dit.pos_embed.proj.weight.shape)[0]
    torch.testing.assert_close(fused["pos_embed.proj.weight"].read(), theirs)
