"""Stable Diffusion 3.5 checkpoints of other sizes, with random weights: one as medium is built, one as large is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from random_flux import character_clip_tokenizer, word_t5_tokenizer
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer, T5Config, T5EncoderModel

T5_WIDTH = 120
TEXT_LENGTH = 48


def medium(seed: int = 0) -> StableDiffusion3Pipeline:
    """As SD3.5 medium: a second attention in the first blocks, normalised queries and keys, T5."""
    transformer = {"num_layers": 4, "num_attention_heads": 3, "attention_head_dim": 20, "pos_embed_max_size": 24}
    sizes = {"dual_attention_layers": (0, 1), "caption_projection_dim": 60, **transformer}
    return pipeline(seed, with_t5=True, vae_channels=(8, 12, 16, 20), **sizes)


def large(seed: int = 0, with_t5: bool = False) -> StableDiffusion3Pipeline:
    """As SD3.5 large. Without T5, zeros take its place. Its latents are half the picture's size."""
    transformer = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 28, "pos_embed_max_size": 20}
    sizes = {"dual_attention_layers": (), "caption_projection_dim": 56, **transformer}
    return pipeline(seed, with_t5=with_t5, vae_channels=(8, 12), **sizes)


def save_medium(folder: Path, seed: int = 0) -> Path:
    """Save a checkpoint like medium to `folder`/random-sd3."""
    path = folder / "random-sd3"
    medium(seed).save_pretrained(path, safe_serialization=True)
    (path / "ditforge.json").write_text(json.dumps({"text_length": TEXT_LENGTH}))
    return path


def save_large_turbo(folder: Path, seed: int = 0, with_t5: bool = False) -> Path:
    """Save a checkpoint like large-turbo, which its ditforge.json tells from large, to `folder`/random-sd3-turbo."""
    path = folder / "random-sd3-turbo"
    large(seed, with_t5).save_pretrained(path, safe_serialization=True)
    (path / "ditforge.json").write_text(json.dumps({"variant": "large-turbo", "text_length": TEXT_LENGTH}))
    return path


def pipeline(seed: int, with_t5: bool, vae_channels: tuple[int, ...], **transformer: Any) -> StableDiffusion3Pipeline:
    """A pipeline whose parts agree on their sizes, no two of which are equal where they may differ."""
    torch.manual_seed(seed)
    clip_tokenizer = character_clip_tokenizer()
    dit = SD3Transformer2DModel(
        sample_size=12,
        in_channels=16,
        out_channels=16,
        joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=36 + 44,
        qk_norm="rms_norm",
        **transformer,
    )
    for name, parameter in dit.named_parameters():  # so that modulation and output are not near zero
        if name.endswith("weight") and parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.6 / parameter.shape[1] ** 0.5)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(vae_channels),
        up_block_types=("UpDecoderBlock2D",) * len(vae_channels),
        block_out_channels=vae_channels,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=4,
        sample_size=96,
        scaling_factor=1.3,
        shift_factor=0.06,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    return StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae.eval(),
        text_encoder=clip(clip_tokenizer, hidden_size=40, projection_dim=36, eos_token_id=2).eval(),
        tokenizer=clip_tokenizer,
        text_encoder_2=clip(clip_tokenizer, hidden_size=64, projection_dim=44, num_hidden_layers=3).eval(),
        tokenizer_2=padded_with_exclamation_marks(clip_tokenizer),
        text_encoder_3=t5().eval() if with_t5 else None,
        tokenizer_3=word_t5_tokenizer(max_tokens=TEXT_LENGTH) if with_t5 else None,
        transformer=dit.eval(),
    )


def clip(tokenizer: CLIPTokenizer, **options: Any) -> CLIPTextModelWithProjection:
    """A CLIP for the tokenizer. eos_token_id 2 is what the published ones say: then the largest id ends the text."""
    defaults = {"eos_token_id": tokenizer.eos_token_id, "num_hidden_layers": 2}
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        intermediate_size=88,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **(defaults | options),
    )
    return CLIPTextModelWithProjection(config)


def t5() -> T5EncoderModel:
    """A T5 encoder for the word tokenizer."""
    sizes = {"d_model": T5_WIDTH, "d_kv": 14, "d_ff": 72, "num_layers": 2, "num_heads": 3}
    vocabulary = len(word_t5_tokenizer(max_tokens=TEXT_LENGTH))
    return T5EncoderModel(T5Config(vocab_size=vocabulary, feed_forward_proj="gated-gelu", **sizes))


def padded_with_exclamation_marks(tokenizer: CLIPTokenizer) -> CLIPTokenizer:
    """The same tokenizer as OpenCLIP's bigG has it: "!", id 0, fills up."""
    vocabulary = tokenizer.get_vocab()
    return CLIPTokenizer(vocabulary, merges=[], model_max_length=tokenizer.model_max_length, pad_token="!")
