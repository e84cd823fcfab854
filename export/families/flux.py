"""The FLUX.1 family (dev, schnell and their fine-tunes): its networks, and what a client must know of its models.

The DiT that is traced is in flux_dit.py. Its graph includes packing latents into tokens, position ids and rotary
tables. Source: black-forest-labs/flux and diffusers' FluxPipeline and FluxTransformer2DModel.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel

from ditforge.contract import DIT
from ditforge.export import vae
from ditforge.export.checkpoint.diffusers_folder import CONFIGS, Checkpoint, with_defaults
from ditforge.export.checkpoint.schedule import flow_schedule
from ditforge.export.checkpoint.variants import Variant, variant_of
from ditforge.export.families import Family
from ditforge.export.families.flux_dit import PATCH, FluxVelocity
from ditforge.export.families.flux_layout import LAYOUT, PUBLISHED, VARIANTS
from ditforge.export.network import BATCH, OF_THE_EXPORT, Dim, Network, Port
from ditforge.export.quantisation import reference_pipeline
from ditforge.export.quantisation.precision import Precision, network_dtype, text_dtype
from ditforge.export.text_encoders import clip, t5
from ditforge.export.text_encoders.tokenizers import Tokenizer, read_tokenizer
from ditforge.model import Model

# The largest side of a picture, relative to the side that the model was trained for. Larger pictures fall apart, and at
# this one, attention takes 256 times as long already.
MAX_SIZE_RATIO = 4
# The linears of the blocks, without those of the modulation (norm…), whose errors reach every token. The embedders and
# the final layers are not quantised either, as in NVIDIA's recipe (TensorRT-Model-Optimizer, diffusers example).
LINEARS = re.compile(r"(single_)?transformer_blocks\.\d+\.(?!.*norm).*\.weight")


def dit(config: dict[str, Any], tokens: int, precision: Precision) -> Network:
    """Describe the DiT that has diffusers' configuration `config`, for `tokens` text tokens."""
    dtype, reason = network_dtype(precision), OF_THE_EXPORT
    if dtype == torch.float16:
        reason += "; the residual streams are clamped to fp16's range"
    channels = config["in_channels"] // PATCH**2
    latents = Port(torch.float32, (BATCH, channels, Dim("latent_height", PATCH), Dim("latent_width", PATCH)))
    text = text_dtype(precision)
    inputs = {
        "latents": latents,
        "timestep": Port(torch.float32, (BATCH,)),
        "prompt_embeds": Port(text, (BATCH, tokens, config["joint_attention_dim"])),
        "pooled_embeds": Port(text, (BATCH, config["pooled_projection_dim"])),
    }
    if config["guidance_embeds"]:
        inputs["guidance"] = Port(torch.float32, (BATCH,))
    return Network(
        name=DIT,
        build=lambda: FluxVelocity(FluxTransformer2DModel.from_config(config)),
        inputs=inputs,
        outputs={"velocity": latents},
        weights="transformer",
        dtype=dtype,
        reason=reason,
        linears=LINEARS,
    )


def read_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the DiT's configuration, with diffusers' defaults for keys that the file leaves out."""
    return with_defaults(FluxTransformer2DModel, checkpoint.config("transformer"))


def variant(checkpoint: Checkpoint) -> Variant:
    """Return the variant that the checkpoint is. Raises UserError if its files leave it open."""
    return variant_of(checkpoint, VARIANTS, read_config(checkpoint))


def networks(checkpoint: Checkpoint, precision: Precision) -> list[Network]:
    """Describe all networks of the checkpoint, in the order in which data flows."""
    tokenizers = {tokenizer.name: tokenizer for tokenizer in read_tokenizers(checkpoint)}
    length = tokenizers["t5"].max_tokens
    return [
        clip.clip_pooled(checkpoint.config("text_encoder"), "text_encoder", tokenizers["clip"].max_tokens, precision),
        t5.t5_hidden_states(checkpoint.config("text_encoder_2"), "text_encoder_2", length, precision),
        dit(read_config(checkpoint), length, precision),
        *vae.vae(vae.read_config(checkpoint), precision),
    ]


def read_tokenizers(checkpoint: Checkpoint) -> list[Tokenizer]:
    """Return CLIP's and T5's tokenizers."""
    positions = clip.positions_of(checkpoint.config("text_encoder"))
    return [
        read_tokenizer(checkpoint, "tokenizer", "clip", limit=positions),
        read_tokenizer(checkpoint, "tokenizer_2", "t5", length=variant(checkpoint).text_length),
    ]


def model(checkpoint: Checkpoint) -> Model:
    """Return what a client must know. Steps and guidance are those of the checkpoint's variant."""
    autoencoder, known = vae.read_config(checkpoint), variant(checkpoint)
    scheduler = checkpoint.config("scheduler", "scheduler_config.json")
    pixels = vae.factor(autoencoder)
    return Model(
        name=checkpoint.name,
        latent_channels=autoencoder["latent_channels"],
        vae_factor=pixels,
        size_multiple=pixels * PATCH,
        default_size=autoencoder["sample_size"],
        max_size=autoencoder["sample_size"] * MAX_SIZE_RATIO,
        default_steps=known.steps,
        guidance=known.guidance,
        default_guidance=known.scale,
        schedule=flow_schedule(scheduler, scheduler.get("_class_name", ""), PATCH),
        max_tokens={tokenizer.name: tokenizer.max_tokens for tokenizer in read_tokenizers(checkpoint)},
    )


def load_pipeline(checkpoint: Checkpoint) -> FluxPipeline:
    """Load diffusers' own pipeline, for calibration."""
    return reference_pipeline.load(FluxPipeline, checkpoint, networks(checkpoint, Precision("fp32")))


def run_pipeline(loaded: FluxPipeline, model: Model, prompt: str, steps: int, seed: int) -> None:
    """Run all steps of a picture, without decoding it."""
    free = model.guidance == "classifier-free"
    options = {"negative_prompt": "", "true_cfg_scale": model.default_guidance} if free else {}
    reference_pipeline.run(loaded, model, prompt, steps, seed, model.max_tokens["t5"], **options)


FAMILY = Family(
    name="flux",
    title="FLUX.1",
    pipeline=LAYOUT.pipeline,
    model=model,
    read_tokenizers=read_tokenizers,
    networks=networks,
    read_config=read_config,
    linears=LINEARS,
    load_pipeline=load_pipeline,
    run_pipeline=run_pipeline,
    layout=LAYOUT,
    published={name: CONFIGS / name for name in PUBLISHED},
    variants=VARIANTS,
)
