"""What adapter files of several tools are, from their headers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from merged import stored

from ditforge.errors import UserError
from ditforge.export.checkpoint.adapters.description import describe_adapter
from ditforge.export.checkpoint.adapters.keys import is_adapter


def lora(name: str, down: str = "lora_down", up: str = "lora_up", rank: int = 4) -> dict[str, torch.Tensor]:
    return {f"{name}.{down}.weight": torch.ones(rank, 8), f"{name}.{up}.weight": torch.ones(8, rank)}


def alpha(name: str, value: float) -> dict[str, torch.Tensor]:
    return {f"{name}.alpha": torch.tensor(value, dtype=torch.bfloat16)}


FILES = {
    "kohya": (
        {
            **lora("lora_unet_double_blocks_0_img_attn_qkv"),
            **alpha("lora_unet_double_blocks_0_img_attn_qkv", 2),
            **lora("lora_te1_text_model_encoder_layers_0_mlp_fc1", rank=8),
            **alpha("lora_te1_text_model_encoder_layers_0_mlp_fc1", 8),
        },
        ({"LoRA": 2}, {4: 1, 8: 1}, {2.0: 1, 8.0: 1}, "Kohya", "FLUX.1", {"transformer": 1, "te1": 1}),
    ),
    "diffusers": (
        lora("transformer.transformer_blocks.0.attn.to_q", "lora_A", "lora_B"),
        ({"LoRA": 1}, {4: 1}, {}, "diffusers", "FLUX.1 or Stable Diffusion 3.5", {"transformer": 1}),
    ),
    "xlabs": (
        {f"double_blocks.0.processor.qkv_lora1.{part}.weight": torch.ones(8, 8) for part in ("up", "down")},
        ({"LoRA": 1}, {8: 1}, {}, "XLabs", "FLUX.1", {"transformer": 1}),
    ),
    "dora": (
        {
            **lora("diffusion_model.joint_blocks.0.x_block.attn.qkv"),
            "diffusion_model.joint_blocks.0.x_block.attn.qkv.dora_scale": torch.ones(8, 1),
            "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.diff": torch.ones(8, 8),
        },
        (
            {"DoRA": 1, "difference of whole weights": 1},
            {4: 1},
            {},
            "ComfyUI",
            "Stable Diffusion 3",
            {"transformer": 1, "t5xxl": 1},
        ),
    ),
    "lokr": (
        {"lycoris_transformer_blocks_0_attn_to_q.lokr_w1": torch.ones(2, 2)}
        | {"lycoris_transformer_blocks_0_attn_to_q.lokr_w2": torch.ones(4, 4)},
        ({"LoKr": 1}, {}, {}, "LyCORIS", "FLUX.1 or Stable Diffusion 3.5", {"transformer": 1}),
    ),
    "sdxl": (
        lora("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"),
        ({"LoRA": 1}, {4: 1}, {}, "Kohya", "Stable Diffusion 1, 2 or XL", {"transformer": 1}),
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_files(name: str, tmp_path: Path) -> None:
    tensors, (kinds, ranks, alphas, spelling, network, components) = FILES[name]
    stored(tensors, tmp_path / "a.safetensors")
    found = describe_adapter(tmp_path / "a.safetensors")
    assert is_adapter(tensors)
    assert (found.kinds, found.ranks, found.alphas, found.components) == (kinds, ranks, alphas, components)
    assert found.spelling.startswith(spelling) and found.network.startswith(network)
    assert not found.strange


def test_a_folder_of_peft(tmp_path: Path) -> None:
    stored(lora("base_model.model.transformer_blocks.0.attn.to_q", "lora_A", "lora_B"), tmp_path / "a.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 16}))
    found = describe_adapter(tmp_path / "a.safetensors")
    assert (found.spelling, found.alphas, found.settings.config("")["r"]) == ("PEFT", {16.0: 1}, 4)


def test_what_is_none(tmp_path: Path) -> None:
    assert not is_adapter(["double_blocks.0.img_attn.qkv.weight", "double_blocks.0.img_attn.qkv.bias"])
    stored({"double_blocks.0.img_attn.qkv.weight": torch.ones(2, 2)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"whole weights, such as .* and no adapter"):
        describe_adapter(tmp_path / "a.safetensors")
