"""The models of FLUX.1, and their layout in one file, as Black Forest Labs (BFL) and ComfyUI write it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ditforge.export.checkpoint.layout import Layout, Shaped, count_blocks, weights_and_biases
from ditforge.export.checkpoint.variants import Variant

if TYPE_CHECKING:
    from ditforge.export.checkpoint.conversion import Recipe

DEV, SCHNELL = PUBLISHED = ("flux.1-dev", "flux.1-schnell")
CLASS = "FluxTransformer2DModel"
DEV_NAMES = re.compile(r"flux[\W_]*1?[\W_]*dev|de[\W_]*distill|undistill")
# Steps, guidance and the length of T5's input are those of the authors' model cards and code.
VARIANTS = (
    Variant(
        name="dev",
        title="FLUX.1-dev",
        configs=DEV,
        guidance="embedded",
        steps=28,
        scale=3.5,
        text_length=512,
        fits=lambda config: bool(config["guidance_embeds"]),
        named=DEV_NAMES,
    ),
    Variant(
        name="schnell",
        title="FLUX.1-schnell",
        configs=SCHNELL,
        guidance="none",
        steps=4,
        scale=0.0,
        text_length=256,
        fits=lambda config: not config["guidance_embeds"],
        named=re.compile("schnell"),
        scheduled=lambda scheduler: not scheduler.get("use_dynamic_shifting"),
    ),
    # Fine-tunes that undo the distillation, such as flux-dev-de-distill. They take classifier-free guidance.
    Variant(
        name="dev",
        title="FLUX.1-dev without its distilled guidance",
        configs=DEV,
        guidance="classifier-free",
        steps=28,
        scale=3.5,
        text_length=512,
        fits=lambda config: not config["guidance_embeds"],
        named=DEV_NAMES,
        scheduled=lambda scheduler: bool(scheduler.get("use_dynamic_shifting")),
    ),
)


def flux_config(tensors: Mapping[str, Shaped]) -> dict[str, Any]:
    """Return the part of FluxTransformer2DModel's configuration that the shapes of BFL's tensors tell."""
    head = tensors["double_blocks.0.img_attn.norm.query_norm.scale"].shape[0]
    width, channels = tensors["img_in.weight"].shape
    out = tensors["final_layer.linear.weight"].shape[0]
    return {
        "_class_name": CLASS,
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


def flux_names(config: dict[str, Any]) -> list[str]:
    """Return BFL's names of all tensors of a DiT with this configuration."""
    guidance = ("guidance_in",) if config["guidance_embeds"] else ()
    modules = [f"{name}.{layer}" for name in ("time_in", "vector_in", *guidance) for layer in ("in_layer", "out_layer")]
    modules += ["img_in", "txt_in", "final_layer.linear", "final_layer.adaLN_modulation.1"]
    norms = []
    for block in range(config["num_layers"]):
        for stream in ("img", "txt"):
            start = f"double_blocks.{block}.{stream}"
            modules += [f"{start}_{part}" for part in ("mod.lin", "attn.qkv", "attn.proj", "mlp.0", "mlp.2")]
            norms.append(f"{start}_attn.norm")
    for block in range(config["num_single_layers"]):
        modules += [f"single_blocks.{block}.{part}" for part in ("modulation.lin", "linear1", "linear2")]
        norms.append(f"single_blocks.{block}.norm")
    return [*weights_and_biases(modules), *(f"{norm}.{of}_norm.scale" for norm in norms for of in ("query", "key"))]


def converted(recipes: dict[str, Recipe]) -> dict[str, Recipe]:
    """Return the recipes by diffusers' names: its own converter runs on them."""
    from diffusers.loaders import single_file_utils

    result: dict[str, Recipe] = single_file_utils.convert_flux_transformer_checkpoint_to_diffusers(recipes)
    return result


def flux_hints(names: Iterable[str]) -> list[str]:
    """Return keys in BFL's layout for as many blocks as diffusers' `names` have."""
    double, single = count_blocks(names, "transformer_blocks"), count_blocks(names, "single_transformer_blocks")
    blocks = [f"double_blocks.{i}." for i in range(double)] + [f"single_blocks.{i}." for i in range(single)]
    return [*blocks, "guidance_in."]


DOUBLE_QKV = tuple(f"transformer_blocks.{{}}.attn.to_{part}" for part in "qkv")
DOUBLE_ADDED_QKV = tuple(f"transformer_blocks.{{}}.attn.add_{part}_proj" for part in "qkv")
SINGLE_QKV = tuple(f"single_transformer_blocks.{{}}.attn.to_{part}" for part in "qkv")

LAYOUT = Layout(
    pipeline="FluxPipeline",
    class_name=CLASS,
    title="FLUX.1",
    variants=VARIANTS,
    key="double_blocks.0.img_attn.qkv.weight",
    own_key="single_transformer_blocks.0.proj_mlp.weight",
    own_names=(
        (r"^single_transformer_blocks\.", "single_blocks."),
        (r"^transformer_blocks\.(\d+)\.attn\.norm_q\.weight$", r"double_blocks.\1.img_attn.norm.query_norm.scale"),
        (r"^transformer_blocks\.", "double_blocks."),
        (r"^x_embedder\.", "img_in."),
        (r"^proj_out\.", "final_layer.linear."),
        (r"^context_embedder\.", "txt_in."),
        (r"^time_text_embed\.text_embedder\.linear_1\.", "vector_in.in_layer."),
        (r"^time_text_embed\.guidance_embedder\.linear_1\.", "guidance_in.in_layer."),
    ),
    convert=converted,
    hints=flux_hints,
    defaults={"guidance_embeds": False},
    config=flux_config,
    names=flux_names,
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
