"""OFTs, against what LyCORIS and PEFT compute with the same file."""

from __future__ import annotations

from pathlib import Path

import pytest
import random_flux
import single_files
import torch
from diffusers import FluxTransformer2DModel
from lycoris.modules.boft import ButterflyOFTModule
from lycoris.modules.diag_oft import DiagOFTModule
from merged import (
    authors_layer,
    check_against_lycoris,
    check_against_peft,
    effective,
    merged,
    random_numbers,
    stored,
)
from peft import OFTConfig
from torch import nn


@pytest.fixture(scope="module")
def dit() -> FluxTransformer2DModel:
    return random_flux.schnell().transformer


@pytest.mark.parametrize("options", [{}, {"constraint": 0.01, "rescaled": True}])
def test_of_lycoris(dit: FluxTransformer2DModel, options: dict[str, float], tmp_path: Path) -> None:
    """Blocks of a fused layer lie across its parts."""
    check_against_lycoris(dit, lambda layer: DiagOFTModule("x", layer, lora_dim=8, **options), tmp_path, 0.7, std=0.1)


def test_of_kohya(dit: FluxTransformer2DModel, tmp_path: Path) -> None:
    """sd-scripts (networks/oft_flux.py) numbers the parts of a fused layer, each rotated as LyCORIS rotates a layer."""
    written, expected = {}, {}
    for name, parts in {"single_blocks.0.linear1": (72, 72, 72, 288), "double_blocks.0.img_attn.proj": (72,)}.items():
        layer, key = authors_layer(dit, name), f"oft_unet_{name.replace('.', '_')}"
        written[f"{key}.alpha"] = torch.tensor(1e-3)
        rotated = []
        for number, rows in enumerate(layer.weight.detach().split(parts)):
            part = nn.Linear(rows.shape[1], rows.shape[0], bias=False)
            part.load_state_dict({"weight": rows.clone()})
            adapter = DiagOFTModule("x", part, lora_dim=4, constraint=1e-3)
            random_numbers(adapter, 0.1)
            written[f"{key}.oft_blocks.{number}"] = adapter.oft_blocks.detach()
            rotated.append(effective(adapter, part)[0])
        expected[f"{name}.weight"] = torch.cat(rotated)
    stored(written, tmp_path / "oft.safetensors")
    ours = single_files.flux_dit(merged(dit, [(tmp_path / "oft.safetensors", 1.0)], tmp_path))
    for name, before in single_files.flux_dit(dit.state_dict()).items():
        torch.testing.assert_close(ours[name], expected.get(name, before), rtol=1e-4, atol=1e-4)
        assert name not in expected or not torch.allclose(ours[name], before, atol=1e-3)


def test_butterflies(dit: FluxTransformer2DModel, tmp_path: Path) -> None:
    """The other layers have sizes that BOFT cannot divide."""

    def make(layer: object) -> ButterflyOFTModule:
        return ButterflyOFTModule("x", layer, lora_dim=18)

    check_against_lycoris(dit, make, tmp_path, 0.7, ("img_in",), std=0.1)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_cayley_neumann": False},
        *({"num_cayley_neumann_terms": terms} for terms in (2, 3, 4, 7)),
        {"coft": True, "eps": 0.01},
        {"block_share": True},
    ],
)
def test_of_peft(options: dict[str, object], tmp_path: Path) -> None:
    config = OFTConfig(oft_block_size=8, target_modules=["to_q", "x_embedder", "net.2"], **options)
    check_against_peft(config, tmp_path, lambda: random_flux.schnell().transformer, std=0.1)
