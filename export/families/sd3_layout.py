"""The models of Stable Diffusion 3.5, and their layout in one file, as Stability and ComfyUI write it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from math import isqrt
from typing import TYPE_CHECKING, Any

from ditforge.export.checkpoint.layout import Layout, Shaped, count_blocks, weights_and_biases
from ditforge.export.checkpoint.variants import Config, Variant

if TYPE_CHECKING:
    from ditforge.export.checkpoint.conversion import Recipe

LARGE, TURBO, MEDIUM = PUBLISHED = ("sd3.5-large", "sd3.5-large-turbo", "sd3.5-medium")
CLASS = "SD3Transformer2DModel"
T5_TOKENS = 256  # diffusers' default max_sequence_length; also the number of zeros that take T5's place without T5


def is_large(config: Config) -> bool:
    """Return whether a DiT with this configuration is built as large, which large-turbo is too."""
    return bool(config["qk_norm"]) and not config["dual_attention_layers"]


# Steps and guidance are those of the authors' model cards. Nothing in the DiT distinguishes large-turbo from large.
VARIANTS = (
    Variant(
        name="large",
        title="Stable Diffusion 3.5 large",
        configs=LARGE,
        guidance="classifier-free",
        steps=28,
        scale=3.5,
        text_length=T5_TOKENS,
        fits=is_large,
        named=re.compile(r"3[\W_]*5[\W_]*large(?![\W_]*turbo)"),
    ),
    Variant(
        name="large-turbo",
        title="Stable Diffusion 3.5 large-turbo",
        configs=TURBO,
        guidance="classifier-free",
        steps=4,
        scale=1.0,
        text_length=T5_TOKENS,
        fits=is_large,
        named=re.compile(r"large[\W_]*turbo"),
    ),
    Variant(
        name="medium",
        title="Stable Diffusion 3.5 medium",
        configs=MEDIUM,
        guidance="classifier-free",
        steps=40,
        scale=4.5,
        text_length=T5_TOKENS,
        fits=lambda config: bool(config["dual_attention_layers"]),
        named=re.compile(r"3[\W_]*5[\W_]*medium"),
    ),
    Variant(
        name="sd3-medium",
        title="Stable Diffusion 3 medium",
        configs=LARGE,  # what shapes do not tell is the same there
        guidance="classifier-free",
        steps=28,
        scale=7.0,
        text_length=T5_TOKENS,
        fits=lambda config: not config["qk_norm"] and not config["dual_attention_layers"],
        named=re.compile(r"3[\W_]*medium"),
    ),
)


def sd3_config(tensors: Mapping[str, Shaped]) -> dict[str, Any]:
    """Return the part of SD3Transformer2DModel's configuration that the shapes of Stability's tensors tell."""
    width, channels, patch, _ = tensors["x_embedder.proj.weight"].shape
    norm = tensors.get("joint_blocks.0.x_block.attn.ln_q.weight")
    head = 64 if norm is None else norm.shape[0]
    caption, joint = tensors["context_embedder.weight"].shape
    dual = {int(key.split(".")[1]) for key in tensors if ".attn2." in key}
    return {
        "_class_name": CLASS,
        "num_layers": count_blocks(tensors, "joint_blocks"),
        "dual_attention_layers": sorted(dual),
        "qk_norm": None if norm is None else "rms_norm",
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


def sd3_names(config: dict[str, Any]) -> list[str]:
    """Return Stability's names of all tensors of a DiT with this configuration."""
    modules = [f"{name}.mlp.{layer}" for name in ("t_embedder", "y_embedder") for layer in (0, 2)]
    modules += ["x_embedder.proj", "context_embedder", "final_layer.linear", "final_layer.adaLN_modulation.1"]
    attentions = []
    for block in range(config["num_layers"]):
        for stream in ("x_block", "context_block"):
            start = f"joint_blocks.{block}.{stream}"
            modules.append(f"{start}.adaLN_modulation.1")
            attentions.append(f"{start}.attn")
            if stream == "context_block" and block == config["num_layers"] - 1:
                modules.append(f"{start}.attn.qkv")  # nothing follows the last block's text
                continue
            modules += [f"{start}.{part}" for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
        if block in config["dual_attention_layers"]:
            start = f"joint_blocks.{block}.x_block.attn2"
            modules += [f"{start}.qkv", f"{start}.proj"]
            attentions.append(start)
    norms = [f"{attention}.ln_{of}.weight" for attention in attentions for of in "qk"] if config["qk_norm"] else []
    return ["pos_embed", *weights_and_biases(modules), *norms]


def converted(recipes: dict[str, Recipe]) -> dict[str, Recipe]:
    """Return the recipes by diffusers' names: its own converter runs on them."""
    from diffusers.loaders import single_file_utils

    result: dict[str, Recipe] = single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers(recipes)
    return result


def sd3_hints(names: Iterable[str]) -> list[str]:
    """Return keys in Stability's layout for as many blocks as diffusers' `names` have, with all optional parts."""
    blocks = range(count_blocks(names, "transformer_blocks"))
    keys = [f"joint_blocks.{i}.x_block.{part}." for i in blocks for part in ("attn.ln_q", "attn2.qkv")]
    return [*keys, "context_embedder.weight"]


LAYOUT = Layout(
    pipeline="StableDiffusion3Pipeline",
    class_name=CLASS,
    title="Stable Diffusion 3.5",
    variants=VARIANTS,
    key="joint_blocks.0.x_block.attn.qkv.weight",
    own_key="pos_embed.pos_embed",
    own_names=(
        (r"^transformer_blocks\.(\d+)\.attn\.norm_q\.", r"joint_blocks.\1.x_block.attn.ln_q."),
        (r"^transformer_blocks\.(\d+)\.attn2\.", r"joint_blocks.\1.x_block.attn2."),
        (r"^transformer_blocks\.", "joint_blocks."),
        (r"^pos_embed\.pos_embed$", "pos_embed"),
        (r"^pos_embed\.", "x_embedder."),
        (r"^proj_out\.", "final_layer.linear."),
        (r"^context_embedder\.", "context_embedder."),
        (r"^time_text_embed\.text_embedder\.linear_1\.", "y_embedder.mlp.0."),
    ),
    convert=converted,
    hints=sd3_hints,
    defaults={"qk_norm": None, "dual_attention_layers": ()},
    config=sd3_config,
    names=sd3_names,
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
