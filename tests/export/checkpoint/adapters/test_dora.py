"""DoRAs, against what LyCORIS and PEFT compute with the same file."""

from __future__ import annotations

from pathlib import Path

import pytest
import random_flux
import single_files
import torch
from diffusers import FluxTransformer2DModel
from lycoris.functional.general import apply_dora_scale
from lycoris.modules.locon import LoConModule
from merged import (
    authors_layer,
    check_against_lycoris,
    check_against_peft,
    merged,
    random_numbers,
    saved_by_peft,
    stored,
    written_by_lycoris,
)
from peft import LoraConfig, PeftModel


@pytest.fixture(scope="module")
def dit() -> FluxTransformer2DModel:
    return random_flux.schnell().transformer


@pytest.mark.parametrize("rows", [True, False])
def test_of_lycoris(dit: FluxTransformer2DModel, rows: bool, tmp_path: Path) -> None:
    """Lengths are those of rows, or, as older versions have them, those of columns."""

    def make(layer: torch.nn.Module) -> torch.nn.Module:
        return LoConModule("x", layer, lora_dim=4, alpha=3, weight_decompose=True, wd_on_out=rows)

    check_against_lycoris(dit, make, tmp_path)


def test_the_strength_mixes_the_weights(dit: FluxTransformer2DModel, tmp_path: Path) -> None:
    """With a strength of 0, nothing changes."""
    name = "double_blocks.0.img_attn.qkv"
    layer = authors_layer(dit, name)
    adapter = LoConModule("x", layer, lora_dim=4, alpha=3, weight_decompose=True, wd_on_out=False)
    random_numbers(adapter)
    stored(written_by_lycoris(adapter, name), tmp_path / "a.safetensors")
    with torch.no_grad():
        delta = adapter.get_diff_weight(1, layer.weight.shape)[0]
    for strength in (0.0, 0.4):
        state = single_files.flux_dit(merged(dit, [(tmp_path / "a.safetensors", strength)], tmp_path))
        theirs = apply_dora_scale(layer.weight.detach(), delta, adapter.dora_scale.detach(), strength)
        torch.testing.assert_close(state[f"{name}.weight"], theirs, rtol=1e-4, atol=1e-4)


def test_of_peft(tmp_path: Path) -> None:
    targets = ["to_q", "x_embedder", "net.2"]
    config = LoraConfig(r=4, lora_alpha=6, target_modules=targets, init_lora_weights=False, use_dora=True)
    check_against_peft(config, tmp_path, lambda: random_flux.schnell().transformer)


def test_several_at_a_strength(tmp_path: Path) -> None:
    """PEFT merges one after the other, with the norms of the checkpoint's weights, and scales what is added."""
    files = []
    for number in range(2):
        config = LoraConfig(r=4, lora_alpha=6, target_modules=["to_q"], init_lora_weights=False, use_dora=True)
        saved_by_peft(random_flux.schnell().transformer, config, tmp_path / str(number), std=0.1 + number)
        files.append(tmp_path / str(number) / "adapter_model.safetensors")
    ours = merged(random_flux.schnell().transformer, [(files[0], 0.5), (files[1], 1.5)], tmp_path)
    model = PeftModel.from_pretrained(random_flux.schnell().transformer, tmp_path / "0", adapter_name="0")
    model.load_adapter(tmp_path / "1", "1")
    for module in model.modules():
        if hasattr(module, "set_scale") and "0" in getattr(module, "scaling", {}):
            module.set_scale("0", 0.5)
            module.set_scale("1", 1.5)
    theirs = model.merge_and_unload(adapter_names=["0", "1"]).state_dict()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=1e-4)
