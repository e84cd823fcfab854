"""LoKrs, against what LyCORIS and PEFT compute with the same file."""

from __future__ import annotations

from pathlib import Path

import pytest
import random_flux
import random_sd3
import torch
from diffusers import FluxTransformer2DModel
from lycoris.modules.lokr import LokrModule
from merged import check_against_lycoris, check_against_peft, lazily, random_numbers, stored, written_by_lycoris
from peft import LoKrConfig

from ditforge.export.checkpoint.adapters.fusing import fuse
from ditforge.export.families.sd3_layout import LAYOUT as SD3


@pytest.fixture(scope="module")
def dit() -> FluxTransformer2DModel:
    return random_flux.schnell().transformer


@pytest.mark.parametrize(
    ("options", "strength"),
    [
        ({"lora_dim": 2, "factor": 4}, 0.7),
        ({"lora_dim": 1, "factor": 8, "decompose_both": True}, 0.7),
        ({"lora_dim": 9999, "factor": 4, "full_matrix": True}, 0.7),
        ({"lora_dim": 2, "factor": 4, "weight_decompose": True}, 1.0),
    ],
)
def test_of_lycoris(dit: FluxTransformer2DModel, options: dict[str, int], strength: float, tmp_path: Path) -> None:
    """If both matrices are whole, alpha has no meaning."""
    check_against_lycoris(dit, lambda layer: LokrModule("x", layer, alpha=3, **options), tmp_path, strength)


def test_an_alpha_beside_whole_matrices_is_none(dit: FluxTransformer2DModel, tmp_path: Path) -> None:
    name, first, second = "x_embedder", torch.randn(8, 4), torch.randn(9, 16)
    tensors = {f"{name}.lokr_w1": first, f"{name}.lokr_w2": second, f"{name}.alpha": torch.tensor(1e10)}
    stored(tensors, tmp_path / "a.safetensors")
    fused = fuse({"transformer": lazily(dit, tmp_path)}, [(tmp_path / "a.safetensors", 1.0)], None)["transformer"]
    theirs = dit.x_embedder.weight.detach() + torch.kron(first, second)
    torch.testing.assert_close(fused["x_embedder.weight"].read(), theirs)


@pytest.mark.parametrize("options", [{"r": 2}, {"r": 1, "decompose_both": True}, {"r": 64}])
def test_of_peft(options: dict[str, int], tmp_path: Path) -> None:
    """PEFT scales even the product of two whole matrices."""
    config = LoKrConfig(alpha=6, target_modules=["to_q", "net.2"], init_weights=False, **options)
    check_against_peft(config, tmp_path, lambda: random_flux.schnell().transformer, std=0.1)


@pytest.mark.parametrize("tucker", [False, True])
def test_convolutions(tucker: bool, tmp_path: Path) -> None:
    dit = random_sd3.medium().transformer
    weight = dit.pos_embed.proj.weight.detach()
    adapter = LokrModule("x", dit.pos_embed.proj, lora_dim=2, alpha=3, use_tucker=tucker, factor=4)
    random_numbers(adapter)
    stored(written_by_lycoris(adapter, "lora_unet_x_embedder_proj"), tmp_path / "a.safetensors")
    fused = fuse({"transformer": lazily(dit, tmp_path)}, [(tmp_path / "a.safetensors", 0.7)], SD3)["transformer"]
    with torch.no_grad():
        theirs = weight + 0.7 * adapter.get_weight(weight.shape)
    torch.testing.assert_close(fused["pos_embed.proj.weight"].read(), theirs)
