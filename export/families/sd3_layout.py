"""The layout of Stable Diffusion 3.5 in one file, as Stability and ComfyUI write it."""

from __future__ import annotations

from collections.abc import Iterable
from math import isqrt
from typing import Any

from diffusers.loaders import single_file_utils

from ditforge.export.checkpoint.conversion import Tensors
from ditforge.export.checkpoint.layouts import Layout, count_blocks


def sd3_config(tensors: Tensors) -> dict[str, Any]:
    """Return the part of SD3Transformer2DModel's configuration that the shapes of Stability's tensors tell."""
    width, channels, patch, _ = tensors["x_embedder.proj.weight"].shape
    norm = tensors.get("joint_blocks.0.x_block.attn.ln_q.weight")
    head = norm.shape[0] if norm else 64
    caption, joint = tensors["context_embedder.weight"].shape
    dual = {int(key.split(".")[1]) for key in tensors if ".attn2." in key}
    return {
        "_class_name": "SD3Transformer2DModel",
        "num_layers": count_blocks(tensors, "joint_blocks"),
        "dual_attention_layers": sorted(dual),
        "qk_norm": "rms_norm" if norm else None,
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "caption_projection_dim": caption,
        "joint_attention_dim": joint,
        "pooled_projection_dim": tensors["y_embedder.mlp.0.weight"].shape[1],
        "in_channels": channels,
        "out_channels": tensors["final_layer.linear.weight"].shape[0] // patch**2,
        "patch_size": patch,
        "pos_embed_max_size": isqrt(tensors["pos_embed"].shape[1]),
    }


def sd3_hints(names: Iterable[str]) -> list[str]:
    """Return keys in Stability's layout for as many blocks as diffusers' `names` have, with all optional parts."""
    blocks = range(count_blocks(names, "transformer_blocks"))
    keys = [f"joint_blocks.{i}.x_block.{part}." for i in blocks for part in ("attn.ln_q", "attn2.qkv")]
    return [*keys, "context_embedder.weight"]


LAYOUT = Layout(
    key="joint_blocks.0.x_block.attn.qkv.weight",
    convert=single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers,
    hints=sd3_hints,
    config=sd3_config,
    encoders={"clip_l": "text_encoder", "clip_g": "text_encoder_2", "t5xxl": "text_encoder_3"},
    projected=("clip_l",),
    lora_encoders={
        "lora_te_": "text_encoder",
        "lora_te1_": "text_encoder",
        "lora_te2_": "text_encoder_2",
        "lora_te3_": "text_encoder_3",
    },
    lora_joint={  # of diffusers' fused projections
        f"transformer_blocks.{{}}.{joint}": tuple(f"transformer_blocks.{{}}.{part}" for part in parts)
        for joint, parts in {
            "attn.to_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
            "attn.to_added_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
            "attn2.to_qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
        }.items()
    },
)
