"""The layout of FLUX.1 in one file, as Black Forest Labs (BFL) and ComfyUI write it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from diffusers.loaders import single_file_utils

from ditforge.export.checkpoint.conversion import Tensors
from ditforge.export.checkpoint.layouts import Layout, count_blocks


def flux_config(tensors: Tensors) -> dict[str, Any]:
    """Return the part of FluxTransformer2DModel's configuration that the shapes of BFL's tensors tell."""
    head = tensors["double_blocks.0.img_attn.norm.query_norm.scale"].shape[0]
    width, channels = tensors["img_in.weight"].shape
    out = tensors["final_layer.linear.weight"].shape[0]
    return {
        "_class_name": "FluxTransformer2DModel",
        "num_layers": count_blocks(tensors, "double_blocks"),
        "num_single_layers": count_blocks(tensors, "single_blocks"),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "in_channels": channels,
        "out_channels": None if out == channels else out,
        "joint_attention_dim": tensors["txt_in.weight"].shape[1],
        "pooled_projection_dim": tensors["vector_in.in_layer.weight"].shape[1],
        "guidance_embeds": "guidance_in.in_layer.weight" in tensors,
    }


def flux_hints(names: Iterable[str]) -> list[str]:
    """Return keys in BFL's layout for as many blocks as diffusers' `names` have."""
    double, single = count_blocks(names, "transformer_blocks"), count_blocks(names, "single_transformer_blocks")
    blocks = [f"double_blocks.{i}." for i in range(double)] + [f"single_blocks.{i}." for i in range(single)]
    return [*blocks, "guidance_in."]


DOUBLE_QKV = tuple(f"transformer_blocks.{{}}.attn.to_{part}" for part in "qkv")
DOUBLE_ADDED_QKV = tuple(f"transformer_blocks.{{}}.attn.add_{part}_proj" for part in "qkv")
SINGLE_QKV = tuple(f"single_transformer_blocks.{{}}.attn.to_{part}" for part in "qkv")

LAYOUT = Layout(
    key="double_blocks.0.img_attn.qkv.weight",
    convert=single_file_utils.convert_flux_transformer_checkpoint_to_diffusers,
    hints=flux_hints,
    config=flux_config,
    encoders={"clip_l": "text_encoder", "t5xxl": "text_encoder_2"},
    lora_encoders={  # some tools call T5 the third text encoder, although FLUX.1 has only two
        "lora_te_": "text_encoder",
        "lora_te1_": "text_encoder",
        "lora_te2_": "text_encoder_2",
        "lora_te3_": "text_encoder_2",
    },
    lora_joint={  # of XLabs' attention processors, and of diffusers' fused projections
        "double_blocks.{}.processor.qkv_lora1": DOUBLE_QKV,
        "double_blocks.{}.processor.qkv_lora2": DOUBLE_ADDED_QKV,
        "double_blocks.{}.processor.proj_lora1": ("transformer_blocks.{}.attn.to_out.0",),
        "double_blocks.{}.processor.proj_lora2": ("transformer_blocks.{}.attn.to_add_out",),
        "single_blocks.{}.processor.qkv_lora": SINGLE_QKV,
        "single_blocks.{}.processor.proj_lora": ("single_transformer_blocks.{}.proj_out",),
        "transformer_blocks.{}.attn.to_qkv": DOUBLE_QKV,
        "transformer_blocks.{}.attn.to_added_qkv": DOUBLE_ADDED_QKV,
        "single_transformer_blocks.{}.attn.to_qkv": SINGLE_QKV,
    },
    lora_optional={
        r"transformer\.(time_text_embed_guidance_embedder|guidance_in)_.*": "this model has no guidance embedder",
        r"text_encoder\.text_projection": "FLUX.1 uses CLIP without its projection",
    },
)
