"""LoHas, against what LyCORIS and PEFT compute with the same file."""

from __future__ import annotations

from pathlib import Path

import pytest
import random_flux
import random_sd3
import torch
from diffusers import FluxTransformer2DModel
from lycoris.modules.loha import LohaModule
from merged import check_against_lycoris, check_against_peft, lazily, random_numbers, stored, written_by_lycoris
from peft import LoHaConfig

from ditforge.export.checkpoint.adapters.fusing import fuse
from ditforge.export.families.sd3_layout import LAYOUT as SD3


@pytest.fixture(scope="module")
def dit() -> FluxTransformer2DModel:
    return random_flux.schnell().transformer


@pytest.mark.parametrize(("decompose", "strength"), [(False, 0.7), (True, 1.0)])
def test_of_lycoris(dit: FluxTransformer2DModel, decompose: bool, strength: float, tmp_path: Path) -> None:
    def make(layer: torch.nn.Module) -> torch.nn.Module:
        return LohaModule("x", layer, lora_dim=4, alpha=3, weight_decompose=decompose)

    check_against_lycoris(dit, make, tmp_path, strength)


def test_of_peft(tmp_path: Path) -> None:
    patterns = {"alpha_pattern": {"to_q": 5}, "rank_pattern": {"net.2": 2}}
    config = LoHaConfig(r=4, alpha=6, target_modules=["to_q", "net.2"], init_weights=False, **patterns)
    check_against_peft(config, tmp_path, lambda: random_flux.schnell().transformer, std=0.1)


@pytest.mark.parametrize("tucker", [False, True])
def test_convolutions(tucker: bool, tmp_path: Path) -> None:
    dit = random_sd3.medium().transformer
    weight = dit.pos_embed.proj.weight.detach()
    adapter = LohaModule("x", dit.pos_embed.proj, lora_dim=2, alpha=3, use_tucker=tucker)
    random_numbers(adapter)
    stored(written_by_lycoris(adapter, "lora_unet_x_embedder_proj"), tmp_path / "a.safetensors")
    fused = fuse({"transformer": lazily(dit, tmp_path)}, [(tmp_path / "a.safetensors", 0.7)], SD3)["transformer"]
    with torch.no_grad():
        theirs = weight + 0.7 * adapter.get_weight(weight.shape)
    torch.testing.assert_close(fused["pos_embed.proj.weight"].read(), theirs)
