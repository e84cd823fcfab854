"""OFTs, against what LyCORIS and PEFT compute with the same file."""

from __future__ import annotations

from pathlib import Path

import pytest
import random_flux
from diffusers import FluxTransformer2DModel
from lycoris.modules.boft import ButterflyOFTModule
from lycoris.modules.diag_oft import DiagOFTModule
from merged import check_against_lycoris, check_against_peft
from peft import OFTConfig


@pytest.fixture(scope="module")
def dit() -> FluxTransformer2DModel:
    return random_flux.schnell().transformer


@pytest.mark.parametrize("options", [{}, {"constraint": 0.01, "rescaled": True}])
def test_of_lycoris(dit: FluxTransformer2DModel, options: dict[str, float], tmp_path: Path) -> None:
    """Blocks of a fused layer lie across its parts."""
    check_against_lycoris(dit, lambda layer: DiagOFTModule("x", layer, lora_dim=8, **options), tmp_path, 0.7, std=0.1)


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
